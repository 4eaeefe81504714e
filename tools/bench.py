#!/usr/bin/env python3
"""Measure distav beside its peers: what `bench.py --help` lists."""

import sys

from distav.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
