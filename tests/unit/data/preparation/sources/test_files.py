"""Lists and directories of media files: what is read, what is skipped and reported, and what is an error."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset
from distav.data.files import report_os_errors
from distav.data.preparation.candidates import describe_candidates, list_candidates, similar_names
from distav.data.preparation.encode_workers import _encode_chunk
from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.output_dir import argument_name, describe_difference, read_result, write_rejected
from distav.data.preparation.sources.files import ClipList, MediaFiles, VideoFolder
from distav.tools.make_shards import main


def write_list(folder: Path, content: str) -> Path:
    path = folder / "clips.csv"
    path.write_text(content)
    return path


def test_cells_of_a_list_are_stripped(tmp_path: Path):
    path = write_list(tmp_path, 'path,label,start_s,end_s,split\n a.mp4 ,"dog ", 1.5 ,4,\nb.mp4,cat,,,val\n')
    assert ClipList(path).candidates() == [
        ClipSource("a.mp4", "dog", "train", 1.5, 4.0),
        ClipSource("b.mp4", "cat", "val"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.mp4,dog,,,../evil", "split '../evil'; allowed in names of splits: letters, digits, _ and -"),
        ("a.mp4,dog,,,trian", "split 'trian'; allowed: train, val, test. Did you mean 'train'.* --splits trian"),
        ("a.mp4,,,,", "label is empty"),
        (",dog,,,", "path is empty"),
        ("a.mp4,dog,nan,,", "start_s 'nan'; allowed: seconds, 0 or more"),
        ("a.mp4,dog,,inf,", "end_s 'inf'; allowed: seconds, 0 or more"),
        ("a.mp4,dog,-1,2,", "start_s '-1'; allowed"),
        ('a.mp4,dog,"1,5",2,', "start_s '1,5'; allowed: seconds, 0 or more, with a decimal point"),
        ("a.mp4,dog,2,2,", "start_s 2, end_s 2; allowed: an end_s after start_s"),
    ],
)
def test_invalid_rows_of_a_list_are_reported(tmp_path: Path, row: str, message: str):
    path = write_list(tmp_path, f"path,label,start_s,end_s,split\nb.mp4,dog,,,train\n{row}\n")
    with pytest.raises(UserError, match=f"clips.csv, line 3: {message}"):
        ClipList(path).candidates()


def test_other_names_of_splits_have_to_be_listed(tmp_path: Path):
    path = write_list(tmp_path, "path,label,split\na.mp4,dog,dev\n")
    assert ClipList(path, ("dev",)).candidates()[0].split == "dev"
    with pytest.raises(UserError, match="--splits: 'a/b'; allowed in names of splits"):
        ClipList(path, ("a/b",)).candidates()


def test_similar_classes_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_list(tmp_path, "path,label\na.mp4,Dog\nb.mp4,dog\nc.mp4,cat\n")
    with caplog.at_level(logging.WARNING, "distav"):
        list_candidates(ClipList(path), tmp_path / "out")
    assert "differ only in case, whitespace or Unicode form: 'Dog'/'dog'" in caplog.text
    assert similar_names(["fire alarm", "fire  alarm", "cat"]) == [["fire  alarm", "fire alarm"]]
    for other in ("cafe\u0301", "caf\u00e9\u200b", "caf\u00e9\u00a0"):
        assert similar_names(["caf\u00e9", other]) == [sorted(["caf\u00e9", other])]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Write a directory of classes in which some paths cannot be used."""
    root = tmp_path / "in"
    for name in ("dog", "empty", ".ipynb_checkpoints", "dog/.cache"):
        (root / name).mkdir(parents=True, exist_ok=True)
        if name != "empty":
            (root / name / "a.mp4").write_text("no video")
    (root / "dog" / ".hidden.mp4").touch()
    (root / "dog" / "gone.mp4").symlink_to("nowhere")
    (root / "dog" / "linked").symlink_to(root / "empty", target_is_directory=True)
    (root / "list.txt").touch()
    return root


def test_hidden_entries_are_skipped_and_unused_ones_are_reported(tree: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "distav"):
        candidates = VideoFolder(tree, 0.0).candidates()
    assert [(candidate.source, candidate.label) for candidate in candidates] == [("dog/a.mp4", "dog")]
    for part in (
        "1 dangling link (dog/gone.mp4)",
        "1 link to a directory (dog/linked)",
        "1 class directory without files (empty)",
        "1 file outside of the class directories (list.txt)",
    ):
        assert part in caplog.text
    assert [candidate.source for candidate in MediaFiles(tree).candidates()] == ["dog/a.mp4", "list.txt"]


def test_a_link_to_a_directory_above_it_is_no_class(tree: Path, caplog: pytest.LogCaptureFixture):
    for name, target in (("self", "."), ("above", "..")):
        (tree / name).symlink_to(target, target_is_directory=True)
    (tree / "linked").symlink_to("dog", target_is_directory=True)
    with caplog.at_level(logging.WARNING, "distav"):
        labels = {candidate.label for candidate in VideoFolder(tree, 0.0).candidates()}
    assert labels == {"dog", "linked"}
    assert "2 links to a directory above them (above, self)" in caplog.text


@pytest.mark.parametrize("name", [".", "out", "dog/out"])
def test_a_dataset_in_the_directory_of_its_source_is_rejected(tree: Path, name: str):
    with pytest.raises(UserError, match="the directory of the source; choose a directory outside of it"):
        list_candidates(VideoFolder(tree), tree / name)


def test_names_that_are_not_utf8_are_stored_with_escapes(tree: Path, tmp_path: Path):
    os.rename(tree / "dog" / "a.mp4", os.path.join(os.fsencode(tree), b"dog", b"caf\xe9.mp4"))
    source = VideoFolder(tree, 0.0)
    (candidate,) = source.candidates()
    assert candidate.source == "dog/caf\\xe9.mp4"
    with pytest.raises(RejectedClip, match="not a video"):  # The file is found.
        next(source.clips(candidate, Encoding(), np.random.default_rng(0)))
    assert describe_candidates([candidate]).startswith("1 candidates, SHA-256 ")
    (tmp_path / ".work").mkdir()
    write_rejected(tmp_path, [{"path": "\udce9", "start_s": 0, "end_s": None, "label": "dog", "reason": "x"}])
    assert "\\udce9" in (tmp_path / "rejected.csv").read_text()


def test_changed_content_of_a_source_changes_its_description():
    first, second = ClipSource("a.mp4", "dog", "train"), ClipSource("a.mp4", "dog", "test")
    assert describe_candidates([first]) != describe_candidates([second])


def test_a_complete_dataset_of_another_list_or_option_is_reported(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = ShardedDataset.open(tiny_shards).manifest["recipe"]
    with pytest.raises(UserError, match=r"\(content of the source: 120 candidates, .* recorded, 1 can"):
        read_result(tiny_shards, recipe | {"source_content": "1 candidates"})
    options = ["--train-clips=96", "--test-clips=24", "--label-noise=symmetric:0.25", "--correspondence-noise=0.25",
               "--shard-samples=40", "--short-side=24"]  # fmt: skip
    assert main(["synthetic", str(tiny_shards), *options, "--codec=vp9"]) == 1
    assert "(--codec: mjpeg recorded, vp9 requested); choose another directory, or" in capsys.readouterr().err
    assert main(["synthetic", str(tiny_shards), *options, "--label-noise="]) == 1
    assert "(--label-noise: symmetric:0.25 recorded, nothing requested)" in capsys.readouterr().err
    assert main(["synthetic-multi", str(tiny_shards), "--missing-labels=0.2:0.4"]) == 1
    assert "(COMMAND: synthetic recorded, synthetic-multi requested)" in capsys.readouterr().err
    rates, rate = (
        {"config": {"missing_labels": {"type": "ClassRates", "first": 0.2, "last": last}}} for last in (0.4, 0.2)
    )
    assert describe_difference(rates, rate) == "--missing-labels: 0.2:0.4 recorded, 0.2 requested"
    assert argument_name("config.encoding.sample_rate_hz") == "--sample-rate"
    assert argument_name("config.label_noise.rate") == "--label-noise"
    assert argument_name("config.--decisions") == "content of --decisions"
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest.json is not valid JSON .*; choose another directory or delete it"):
        read_result(tmp_path, recipe)


@pytest.mark.parametrize("option", ["--fps", "--clip-s", "--correspondence-noise"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_numbers_that_are_not_finite_are_reported(option: str, value: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["synthetic", "out", f"{option}={value}"])
    assert f"argument {option}: '{value}'" in capsys.readouterr().err


def test_a_full_disk_is_reported(tmp_path: Path):
    with pytest.raises(UserError, match="No space left on device; free some space and rerun the same command"):
        with report_os_errors(tmp_path), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    with pytest.raises(UserError, match="rerun the same command to resume"), report_os_errors(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class FullDisk(VideoFolder):
    """Ends with the error of a full disk after the first clip."""

    def clips(self, candidate: ClipSource, encoding: Encoding, rng: np.random.Generator) -> Iterator[Clip]:
        yield Clip(np.zeros((8, 16, 16, 3), np.uint8), np.zeros(8000, np.float32))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_incomplete_file_does_not_remain_on_a_full_disk(tree: Path, tmp_path: Path):
    source, work_dir = FullDisk(tree, 0.0), tmp_path / "work"
    work_dir.mkdir()
    with pytest.raises(OSError, match="No space left"):
        _encode_chunk(source, Encoding(clip_s=1, sample_rate_hz=8000), 0, 0, source.candidates(), work_dir)
    assert list(work_dir.iterdir()) == []


def test_an_output_path_that_is_a_file_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["synthetic", str(tmp_path / "out"), "--train-clips=1", "--test-clips=1"])
    assert "is a file; give a directory" in capsys.readouterr().err
    assert main(["synthetic", str(tmp_path / "out" / "below"), "--train-clips=1", "--test-clips=1"]) == 1
    error = capsys.readouterr().err
    assert "cannot be written" in error and "Traceback" not in error
