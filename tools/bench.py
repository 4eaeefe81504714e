#!/usr/bin/env python3
"""Benchmarks of distav against alternative implementations and baselines; see `bench.py --help`."""

import sys
from pathlib import Path

# Python puts this directory first in sys.path, where `bench` would be a second name of the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
