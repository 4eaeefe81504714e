#!/usr/bin/env python3
"""Make WebDataset shards from raw clips: `make_shards.py videos|csv|digits|synthetic|llp|ave|cleaned --help`."""

import sys

from distav.tools.make_shards import main

if __name__ == "__main__":
    sys.exit(main())
