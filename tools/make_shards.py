#!/usr/bin/env python3
"""Make WebDataset shards from raw clips: `make_shards.py videos|csv|digits|synthetic --help`."""

import sys

from distav.making.command import main

if __name__ == "__main__":
    sys.exit(main())
