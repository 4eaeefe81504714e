"""Small datasets in the form of LLP and AVE: annotations, features that encode the events, and videos."""

from pathlib import Path

import av
import numpy as np

from distav.data.annotations.llp import CLASSES, DURATION_S
from distav.data.modalities import MODALITIES
from tests.conftest import make_shards

USED_CLASSES = (0, 3, 9, 11)
"""Indices of the classes that occur."""
SIZES = {"train": 48, "val": 6, "test": 12}
FILES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
EVENT_FILES = {"audio": "AVVP_eval_audio.csv", "visual": "AVVP_eval_visual.csv"}
STREAMS = {"vggish": ("audio", DURATION_S, 8), "res152": ("visual", 8 * DURATION_S, 12)}


def write_llp(folder: Path) -> dict[str, np.ndarray]:
    """Write annotations and features of all splits; return the true events [2, T, C] by video."""
    rng = np.random.default_rng(0)
    prototypes = {name: rng.standard_normal((len(CLASSES), dim)) for name, (_, _, dim) in STREAMS.items()}
    truth: dict[str, np.ndarray] = {}
    event_lines = {modality: ["filename\tonset\toffset\tevent_labels"] for modality in MODALITIES}
    for name in STREAMS:
        (folder / name).mkdir(parents=True)
    for split_index, (split, count) in enumerate(SIZES.items()):
        lines = ["filename\tevent_labels"]
        for number in range(count):
            video = f"v{split_index}-{number:08d}_{number}_{number + 10}"
            events = np.zeros((2, DURATION_S, len(CLASSES)), dtype=bool)
            labels = rng.choice(USED_CLASSES, size=1 + number % 2, replace=False)
            for label in labels:
                start = int(rng.integers(0, 6))
                for modality in [[0, 1], [0], [1]][int(rng.integers(3))]:
                    events[modality, start : start + 4, label] = True
                    if split != "train":
                        line = f"{video}\t{start}\t{start + 4}\t{CLASSES[label]}"
                        event_lines[MODALITIES[modality]].append(line)
            lines.append(f"{video}\t{','.join(CLASSES[label] for label in labels)}")
            truth[video] = events
            for name, (modality, steps, dim) in STREAMS.items():
                by_second = events[MODALITIES.index(modality)].astype(float) @ prototypes[name]
                values = np.repeat(by_second, steps // DURATION_S, axis=0) + 0.1 * rng.standard_normal((steps, dim))
                np.save(folder / name / f"{video[:11]}.npy", values.astype(np.float32))
        (folder / FILES[split]).write_text("\n".join(lines) + "\n")
    for modality, lines in event_lines.items():
        (folder / EVENT_FILES[modality]).write_text("\n".join(lines) + "\n")
    return truth


def llp_shards(folder: Path, out: Path, status: int = 0) -> None:
    """Build a dataset from the files of `write_llp`."""
    features = [f"--features={modality}:{name}={folder / name}" for name, (modality, _, _) in STREAMS.items()]
    make_shards("llp", folder, out, *features, "--shard-samples=20", "--workers=1", status=status)


AVE_CLASSES = ("Bark", "Bell", "Church bell")


def write_ave(folder: Path) -> None:
    """Write annotations, lists and ten-second videos; the brightness and the pitch of the tone depend on the class."""
    (folder / "videos").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for split_index, (split, count) in enumerate({"train": 9, "val": 1, "test": 4}.items()):
        for number in range(count):
            video, label, start = f"a{split_index}{number:09d}", number % len(AVE_CLASSES), number % 4
            lines[split].append(f"{AVE_CLASSES[label]}&{video}&good&{start}&{start + 5}")
            _write_video(folder / "videos" / f"{video}.mp4", label, range(start, start + 5))
    header = "Category&VideoID&Quality&StartTime&EndTime"
    all_lines = [header, *lines["train"], *lines["val"], *lines["test"]]
    (folder / "Annotations.txt").write_text("\n".join(all_lines) + "\n")
    for split, split_lines in lines.items():
        (folder / f"{split}Set.txt").write_text("\n".join(split_lines) + "\n")


def _write_video(path: Path, label: int, seconds: range) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(8 * DURATION_S):
            shade = 80 * (label + 1) if index // 8 in seconds else 10
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), shade, np.uint8), "rgb24")))
        container.mux(video.encode())
        times = np.arange(16000 * DURATION_S) / 16000
        audible = np.isin(times.astype(int), seconds)
        wave = (0.4 * np.sin(2 * np.pi * 300 * (label + 1) * times) * audible).astype(np.float32)
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def ave_shards(folder: Path, out: Path) -> None:
    """Build a dataset from the files of `write_ave`."""
    make_shards("ave", folder, out, f"--videos={folder}/videos", "--short-side=32", "--workers=1")
