"""The published lists of datasets as sources, in the published formats."""

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile

from distav.config.errors import UserError
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.decoding import decode_clip
from distav.data.pipeline.reader import ShardReader
from distav.data.preparation.sources.published.actions import HMDB51Lists, UCF101Lists
from distav.data.preparation.sources.published.listed_clips import PublishedList
from distav.data.preparation.sources.published.youtube import (
    KINETICS_SOUNDS,
    AudioSetList,
    KineticsList,
    KineticsSoundsList,
    VGGSoundList,
)
from distav.tools.make_shards import main
from tests.helpers.media import write_media, write_silent

FIRST, SECOND, THIRD = "---g-f_I2yQ", "--PJHxphWEs", "-0_abcdefgh"


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def rows_of(source: PublishedList) -> list[tuple[str, str, str]]:
    return [(candidate.source, candidate.label, candidate.split) for candidate in source.candidates()]


def test_vggsound_becomes_a_dataset_and_missing_files_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table = write(
        tmp_path / "vggsound.csv",
        f"{FIRST},1,people marching,test",
        f'{SECOND},30,"driving motorcycle, moped",train',
        f"{THIRD},0,rain,train",
    )
    (tmp_path / "video").mkdir()
    write_media(tmp_path / "video" / f"{FIRST}_000001.mp4", 2.0)
    write_media(tmp_path / "video" / f"{SECOND}_30.mp4", 2.0)
    out = tmp_path / "shards"
    options = ["--videos", str(tmp_path / "video"), "--clip-s=2", "--short-side=16", "--workers=1"]
    assert main(["vggsound", str(table), str(out), *options]) == 3
    stderr = capsys.readouterr().err
    report = tmp_path / "shards.missing.csv"
    assert f"vggsound: 1 of 3 listed files are missing in {tmp_path / 'video'}: {THIRD}_000000_000010" in stderr
    assert str(report) in stderr
    (row,) = csv.DictReader(report.open())
    assert (row["name"], row["label"], row["split"]) == (f"{THIRD}_000000_000010", "rain", "train")
    assert row["listed_in"] == f"{table}, line 3"
    assert "missing: no file" in (out / "rejected.csv").read_text()
    shards = ShardedDataset.open(out)
    assert shards.classes == ["driving motorcycle, moped", "people marching", "rain"]
    assert (len(shards.split("train")), len(shards.split("test"))) == (1, 1)


def test_untrimmed_videos_are_cut_at_the_listed_interval(tmp_path: Path):
    table = write(tmp_path / "vggsound.csv", f"{FIRST},1,a,test", f"{FIRST},20,b,train")
    videos = touch(tmp_path / "video", f"{FIRST}.webm")
    candidates = VGGSoundList((table,), videos, untrimmed=True).candidates()
    assert [(candidate.start_s, candidate.end_s) for candidate in candidates] == [(1, 11), (20, 30)]
    with pytest.raises(UserError, match="line 2: .* is also the file of .*line 1, another interval.*--untrimmed"):
        VGGSoundList((table,), videos).candidates()


def test_kinetics_lists_of_both_publishers_are_read(tmp_path: Path):
    official = write(
        tmp_path / "train.csv",
        "label,youtube_id,time_start,time_end,split",
        f'"bowling",{FIRST},10,20,train',
    )
    cvdf = write(
        tmp_path / "val.csv",
        "label,youtube_id,time_start,time_end,split,is_cc",
        f"playing guitar,{SECOND},3,13,validate,0",
    )
    videos = touch(
        tmp_path / "k400", f"train/bowling/{FIRST}_000010_000020.mp4", f"val/playing_guitar/{SECOND}_000003_000013.mkv",
        f"other/{SECOND}_000003_000013.mp4",
    )  # fmt: skip
    assert rows_of(KineticsList((official, cvdf), videos)) == [
        (f"train/bowling/{FIRST}_000010_000020.mp4", "bowling", "train"),
        (f"val/playing_guitar/{SECOND}_000003_000013.mkv", "playing guitar", "val"),
    ]
    write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split", f"{FIRST},10,20,test")
    with pytest.raises(UserError, match="test.csv, line 1: column 'label' is missing"):
        KineticsList((tmp_path / "test.csv",), videos).candidates()


def test_kinetics_sounds_has_the_clips_of_its_classes(tmp_path: Path):
    lines = [f"{label},{number:011d},0,10,train" for number, label in enumerate((*KINETICS_SOUNDS, "abseiling"))]
    table = write(tmp_path / "train.csv", "label,youtube_id,time_start,time_end,split", *lines)
    videos = touch(tmp_path / "videos", *(f"{number:011d}_000000_000010.mp4" for number in range(33)))
    source = KineticsSoundsList((table,), videos)
    assert [label for _, label, _ in rows_of(source)] == list(KINETICS_SOUNDS)
    assert len(set(KINETICS_SOUNDS)) == 32 and source.info().classes == sorted(KINETICS_SOUNDS)
    write(table, "label,youtube_id,time_start,time_end,split", *lines[1:])
    with pytest.raises(UserError, match="no clips of 1 of the 32 classes: blowing nose"):
        source.candidates()


def test_audioset_clips_have_several_labels(tmp_path: Path):
    names = write(
        tmp_path / "class_labels_indices.csv",
        "index,mid,display_name",
        '0,/m/09x0r,"Speech"',
        '1,/m/05zppz,"Male speech, man speaking"',
        '2,/t/dd00088,"Gush"',
    )
    header = ["# Segments csv created Sun Mar  5 10:54:31 2017", "# num_ytids=2, num_segs=2, num_unique_labels=3",
              "# YTID, start_seconds, end_seconds, positive_labels"]  # fmt: skip
    train = write(tmp_path / "balanced_train_segments.csv", *header,
                  f'{FIRST}, 30.000, 40.000, "/m/05zppz,/t/dd00088"')  # fmt: skip
    test = write(tmp_path / "eval_segments.csv", *header, f'{SECOND}, 0.000, 10.000, "/m/09x0r"')
    videos = touch(tmp_path / "videos", f"{FIRST}_30000_40000.mp4", f"Y{SECOND}.mp4")
    options = argparse.Namespace(
        lists=[str(train), str(test)], media=videos, untrimmed=False, class_names=None, first_label=False,
        out=tmp_path / "out",
    )  # fmt: skip
    source = AudioSetList.from_options(options)
    assert source.class_names == names and not (tmp_path / "out.missing.csv").exists()
    assert rows_of(source) == [
        (f"{FIRST}_30000_40000.mp4", "Male speech, man speaking|Gush", "train"),
        (f"Y{SECOND}.mp4", "Speech", "test"),
    ]
    assert source.info().multi_label
    assert source.info().classes == ["Speech", "Male speech, man speaking", "Gush"]
    options.first_label = True
    first = AudioSetList.from_options(options)
    assert rows_of(first)[0][1] == "Male speech, man speaking" and not first.info().multi_label
    write(test, *header, f'{SECOND}, 0.000, 10.000, "/m/none"')
    with pytest.raises(UserError, match="eval_segments.csv, line 4: label '/m/none' is not in"):
        source.candidates()
    options.lists = [str(write(tmp_path / "segments.csv", *header))]
    with pytest.raises(UserError, match="segments.csv: the split is not part of the file name; give it as SPLIT="):
        AudioSetList.from_options(options)


def test_ucf101_reads_the_lists_of_a_fold(tmp_path: Path):
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    write(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 Archery")
    write(lists / "trainlist02.txt", "Archery/v_Archery_g08_c01.avi 2")
    write(lists / "testlist02.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    videos = touch(tmp_path / "UCF-101", "Archery/v_Archery_g08_c01.avi", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    source = UCF101Lists((lists,), videos, fold=2)
    assert rows_of(source) == [
        ("Archery/v_Archery_g08_c01.avi", "Archery", "train"),
        ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "ApplyEyeMakeup", "test"),
    ]
    assert source.info().classes == ["ApplyEyeMakeup", "Archery"]
    with pytest.raises(UserError, match="trainlist01.txt: no such file"):
        UCF101Lists((lists,), videos, fold=1).candidates()
    write(lists / "trainlist02.txt", "Archery/v_Archery_g08_c01.avi 1")
    with pytest.raises(UserError, match="trainlist02.txt, line 1: .*as in classInd.txt: Archery 2"):
        source.candidates()


def test_hmdb51_reads_the_used_videos_of_a_fold(tmp_path: Path):
    lists = tmp_path / "splits"
    lists.mkdir()
    names = [f"April_09_brush_hair_u_nm_np1_ba_goo_{number}" for number in range(3)]
    write(lists / "brush_hair_test_split1.txt", *(f"{name}.avi {use} " for name, use in zip(names, "120", strict=True)))
    write(lists / "wave_test_split2.txt", "other.avi 1")
    videos = touch(tmp_path / "hmdb51", *(f"brush_hair/{name}.avi" for name in names))
    assert rows_of(HMDB51Lists((lists,), videos)) == [
        (f"brush_hair/{names[0]}.avi", "brush_hair", "train"),
        (f"brush_hair/{names[1]}.avi", "brush_hair", "test"),
    ]
    write(lists / "brush_hair_test_split1.txt", f"{names[0]}.avi 3")
    with pytest.raises(UserError, match="brush_hair_test_split1.txt, line 1: .*1 .train., 2 .test. or 0"):
        HMDB51Lists((lists,), videos).candidates()


def write_esc50(folder: Path) -> list[str]:
    """Write ESC-50 in its published layout, with two recordings of five seconds; return list and options."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    table = write(
        folder / "meta" / "esc50.csv",
        "filename,fold,target,category,esc10,src_file,take",
        "1-100032-A-0.wav,1,0,dog,True,100032,A",
        "2-100038-A-14.wav,2,14,chirping_birds,False,100038,A",
    )
    time_s = np.arange(5 * 44100) / 44100
    for name, pitch in (("1-100032-A-0.wav", 440), ("2-100038-A-14.wav", 880)):
        soundfile.write(folder / "audio" / name, 0.5 * np.sin(2 * np.pi * pitch * time_s), 44100)
    return ["esc50", str(table), "--audio", str(folder / "audio"), "--fold=2", "--workers=1"]


def test_esc50_becomes_a_dataset_of_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = write_esc50(tmp_path / "ESC-50")
    out = tmp_path / "shards"
    assert main([*command, str(out)]) == 0
    assert "1 test, 1 train clips written" in capsys.readouterr().out
    shards = ShardedDataset.open(out)
    assert shards.classes == ["chirping_birds", "dog"] and shards.manifest["clip_s"] == 5
    for name, pitch in (("train", 440), ("test", 880)):
        split = shards.split(name)
        assert split.has_modality("audio").all() and not split.has_modality("visual").any()
        assert split.sides == (0, 0)
        frames, waveform = decode_clip(ShardReader(split).read(0))
        assert frames is None and waveform is not None and len(waveform) == 5 * 16000
        assert np.abs(np.fft.rfft(waveform)).argmax() == 5 * pitch
    assert main([*command, str(out)]) == 0  # The complete dataset is recognized.
    assert main([*command, str(tmp_path / "both"), "--modalities=both"]) == 1
    assert "--modalities=both: allowed for this source: any, because its files" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def test_silent_videos_of_ucf101_are_used_if_a_modality_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lists, videos = tmp_path / "ucfTrainTestlist", tmp_path / "UCF-101"
    lists.mkdir()
    write(lists / "classInd.txt", "1 Archery", "2 Bowling")
    write(lists / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 1", "Bowling/v_Bowling_g08_c01.avi 2")
    write(lists / "testlist01.txt", "Archery/v_Archery_g01_c01.avi")
    for name in ("Archery/v_Archery_g08_c01.avi", "Archery/v_Archery_g01_c01.avi", "Bowling/v_Bowling_g08_c01.avi"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (write_silent if "Archery" in name else write_media)(videos / name, 2.0)
    command = ["ucf101", str(lists), "--videos", str(videos), "--short-side=16", "--workers=1"]
    assert main([*command, str(tmp_path / "both")]) == 3
    output = capsys.readouterr().out
    assert "2 candidates rejected (2 no audio); reasons in" in output
    assert "--modalities any accepts clips without video or without audio" in output
    out = tmp_path / "any"
    assert main([*command, str(out), "--modalities=any"]) == 0
    shards = ShardedDataset.open(out)
    assert shards.manifest["recipe"]["config"]["encoding"]["modalities"] == "any"
    train = shards.split("train")
    silent = np.array([source.startswith("Archery") for source in train.sources])
    np.testing.assert_array_equal(train.has_modality("audio"), ~silent)
    assert train.has_modality("visual").all() and shards.split("test").has_modality("visual").all()
    assert not shards.split("test").has_modality("audio").any()
    assert main([*command, str(out)]) == 1  # Clips with both modalities would be another dataset.
    assert "--modalities" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{FIRST},1,a", "line 2: .*needed: 4 cells"),
        (f"{FIRST},x,a,train", "line 2: start and end have to be seconds"),
        (f"{FIRST},-1,a,train", "line 2: start -1"),
        (f"{FIRST},1,a,val", "line 2: split 'val'; allowed: train, test"),
        (f'{FIRST},1,"a,train', "line 2: .*cannot be read"),
        ("", "contains none of the 1 listed files, e.g. "),
    ],
)
def test_errors_name_file_and_line(line: str, message: str, tmp_path: Path):
    table = write(tmp_path / "vggsound.csv", f"{SECOND},1,a,test", line)
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match=message):
        VGGSoundList((table,), tmp_path / "videos").report_missing(tmp_path / "out")
    assert not (tmp_path / "out.missing.csv").exists()
