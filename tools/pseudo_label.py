#!/usr/bin/env python3
"""Predict audio and visual events of each second with teachers: `pseudo_label.py --help`."""

import sys

from distav.tools.pseudo_label.command import main

if __name__ == "__main__":
    sys.exit(main())
