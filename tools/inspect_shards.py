#!/usr/bin/env python3
"""Look into a set of shards before a run relies on it: `inspect_shards.py verify|stats|preview --help`."""

import sys

from distav.tools.inspect_shards.command import main

if __name__ == "__main__":
    sys.exit(main())
