#!/usr/bin/env python3
"""Embed clips with an exported network and write Parquet tables: `embed.py --help`."""

import sys

from distav.tools.embed import main

if __name__ == "__main__":
    sys.exit(main())
