"""Damaged data is found before it is decoded, by `verify` beforehand and by every rank alike during a run."""

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
from tests.helpers.team import Team, run_whole


@pytest.fixture
def shards(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def inspect(root: Path, *more: str) -> tuple[int, str]:
    """Exit status of `inspect_shards.py verify`, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(["verify", str(root), *more])
    return status, said.getvalue()


def overwrite(path: Path, place: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def second_shard_cut_after(root: Path, samples: int) -> int:
    """Cut the second training shard at the start of a sample; returns how many of its samples are lost."""
    members = list(members_by_key(root / "train-000001.tar").values())
    os.truncate(root / "train-000001.tar", members[samples][0][1] - 512)
    return len(members) - samples


def test_a_sound_set_is_said_to_be_so(shards: Path):
    status, said = inspect(shards)
    assert status == 0 and "label is valid" in said
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
    """Change a table, and the manifest with it, as a program at fault would have."""
    write_table(root / name, change(read_table(root / name)))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["tables"][name] = integrity.file_entry(root / name)
    (root / "manifest.json").write_text(json.dumps(manifest))


def _replaced(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


def _planted(root: Path, name: str, kind: bytes = tarfile.REGTYPE) -> None:
    path = root / "train-000002.tar"
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
    ends = list(members_by_key(path).values())[-1][-1]
    place = ends[1] + -(-ends[2] // 512) * 512
    overwrite(path, place, info.tobuf(tarfile.USTAR_FORMAT))


FAULTS = {
    "a flipped byte of a picture": (lambda root: _flip(root, 0), "'train-000000003': video altered"),
    "a flipped byte of a sound": (lambda root: _flip(root, 1), "'train-000000003': audio altered"),
    "a flipped byte of a sample's JSON": (lambda root: _flip(root, 2), "train-000000003.json': not a JSON object"),
    "a shard removed": (lambda root: (root / "train-000001.tar").unlink(), "train-000001.tar: no file"),
    "a shard cut at a member": (lambda root: second_shard_cut_after(root, 5), "bytes, expected"),
    "shards swapped": (_swap, "train-000000.tar"),
    "an index of DALI's missing": (lambda root: (root / "train-000000.idx").unlink(), "train-000000.idx: No such file"),
    "an index of DALI's of another shard": (
        lambda root: shutil.copy(root / "train-000001.idx", root / "train-000000.idx"),
        "does not match train-000000.tar",
    ),
    "an offset that is another": (
        lambda root: _rewrite(root, "index.parquet", lambda table: _replaced(table, "video_offset", 30, 512)),
        "but (512",
    ),
    "an index that was altered": (
        lambda root: write_table(root / "index.parquet", read_table(root / "index.parquet").slice(1)),
        "index.parquet has",
    ),
    "labels that were altered": (
        lambda root: overwrite(root / "labels.parquet", 300, b"\xa5\x5a"),
        "labels.parquet has been modified",
    ),
    "ids in disorder": (
        lambda root: _rewrite(root, "index.parquet", lambda table: table.slice(1)),
        "do not run from 0 to N-1",
    ),
    "a label for a class that is not there": (
        lambda root: _rewrite(root, "labels.parquet", lambda table: _replaced(table, "label", 30, "dragon")),
        "unknown class 'dragon'",
    ),
    "labels for unknown ids": (
        lambda root: _rewrite(root, "labels.parquet", lambda table: pa.concat_tables([table, table.slice(0, 1)])),
        "or ids in the wrong order",
    ),
    "a member that pickles": (lambda root: _planted(root, "train-000000095.pkl"), "has an unknown extension"),
    "a member outside": (lambda root: _planted(root, "../evil.json"), "is not of the form key.extension"),
    "an absolute member": (lambda root: _planted(root, "/etc/evil.json"), "is not of the form key.extension"),
    "a link": (lambda root: _planted(root, "train-000000095.npy", tarfile.SYMTYPE), "is not a regular file"),
    "a device": (lambda root: _planted(root, "train-000000095.npy", tarfile.CHRTYPE), "is not a regular file"),
    "a member twice": (lambda root: _planted(root, "train-000000095.json"), "occurs twice"),
    "a member of an earlier sample": (lambda root: _planted(root, "train-000000090.npy"), "are not adjacent"),
    "a shard that the manifest does not name": (
        lambda root: shutil.copy(root / "test-000000.tar", root / "train-000003.tar"),
        "is not listed in manifest.json",
    ),
    "a manifest that names a file elsewhere": (
        lambda root: (root / "manifest.json").write_text(
            (root / "manifest.json").read_text().replace("train-000001.tar", "../train-000001.tar")
        ),
        "plain names",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds(shards: Path, fault: str):
    damage, told = FAULTS[fault]
    damage(shards)
    status, said = inspect(shards)
    assert status == 2 and told in said, said


def test_verify_takes_a_table_of_labels_along(shards: Path, tmp_path: Path):
    (tmp_path / "mine.csv").write_text("id,label\n3,disc+tone\n96,disc+tone\n")
    status, said = inspect(shards, "--labels", str(tmp_path / "mine.csv"))
    assert status == 2 and "1 of 2 rows refer to samples that split train of" in said and "does not have: 96" in said


def test_a_shard_damaged_while_the_run_is_on_costs_its_samples_on_all_ranks_alike(shards: Path, tmp_path: Path):
    given = arguments(tmp_path, shards, "data.max_quarantined_fraction=0.5")
    team = Team(2, given, tmp_path / "logs")
    team.wait_for(lambda: "step 3/12 phase=contrastive" in team.said())
    lost = second_shard_cut_after(shards, 10)
    assert team.end() == [0, 0], team.said()[-6000:]
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    skipped = {each["id"]: each["reason"] for each in report["quarantined_samples"]}
    sizes = ShardedDataset.open(shards).manifest["splits"]["train"]["shards"]
    first = sizes[0]["clips"] + 10
    assert sorted(skipped) == list(range(first, first + lost))
    assert all("truncated in train-000001.tar" in reason for reason in skipped.values())


@pytest.mark.long
def test_a_run_over_its_budget_of_bad_samples_stops_and_names_them(shards: Path, tmp_path: Path):
    given = arguments(tmp_path, shards)
    team = Team(2, given, tmp_path / "logs")
    team.wait_for(lambda: "step 3/12 phase=contrastive" in team.said())
    second_shard_cut_after(shards, 10)
    assert team.end() == [1, 1]
    assert "training samples are quarantined, more than data.max_quarantined_fraction=0.01" in team.said()
    # Mended, or with a larger budget, it goes on from its checkpoint; with the set as it is it does not start.
    again = Team(2, given, tmp_path / "again")
    assert again.end() == [1, 1] and "copy the shard again" in again.said()


@pytest.mark.long
def test_damage_goes_on_to_be_known_after_a_resume(shards: Path, tmp_path: Path):
    content = (shards / "train-000000.tar").read_bytes()
    _flip(shards, 0)
    for folder, ranks in (("one", 2), ("two", 1)):
        given = arguments(tmp_path / folder, shards, "data.max_quarantined_fraction=0.5")
        run_whole(ranks, given, tmp_path / folder / "logs")
        report = json.loads((tmp_path / folder / "tiny" / "report.json").read_text())
        assert [each["id"] for each in report["quarantined_samples"]] == [3]
    (shards / "train-000000.tar").write_bytes(content)


def mutants(content: bytes, chance: random.Random):
    """Yield a member's bytes cut short, with bits flipped, with another header, and replaced by a foreign file."""
    size = len(content)
    for _ in range(10):
        yield content[: chance.randrange(size)]
        flipped = bytearray(content)
        for _ in range(chance.choice((1, 3, 20))):
            flipped[chance.randrange(size)] ^= 1 << chance.randrange(8)
        yield bytes(flipped)
        header = bytearray(content)
        place = chance.randrange(min(64, size))
        header[place] ^= chance.randrange(1, 256)
        yield bytes(header)
        yield chance.choice((b"\x89PNG\r\n\x1a\n", b"MZ", b"RIFF\x00\x00\x00\x00WAVE")) + chance.randbytes(size)


@pytest.mark.parametrize(
    "codec", ["mjpeg", pytest.param("vp9", marks=pytest.mark.long), pytest.param("h264", marks=pytest.mark.long)]
)
def test_every_altered_member_is_found_and_no_sound_one_is_refused(tmp_path: Path, codec: str):
    root = tmp_path / codec
    make_shards("synthetic", root, "--train-clips=12", "--test-clips=0", f"--codec={codec}", "--short-side=48")
    split = ShardedDataset.open(root).split("train")
    chance, found, count = random.Random(codec), 0, 0
    whole = {path: path.read_bytes() for path in split.shards}
    for sample in (2, 7):
        for kind in ("video", "audio"):
            place, size = (int(split.columns[f"{kind}_{each}"][sample]) for each in ("offset", "bytes"))
            path = split.shards[int(split.columns["shard"][sample])]
            for mutant in mutants(whole[path][place : place + size], chance):
                if mutant[:size] == whole[path][place : place + size]:
                    continue
                path.write_bytes(whole[path][:place] + mutant[:size].ljust(size, b"\0") + whole[path][place + size :])
                count += 1
                reader = ShardReader(split)
                try:
                    reader.read(sample)
                except CorruptSampleError:
                    found += 1
                others = [each for each in range(len(split)) if each != sample]
                assert all(reader.read(each) for each in others)  # no false alarm
                reader.close()
                path.write_bytes(whole[path])
    assert found == count >= 100


@pytest.mark.parametrize("name", ["train-000000000.avi/x", "train-000000000"])
def test_names_without_a_key_and_an_extension_are_refused(tmp_path: Path, name: str):
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match="is not of the form key.extension"):
        members_by_key(tmp_path / "bad.tar")
