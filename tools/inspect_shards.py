#!/usr/bin/env python3
"""Check and preview a dataset before training on it; see `inspect_shards.py verify|stats|preview --help`."""

import sys

from distav.tools.inspect_shards.command import main

if __name__ == "__main__":
    sys.exit(main())
