"""`python -m distav.making`: the same as tools/make_shards.py."""

import sys

from distav.making.command import main

if __name__ == "__main__":
    sys.exit(main())
