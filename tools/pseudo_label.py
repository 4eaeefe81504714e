#!/usr/bin/env python3
"""Let teachers label what is heard and seen in each second of a set: `pseudo_label.py --help`."""

import sys

from distav.tools.pseudo_label.command import main

if __name__ == "__main__":
    sys.exit(main())
