"""tools/inspect_shards.py and the audit page with datasets in which clips lack video or audio."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from distav.data.dataset import ShardedDataset, index_schema
from distav.data.files import read_table, write_table
from distav.data.integrity import file_entry
from distav.tools.audit.page import write_page
from distav.tools.inspect_shards.command import main
from distav.tools.inspect_shards.verify import verify
from tests.helpers.modalities import MODALITIES, audit_of, members_of, mixed_shards, write_mixed_folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    return mixed_shards(write_mixed_folder(folder / "files"), folder / "shards", "--short-side=32")


def test_statistics_refer_to_the_clips_with_the_modality(mixed: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["stats", str(mixed), "--clips=0", "--workers=1", f"--json={mixed / 'stats.json'}"]) == 0
    output = capsys.readouterr().out
    train = json.loads((mixed / "stats.json").read_text())["splits"]["train"]
    assert train["modalities"] == {"video and audio": 12, "video only": 8, "audio only": 8}
    assert sum(train["frame_sizes"].values()) == 20 and "0x0" not in train["frame_sizes"]
    assert train["frames"] == {"8": 20}
    assert train["member_bytes"]["video"]["min"] > 0 and train["member_bytes"]["audio"]["min"] > 0
    decoded = train["decoded"]
    assert decoded["clips"] == 28 and decoded["damaged"] == decoded["undecodable"] == {}
    keys = ShardedDataset.open(mixed).split("train")
    silent = {keys.sources[keys.keys.tolist().index(key)] for key in decoded["silent"]}
    assert all("audio" in members_of(source) for source in silent)
    assert re.search(r"video only +8\n *audio only +8", output)


def test_a_sheet_shows_which_modality_a_clip_lacks(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    split = ShardedDataset.open(mixed).split("train")
    sources = split.sources.tolist()
    shown = [sources.index(f"cat/{name}") for name in MODALITIES]
    keys = [str(split.keys[sample]) for sample in shown]
    assert main(["preview", str(mixed), "--keys", *keys, f"--out={tmp_path / 'a.png'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key, name in zip(keys, MODALITIES, strict=True):
        (line,) = [line for line in lines if line.startswith(key)]
        assert ("no audio" in line) == ("audio" not in MODALITIES[name])
        assert ("no video" in line) == ("video" not in MODALITIES[name])
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"


def change_index(root: Path, row: int, **values: int) -> None:
    table = read_table(root / "index.parquet")
    for name, value in values.items():
        column = table.column(name).to_pylist()
        column[row] = value
        position = table.column_names.index(name)
        table = table.set_column(position, name, pa.array(column, index_schema(["video", "audio"]).field(name).type))
    write_table(root / "index.parquet", table)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["tables"]["index.parquet"] = file_entry(root / "index.parquet")
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("member", "values", "fault"),
    [
        ("video", {"frames": 8}, "has no video, but frames is 8"),
        ("video", {"video_crc32": 7}, "has no video, but video_crc32 is 7; expected: 0"),
        ("audio", {"audio_bytes": 9}, r"flac': offset and bytes are None, but \(0, 9\) in index.parquet"),
        ("audio", {"width": 0}, "has a video, but width is 0"),
        (
            "audio",
            {"video_bytes": 0, "video_offset": 0, "video_crc32": 0},
            r"avi': offset and bytes are \(\d+, \d+\), ",
        ),
        ("audio", {"video_bytes": 0, "video_offset": 0, "video_crc32": 0}, "has neither video nor audio"),
    ],
)
def test_a_wrong_index_of_a_missing_member_is_a_fault(
    member: str, values: dict[str, int], fault: str, mixed: Path, tmp_path: Path
):
    assert list(verify(mixed)) == []
    root = Path(shutil.copytree(mixed, tmp_path / "shards"))
    split = ShardedDataset.open(root).split("train")
    row = next(
        sample for sample, source in enumerate(split.sources) if member not in members_of(source)
    )  # fmt: skip
    change_index(root, row, **values)
    faults = list(verify(root))
    assert any(re.search(fault, text) for text in faults), faults


def test_a_clip_has_neighbors_and_media_in_its_modalities_alone(mixed: Path, tmp_path: Path):
    audit = audit_of(mixed)
    for modality, member in (("visual", "video"), ("audio", "audio")):
        ids, _ = audit.neighbors[0][modality]
        has_modality = audit.split.has_modality(modality)
        assert (ids[~has_modality] == -1).all() and (ids[has_modality] >= 0).all()
        assert has_modality[ids[has_modality]].all(), member
    write_page(audit, tmp_path / "page.html", 48)
    html = (tmp_path / "page.html").read_text()
    for medium, modality in (("frames", "visual"), ("audio", "audio")):
        shown = {int(number) for number in re.findall(rf'<script type="text/plain" id="{medium}(\d+)">', html)}
        assert shown == set(np.flatnonzero(audit.split.has_modality(modality)).tolist())
