#!/usr/bin/env python3
"""Embed clips by an exported network, into Parquet: `embed.py --help`."""

import sys

from distav.tools.embed import main

if __name__ == "__main__":
    sys.exit(main())
