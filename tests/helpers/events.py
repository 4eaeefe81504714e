"""Small sets in the form of LLP and AVE: annotations, features that show what they say, and videos."""

from pathlib import Path

import av
import numpy as np

from distav.data.annotations.llp import CLASSES, DURATION_S
from tests.conftest import make_shards

USED = (0, 3, 9, 11)
"""Classes that occur."""
SIZES = {"train": 48, "val": 6, "test": 12}
FILES = {"train": "AVVP_train.csv", "val": "AVVP_val_pd.csv", "test": "AVVP_test_pd.csv"}
STREAMS = {"vggish": ("audio", DURATION_S, 8), "res152": ("visual", 8 * DURATION_S, 12)}


def write_llp(folder: Path) -> dict[str, np.ndarray]:
    """Write annotations and features of all splits; returns the true events [2, T, C] by video."""
    rng = np.random.default_rng(0)
    ideas = {name: rng.standard_normal((len(CLASSES), dim)) for name, (_, _, dim) in STREAMS.items()}
    truth: dict[str, np.ndarray] = {}
    heard, seen = ["filename\tonset\toffset\tevent_labels"], ["filename\tonset\toffset\tevent_labels"]
    for name in STREAMS:
        (folder / name).mkdir(parents=True)
    for place, (split, count) in enumerate(SIZES.items()):
        lines = ["filename\tevent_labels"]
        for number in range(count):
            video = f"v{place}-{number:08d}_{number}_{number + 10}"
            events = np.zeros((2, DURATION_S, len(CLASSES)), dtype=bool)
            kinds = rng.choice(USED, size=1 + number % 2, replace=False)
            for kind in kinds:
                first = int(rng.integers(0, 6))
                modalities = [[0, 1], [0], [1]][int(rng.integers(3))]
                for modality in modalities:
                    events[modality, first : first + 4, kind] = True
                    if split != "train":
                        (heard, seen)[modality].append(f"{video}\t{first}\t{first + 4}\t{CLASSES[kind]}")
            lines.append(f"{video}\t{','.join(CLASSES[kind] for kind in kinds)}")
            truth[video] = events
            for name, (modality, steps, dim) in STREAMS.items():
                shown = events[("audio", "visual").index(modality)].astype(float) @ ideas[name]
                values = np.repeat(shown, steps // DURATION_S, axis=0) + 0.1 * rng.standard_normal((steps, dim))
                np.save(folder / name / f"{video[:11]}.npy", values.astype(np.float32))
        (folder / FILES[split]).write_text("\n".join(lines) + "\n")
    (folder / "AVVP_eval_audio.csv").write_text("\n".join(heard) + "\n")
    (folder / "AVVP_eval_visual.csv").write_text("\n".join(seen) + "\n")
    return truth


def llp_shards(folder: Path, out: Path, status: int = 0) -> None:
    """Make the set of what `write_llp` wrote."""
    features = [f"--features={modality}:{name}={folder / name}" for name, (modality, _, _) in STREAMS.items()]
    make_shards("llp", folder, out, *features, "--shard-samples=20", "--workers=1", status=status)


AVE_CLASSES = ("Bark", "Bell", "Church bell")


def write_ave(folder: Path) -> None:
    """Write annotations, lists and ten-second videos: the picture's shade and the tone's pitch tell the class."""
    (folder / "videos").mkdir(parents=True)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for place, (split, count) in enumerate({"train": 9, "val": 1, "test": 4}.items()):
        for number in range(count):
            video, kind, first = f"a{place}{number:09d}", number % len(AVE_CLASSES), number % 4
            lines[split].append(f"{AVE_CLASSES[kind]}&{video}&good&{first}&{first + 5}")
            _write_video(folder / "videos" / f"{video}.mp4", kind, range(first, first + 5))
    whole = ["Category&VideoID&Quality&StartTime&EndTime", *(line for each in lines.values() for line in each)]
    (folder / "Annotations.txt").write_text("\n".join(whole) + "\n")
    for split, each in lines.items():
        (folder / f"{split}Set.txt").write_text("\n".join(each) + "\n")


def _write_video(path: Path, kind: int, seconds: range) -> None:
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for frame in range(8 * DURATION_S):
            shade = 80 * (kind + 1) if frame // 8 in seconds else 10
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), shade, np.uint8), "rgb24")))
        container.mux(video.encode())
        moments = np.arange(16000 * DURATION_S) / 16000
        loud = np.isin(moments.astype(int), seconds)
        wave = (0.4 * np.sin(2 * np.pi * 300 * (kind + 1) * moments) * loud).astype(np.float32)
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode())


def ave_shards(folder: Path, out: Path) -> None:
    """Make the set of what `write_ave` wrote."""
    make_shards("ave", folder, out, f"--videos={folder}/videos", "--short-side=32", "--workers=1")
