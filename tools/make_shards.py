#!/usr/bin/env python3
"""Build a dataset of WebDataset shards from raw clips, or clean one: `make_shards.py --help`."""

import sys

from distav.tools.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
