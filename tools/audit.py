#!/usr/bin/env python3
"""Write a page for reviewing label issues and mismatched pairs; see `audit.py --help`."""

import sys

from distav.tools.audit.command import main

if __name__ == "__main__":
    sys.exit(main())
