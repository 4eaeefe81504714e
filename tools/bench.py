#!/usr/bin/env python3
"""Measure distav beside its peers: `bench.py bank|neighbors|shards|loader|step|scaling|noise|parsing|readme --help`."""

import sys

from distav.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
