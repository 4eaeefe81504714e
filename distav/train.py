"""Train audio-visual encoders on noisy data, and correct its labels.

One laptop core:   deepspeed distav/train.py --config configs/quickstart.yaml
Two ranks:         deepspeed --num_gpus 2 distav/train.py --config configs/avdigits.yaml data.root=shards/digits
Many nodes:        deepspeed --hostfile configs/launch/hostfile distav/train.py --config configs/multinode.yaml
Any setting can follow as key=value; --print-config shows them all. The same command goes on after a kill.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Started as a file, Python puts this folder first, where `config`, `data` or `models` would hide other packages.
sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).resolve().parent]

from distav.config import loading
from distav.config.cli import exit_with_error
from distav.config.errors import UserError
from distav.config.schema import Config
from distav.distributed.signals import EXIT_INTERRUPTED, Interrupted
from distav.training.validation import validate_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a configuration; returns the exit status."""
    options = _parse(arguments)
    try:
        settings = loading.load(options.config, options.overrides)
        validate_names(settings)
        if options.print_config:
            print(loading.to_yaml(settings), end="")
            return 0
        return _train(settings)
    except UserError as error:
        return exit_with_error(error, "distav")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="PATH", help="a YAML file, such as those in configs/")
    parser.add_argument("--print-config", action="store_true", help="print every setting of the run and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # The launcher adds it.
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that replace the file's")
    return parser.parse_intermixed_args(arguments)


def _train(settings: Config) -> int:
    # Imported late, so that mistakes in the configuration show at once.
    from distav.data.preparation.quickstart import render_missing_dataset
    from distav.distributed.process_group import process_group
    from distav.training.phases.registry import run_remaining
    from distav.training.report import write_report
    from distav.training.run import open_run

    chosen = settings.run
    with process_group(chosen.device.name, chosen.timeout_s, chosen.threads_per_rank) as here:
        render_missing_dataset(settings.data, here)
        try:
            with open_run(settings, here) as run:
                run_remaining(run)
                write_report(run)
        except Interrupted as asked:
            if here.is_main:
                print(f"distav: {asked}; rerun the same command to resume (exit status {EXIT_INTERRUPTED})", file=sys.stderr)
            return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
