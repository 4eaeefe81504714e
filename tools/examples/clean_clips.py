"""Find and correct wrong labels in a folder of clips: CLIPS/CLASS/*.mp4.

    python tools/examples/clean_clips.py CLIPS OUT

Writes OUT/shards, the run OUT/runs/clean, and OUT/cleaned with the corrected labels. Existing parts are continued.
"""

import argparse
from pathlib import Path

import distav


def main(clips: Path, out: Path) -> None:
    """Build a dataset, train on it, print the label issues, and write the cleaned dataset."""
    built = distav.make_shards("videos", clips, out / "shards", clip_s=2)
    print(f"{built.clips} clips, {built.rejected} rejected")
    finished = distav.train(
        "quickstart",
        {"data.root": out / "shards", "run.root": out / "runs", "run.name": "clean"},
    )
    correction = finished.report["corrections"][-1]
    rate = correction["label_noise_rate"]
    print(f"label noise rate {rate['estimate']:.1%} ({rate['ci95_low']:.1%} to {rate['ci95_high']:.1%})")
    issues = [row for row in finished.labels().to_pylist() if row["given_label"] != row["corrected_label"]]
    for row in sorted(issues, key=lambda row: row["self_confidence"])[:10]:
        print(f"{row['key']}: {row['given_label']} -> {row['corrected_label']} ({row['confidence']:.0%})")
    labels = finished.folder / "labels" / f"{correction['phase']}.parquet"
    distav.make_shards("clean", out / "shards", out / "cleaned", labels=labels, min_confidence=0.95)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, metavar="CLIPS", help="directory with one directory of clips per class")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory for the results")
    main(**vars(parser.parse_args()))
