#!/usr/bin/env python3
"""Write the encoders of an exported network as ONNX files: `export_onnx.py --help`."""

import sys

from distav.tools.export_onnx import main

if __name__ == "__main__":
    sys.exit(main())
