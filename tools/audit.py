#!/usr/bin/env python3
"""Write a page to judge labels and pairs that look wrong: `audit.py --help`."""

import sys

from distav.tools.audit.command import main

if __name__ == "__main__":
    sys.exit(main())
