#!/usr/bin/env python3
"""Measure distav beside its peers: what `bench.py --help` lists."""

import sys
from pathlib import Path

# Started as a file, Python puts this folder first, where `bench` is this file's package under a second name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
