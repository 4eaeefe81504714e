"""Corrupt data is detected before it is decoded: by `verify`, and by every rank during a run."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from distav.config.errors import UserError
from distav.data import integrity
from distav.data.dataset import ShardedDataset
from distav.data.files import read_table, write_table
from distav.data.pipeline.reader import CorruptSampleError, ShardReader
from distav.data.storage.tar import members_by_key
from distav.tools.inspect_shards.command import main
from tests.conftest import ROOT, make_shards
from tests.helpers.launch import arguments
from tests.helpers.rank_group import RankGroup, run_to_completion


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def inspect(root: Path, *more: str) -> tuple[int, str]:
    """Return the exit status and the output of `inspect_shards.py verify`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main(["verify", str(root), *more])
    return status, output.getvalue()


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def second_shard_cut_after(root: Path, samples: int) -> int:
    """Truncate the second training shard at the start of a sample; return the number of samples that are lost."""
    members = list(members_by_key(root / "train-000001.tar").values())
    os.truncate(root / "train-000001.tar", members[samples][0][1] - 512)
    return len(members) - samples


def test_verify_accepts_a_valid_dataset(shards: Path):
    status, output = inspect(shards)
    assert status == 0 and "label is valid" in output
    tool = [sys.executable, str(ROOT / "tools" / "inspect_shards.py"), "verify", str(shards)]
    assert subprocess.run(tool, check=False, capture_output=True).returncode == 0


def _flip(root: Path, member: int) -> None:
    offset, size = list(members_by_key(root / "train-000000.tar").values())[3][member][1:]
    overwrite(root / "train-000000.tar", offset + size // 2, b"\x00\xff")


def _swap(root: Path) -> None:
    for one, other in (("train-000000", "train-000001"),):
        for ending in (".tar", ".idx"):
            a, b = root / (one + ending), root / (other + ending)
            content = a.read_bytes(), b.read_bytes()
            a.write_bytes(content[1]), b.write_bytes(content[0])


def _rewrite(root: Path, name: str, change) -> None:
    """Change a table and its entry in the manifest, as a faulty program would."""
    write_table(root / name, change(read_table(root / name)))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["tables"][name] = integrity.file_entry(root / name)
    (root / "manifest.json").write_text(json.dumps(manifest))


def _replaced(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    position = table.column_names.index(column)
    return table.set_column(position, column, pa.array(values, table.schema.field(column).type))


def _planted(root: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    path = root / "train-000002.tar"
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    ends = list(members_by_key(path).values())[-1][-1]
    offset = ends[1] + -(-ends[2] // 512) * 512
    overwrite(path, offset, info.tobuf(tarfile.USTAR_FORMAT))


FAULTS = {
    "a flipped byte of a video": (lambda root: _flip(root, 0), "'train-000000003': video altered"),
    "a flipped byte of an audio member": (lambda root: _flip(root, 1), "'train-000000003': audio altered"),
    "a flipped byte of a sample's JSON": (lambda root: _flip(root, 2), "train-000000003.json': not a JSON object"),
    "a removed shard": (lambda root: (root / "train-000001.tar").unlink(), "train-000001.tar: no file"),
    "a truncated shard": (lambda root: second_shard_cut_after(root, 5), "bytes, expected"),
    "swapped shards": (_swap, "train-000000.tar"),
    "a missing DALI index": (lambda root: (root / "train-000000.idx").unlink(), "train-000000.idx: No such file"),
    "the DALI index of another shard": (
        lambda root: shutil.copy(root / "train-000001.idx", root / "train-000000.idx"),
        "does not match train-000000.tar",
    ),
    "a wrong offset": (
        lambda root: _rewrite(root, "index.parquet", lambda table: _replaced(table, "video_offset", 30, 512)),
        "but (512",
    ),
    "a modified index": (
        lambda root: write_table(root / "index.parquet", read_table(root / "index.parquet").slice(1)),
        "index.parquet has",
    ),
    "modified labels": (
        lambda root: overwrite(root / "labels.parquet", 300, b"\xa5\x5a"),
        "labels.parquet has been modified",
    ),
    "unordered ids": (
        lambda root: _rewrite(root, "index.parquet", lambda table: table.slice(1)),
        "do not run from 0 to N-1",
    ),
    "a label of an unknown class": (
        lambda root: _rewrite(root, "labels.parquet", lambda table: _replaced(table, "label", 30, "dragon")),
        "unknown class 'dragon'",
    ),
    "labels for unknown ids": (
        lambda root: _rewrite(root, "labels.parquet", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "or ids in the wrong order",
    ),
    "a pickle": (lambda root: _planted(root, "train-000000095.pkl"), "has an unknown extension"),
    "a member outside": (lambda root: _planted(root, "../evil.json"), "is not of the form key.extension"),
    "an absolute path": (lambda root: _planted(root, "/etc/evil.json"), "is not of the form key.extension"),
    "a link": (lambda root: _planted(root, "train-000000095.npy", tarfile.SYMTYPE), "is not a regular file"),
    "a device": (lambda root: _planted(root, "train-000000095.npy", tarfile.CHRTYPE), "is not a regular file"),
    "a duplicate member": (lambda root: _planted(root, "train-000000095.json"), "occurs twice"),
    "a member of an earlier sample": (lambda root: _planted(root, "train-000000090.npy"), "are not adjacent"),
    "a shard that is not in the manifest": (
        lambda root: shutil.copy(root / "test-000000.tar", root / "train-000003.tar"),
        "is not listed in manifest.json",
    ),
    "a manifest with a path to another directory": (
        lambda root: (root / "manifest.json").write_text(
            (root / "manifest.json").read_text().replace("train-000001.tar", "../train-000001.tar")
        ),
        "plain names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds(shards: Path, fault: str):
    damage, message = FAULTS[fault]
    damage(shards)
    status, output = inspect(shards)
    assert status == 2 and message in output, output


def test_verify_checks_a_table_of_labels(shards: Path, tmp_path: Path):
    (tmp_path / "mine.csv").write_text("id,label\n3,disc+tone\n96,disc+tone\n")
    status, output = inspect(shards, "--labels", str(tmp_path / "mine.csv"))
    assert status == 2 and "does not have the samples of 1 of 2 rows: 96 (line 3); its ids are 0 to" in output


def test_a_shard_damaged_during_a_run_is_quarantined_on_all_ranks(shards: Path, tmp_path: Path):
    command_line = arguments(tmp_path, shards, "data.max_quarantined_fraction=0.5")
    group = RankGroup(2, command_line, tmp_path / "logs")
    group.wait_for(lambda: "step 3/12 phase=contrastive" in group.output())
    lost = second_shard_cut_after(shards, 10)
    assert group.wait() == [0, 0], group.output()[-6000:]
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    reasons = {sample["id"]: sample["reason"] for sample in report["quarantined_samples"]}
    sizes = ShardedDataset.open(shards).manifest["splits"]["train"]["shards"]
    first = sizes[0]["clips"] + 10
    assert sorted(reasons) == list(range(first, first + lost))
    assert all("truncated in train-000001.tar" in reason for reason in reasons.values())


@pytest.mark.long
def test_a_run_over_the_quarantine_limit_stops_and_names_the_samples(shards: Path, tmp_path: Path):
    command_line = arguments(tmp_path, shards)
    group = RankGroup(2, command_line, tmp_path / "logs")
    group.wait_for(lambda: "step 3/12 phase=contrastive" in group.output())
    second_shard_cut_after(shards, 10)
    assert group.wait() == [1, 1]
    assert "training samples are quarantined, more than data.max_quarantined_fraction=0.01" in group.output()
    # With the dataset as it is, the run does not start again; restored, or with a larger limit, it would resume.
    rerun = RankGroup(2, command_line, tmp_path / "again")
    assert rerun.wait() == [1, 1] and "copy the shard again" in rerun.output()


@pytest.mark.long
def test_quarantined_samples_are_reported_for_any_number_of_ranks(shards: Path, tmp_path: Path):
    content = (shards / "train-000000.tar").read_bytes()
    _flip(shards, 0)
    for folder, ranks in (("one", 2), ("two", 1)):
        command_line = arguments(tmp_path / folder, shards, "data.max_quarantined_fraction=0.5")
        run_to_completion(ranks, command_line, tmp_path / folder / "logs")
        report = json.loads((tmp_path / folder / "tiny" / "report.json").read_text())
        assert [sample["id"] for sample in report["quarantined_samples"]] == [3]
    (shards / "train-000000.tar").write_bytes(content)


def mutants(content: bytes, rng: random.Random):
    """Yield the bytes of a member truncated, with flipped bits, with a changed header, and replaced by another file."""
    size = len(content)
    for _ in range(10):
        yield content[: rng.randrange(size)]
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 3, 20))):
            flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
        header = bytearray(content)
        position = rng.randrange(min(64, size))
        header[position] ^= rng.randrange(1, 256)
        yield bytes(header)
        yield rng.choice((b"\x89PNG\r\n\x1a\n", b"MZ", b"RIFF\x00\x00\x00\x00WAVE")) + rng.randbytes(size)


@pytest.mark.parametrize(
    "codec", ["mjpeg", pytest.param("vp9", marks=pytest.mark.long), pytest.param("h264", marks=pytest.mark.long)]
)
def test_every_modified_member_is_detected_and_no_valid_one_is_rejected(tmp_path: Path, codec: str):
    root = tmp_path / codec
    make_shards("synthetic", root, "--train-clips=12", "--test-clips=0", f"--codec={codec}", "--short-side=48")
    split = ShardedDataset.open(root).split("train")
    rng, num_detected, num_mutants = random.Random(codec), 0, 0
    contents = {path: path.read_bytes() for path in split.shards}
    for sample in (2, 7):
        for member in ("video", "audio"):
            offset, size = (int(split.columns[f"{member}_{column}"][sample]) for column in ("offset", "bytes"))
            path = split.shards[int(split.columns["shard"][sample])]
            for mutant in mutants(contents[path][offset : offset + size], rng):
                if mutant[:size] == contents[path][offset : offset + size]:
                    continue
                path.write_bytes(
                    contents[path][:offset] + mutant[:size].ljust(size, b"\0") + contents[path][offset + size :]
                )
                num_mutants += 1
                reader = ShardReader(split)
                try:
                    reader.read(sample)
                except CorruptSampleError:
                    num_detected += 1
                assert all(reader.read(other) for other in range(len(split)) if other != sample)
                reader.close()
                path.write_bytes(contents[path])
    assert num_detected == num_mutants >= 100


@pytest.mark.parametrize("name", ["train-000000000.avi/x", "train-000000000"])
def test_names_without_a_key_and_an_extension_are_rejected(tmp_path: Path, name: str):
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="is not of the form key.extension"):
        members_by_key(tmp_path / "bad.tar")
