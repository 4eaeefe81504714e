"""Coverage-guided fuzzing: `python -m tests.fuzz.fuzz TARGET [seconds]`; needs atheris, stops at the first failure."""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["distav"]):
    from tests.fuzz.targets import TARGETS, run_target


def main() -> None:
    name, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "valid").write_bytes(TARGETS[name][1])
        limits = [f"-max_total_time={seconds}", "-timeout=5", "-rss_limit_mb=2048", "-max_len=20000"]
        atheris.Setup([sys.argv[0], *limits, corpus], lambda content: run_target(name, content))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
