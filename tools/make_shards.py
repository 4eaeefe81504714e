#!/usr/bin/env python3
"""Make WebDataset shards from raw clips: `make_shards.py videos|csv|digits|synthetic|llp|ave|cleaned --help`."""

import os
import sys

from distav.making.command import main

if __name__ == "__main__":
    # webdataset then opens nothing by name, runs no command that a URL may hold, and unpickles nothing.
    os.environ.setdefault("WDS_SECURE", "1")
    sys.exit(main())
