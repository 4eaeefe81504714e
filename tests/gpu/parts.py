"""Parts of the GPU verification: commands, time limits and thresholds."""

import importlib.util
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TESTS = "python -m pytest -v -ra --durations=8 -p no:cacheprovider -o faulthandler_timeout=60"
DECODING = "tests/gpu/test_decoding.py"


@dataclass(frozen=True)
class Part:
    """One part of the verification.

    Attributes:
        name: name of the part and of its files in the output directory.
        shows: what it verifies.
        limit_s: seconds after which it is terminated.
        gpu: command on a GPU; `{json}` stands for the file of its figures.
        cpu: command in the rehearsal on a CPU.
        thresholds: bounds on its figures, such as {"distav / bare PyTorch loop": "<= 1.05"}. In the rehearsal the
            figures must exist but may have any value.
    """

    name: str
    shows: str
    limit_s: float
    gpu: str
    cpu: str
    thresholds: Mapping[str, str] = field(default_factory=dict)

    def command(self, device: str, file: Path) -> list[str]:
        """Return the words of the command that writes its figures to `file`."""
        words = shlex.split(self.gpu if device == "cuda" else self.cpu)
        return [{"python": sys.executable, "{json}": str(file)}.get(word, word) for word in words]


def _tests(selection: str, gpu_options: str = "") -> tuple[str, str]:
    return f"{TESTS} {selection} -m 'gpu and not long'{gpu_options}", f"{TESTS} {selection}"


def _bench(gpu: str, cpu: str) -> tuple[str, str]:
    return (
        f"python tools/bench.py {gpu} --device cuda --threads 8 --json {{json}}",
        f"python tools/bench.py {cpu} --threads 2 --rounds 1 --json {{json}}",
    )


def _script(name: str) -> tuple[str, str]:
    command = f"python -m tests.gpu.scripts {name} --json {{json}} --device"
    return f"{command} cuda", f"{command} cpu"


# These tests measure no times, so they can run in parallel.
_PARALLEL = " -n 4" if importlib.util.find_spec("xdist") else ""
_STEP = {"distav / bare PyTorch loop": "<= 1.05"}
_WAIT = {"data wait, fraction of a step of 1.25 batch times": "<= 0.02"}
PARTS = (
    Part("facts", "hardware and software of the machine", 45, *_script("facts")),
    Part(
        "h264",
        "DALI decodes on this GPU",
        60,
        *_tests(f"{DECODING} -k h264"),
    ),
    Part(
        "decode",
        "decoded MJPEG, VP9 and H.264 are the same on the GPU, on the CPU and with PyAV",
        60,
        *_tests(f"{DECODING} -k 'not h264'"),
    ),
    Part(
        "quickstart",
        "the quickstart on the GPU in bf16 with ZeRO 1 corrects labels as well as on the CPU",
        300,
        *_script("quickstart"),
        {
            "label accuracy": ">= 0.97",
            "label accuracy, difference": "<= 0.02",
            "noise rate, error": "<= 0.1",
            "noise rate, difference": "<= 0.05",
            "top-1": ">= 0.97",
            "top-1, difference": "<= 0.02",
        },
    ),
    Part(
        "bank",
        "time of the loss over 2M rows",
        60,
        *_bench(
            "bank --batch 4096 --rows 2000000 --dim 128",
            "bank --batch 64 --rows 4096 --dim 32 --memory-rows 4096 --shard-rows 4096",
        ),
        {"loss + gradient / matrix products": "<= 1.7"},
    ),
    Part(
        "neighbors",
        "time of the exact search among 400k samples",
        60,
        *_bench(
            "neighbors --rows 400000 --dim 256 --k 200 --rounds 3",
            "neighbors --rows 4000 --dim 32 --k 20 --queries 500 --ring-rows 600",
        ),
        {"distav / matrix product, all pairs": "<= 3"},
    ),
    Part(
        "step-vit-l",
        "time of a step with ViT-L towers",
        150,
        *_bench("step --towers vit-l --batch 32 --clips 160", "step --towers small --batch 4 --clips 64"),
        _STEP | {"rate of a step / rate of a matrix product": ">= 0.4"},
    ),
    Part(
        "step-r2plus1d",
        "time of a step with R(2+1)D-18 towers",
        150,
        *_bench("step --towers r2plus1d_18 --batch 32 --clips 160", "step --towers small --batch 4 --clips 64"),
        _STEP,
    ),
    Part(
        "loader-mjpeg",
        "batches of MJPEG decoded on the GPU",
        60,
        *_bench("loader --codec mjpeg --rounds 3", "loader --codec mjpeg --clips 32 --batch 8"),
        _WAIT,
    ),
    Part(
        "loader-h264",
        "batches of H.264 decoded on the GPU",
        120,
        *_bench("loader --codec h264 --rounds 3", "loader --codec h264 --clips 32 --batch 8"),
        _WAIT,
    ),
    Part(
        "tests",
        "all other GPU computations agree with the CPU",
        300,
        *_tests(f"tests/gpu --ignore={DECODING}", _PARALLEL),
    ),
    Part("multinode", "ten steps of configs/multinode.yaml with 128 clips fit on one GPU", 180, *_script("multinode")),
)
"""In order of importance."""
