"""Train audio-visual encoders on noisy data and correct its labels.

A single CPU core: deepspeed distav/train.py --config configs/quickstart.yaml
Two ranks:         deepspeed --num_gpus 2 distav/train.py --config configs/avdigits.yaml data.root=shards/digits
Several nodes:     deepspeed --hostfile configs/launch/hostfile distav/train.py --config configs/multinode.yaml
torchrun, srun and python start it as well; see configs/README.md.
Any setting can follow as key=value; --print-config prints all of them. The same command resumes an interrupted run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# Python puts the directory of a script first in sys.path, where `config`, `data` or `models` would hide other packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from distav.config import loading
from distav.config.cli import CommandParser, command, exit_with_error
from distav.config.errors import UserError
from distav.distributed.launch import set_rank_variables
from distav.distributed.signals import EXIT_INTERRUPTED


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Train with a configuration; returns the exit status."""
    set_rank_variables()
    options = _parse(arguments)
    try:
        config = loading.load(options.config, options.overrides)
        # Imported late: errors in the configuration are reported before PyTorch is imported.
        from distav.training.validation import validate_names

        validate_names(config)
        if options.print_config:
            print(loading.to_yaml(config), end="")
            return 0
        from distav.training.all_phases import train_all_phases

        interruption = train_all_phases(config)
        if interruption and os.environ.get("RANK", "0") == "0":
            advice = f"the same command resumes the run (exit status {EXIT_INTERRUPTED})"
            print(f"distav: {interruption}; {advice}", file=sys.stderr)
        return EXIT_INTERRUPTED if interruption else 0
    except UserError as error:
        return exit_with_error(error, "distav")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(script="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH", help="YAML file, such as those in configs/")
    parser.add_argument("--print-config", action="store_true", help="print all settings of the run and exit")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # Added by the launcher.
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace those of the file")
    return parser.parse_intermixed_args(arguments)


class _CallableModule(ModuleType):
    """Module that can be called, since this file and the function `distav.api.train` share the name `distav.train`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call `distav.api.train`."""
        return import_module("distav.api").train(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
