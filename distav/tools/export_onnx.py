"""Write the encoders of an exported network as ONNX files, and check them with onnxruntime.

tools/export_onnx.py runs/mine/export --out onnx/mine
tools/export_onnx.py hf://USER/NAME --out onnx/mine --modalities audio

OUT gets visual.onnx and audio.onnx. Inputs are the frames [B, T, H, W, 3] uint8 and the audio [B, N] float32 in
[-1, 1] of any number B of clips; outputs are `features` [B, E] of the tower and `embedding` [B, D], unit vectors that
are comparable between the modalities. Both are equal to those of PyTorch within 1e-4.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from distav.config.cli import CommandParser, command, exit_with_error
from distav.config.errors import UserError
from distav.console import show_progress
from distav.models.onnx_export import INPUTS, export_onnx


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with show_progress(None, "towers", "exporting"):
            differences = export_onnx(options.export, options.out, options.modalities)
        for modality, difference in differences.items():
            print(f"{options.out / modality}.onnx: largest difference from PyTorch {difference:.1e}")
    except UserError as error:
        return exit_with_error(error, "export_onnx", {"modalities": "--modalities"})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        script="export_onnx.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("export", metavar="EXPORT", help="export/ directory of a run, or hf://USER/NAME[@REVISION] on the hub")
    add("--out", type=Path, required=True, metavar="OUT", help="directory of the files")
    add("--modalities", nargs="+", choices=list(INPUTS), default=list(INPUTS), help="towers to write (both)")
    return parser
