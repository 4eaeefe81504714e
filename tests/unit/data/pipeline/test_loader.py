import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config.errors import UserError
from distav.config.schema import AugmentConfig, DataConfig
from distav.data.annotations.labels import load_labels
from distav.data.dataset import ShardedDataset
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.decoder_selection import Decoder
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import PADDING
from tests.conftest import make_shards

CPU = torch.device("cpu")
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)


def loader(root: Path, batch: int, augment: AugmentConfig | None = None, split: str = "train") -> Loader:
    return Loader(ShardedDataset.open(root).split(split), DATA, augment, 0, batch, CPU)


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "set"))


def test_a_view_of_a_sample_is_the_same_in_any_batch(tiny_shards: Path):
    whole = loader(tiny_shards, 6, AugmentConfig()).load(np.arange(6), epoch=3)
    part = loader(tiny_shards, 2, AugmentConfig()).load(np.array([4, 1]), epoch=3)
    assert torch.equal(whole.seeds[[4, 1]], part.seeds)
    for name, fed in part.media.items():
        assert torch.equal(whole.media[name][[4, 1]], fed)
    later = loader(tiny_shards, 6, AugmentConfig()).load(np.arange(6), epoch=4)
    frames, sound = whole.media["frames"], whole.media["audio"]
    assert not torch.equal(frames, later.media["frames"]) and not torch.equal(whole.seeds, later.seeds)
    assert frames.shape == (6, 3, 24, 24, 3) and frames.dtype == torch.uint8
    assert sound.shape == (6, 4000) and 0.01 < sound.abs().max() <= 1.1


def test_views_stay_within_their_bounds(tiny_shards: Path):
    split = ShardedDataset.open(tiny_shards).split("train")
    viewer = ClipTransformSampler(split, DATA, AugmentConfig(audio_shift_s=0.3, crop_area_min=0.3), 0)
    plain = ClipTransformSampler(split, DATA, None, 0)
    views = [viewer.sample(sample, epoch) for sample in range(40) for epoch in range(5)]
    assert all(0 <= view.start_frame <= 3 for view in views)
    assert all((view.crop >= 0).all() and (view.crop <= 1).all() for view in views)
    areas = [(view.crop[2] - view.crop[0]) * (view.crop[3] - view.crop[1]) for view in views]
    assert min(areas) > 0.29 and max(areas) > 0.8
    assert 0.3 < np.mean([view.flip for view in views]) < 0.7
    for view in views:
        centred = (view.start_frame + 2.5) / 8 - 0.25
        kept_inside = min(max(centred, 0), 0.5)
        assert abs(view.audio_start / 8000 - kept_inside) <= 0.3 + 1e-3
    wide = ClipTransformSampler(
        replace(split, columns=split.columns | {"width": split.columns["width"] * 2}), DATA, None, 0
    )
    assert wide.sample(0, 0).crop.tolist() == [0, 0.25, 1, 0.75]
    squashed = ClipTransformSampler(wide.split, replace(DATA, squash=True), None, 0)
    assert squashed.sample(0, 0).crop.tolist() == [0, 0, 1, 1]
    middle = plain.sample(0, 9)
    assert (middle.start_frame, middle.flip, middle.gain) == (1, False, 1.0)


def test_the_graph_gives_what_pyav_and_soundfile_give(tiny_shards: Path):
    import io

    import av
    import soundfile

    reader = loader(tiny_shards, 1)
    batch = reader.load(np.array([5]), 0)
    member = reader._read(5)
    assert member is not None
    with av.open(io.BytesIO(member["video"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    expected = np.stack([frames[1], frames[3], frames[5]]).astype(int)
    shown = batch.media["frames"][0].numpy().astype(int)
    assert np.abs(shown - expected).mean() < 4  # chroma is upsampled differently
    sound, _ = soundfile.read(io.BytesIO(member["audio"]), dtype="float32")
    start = reader.transform_sampler.sample(5, 0).audio_start
    np.testing.assert_allclose(batch.media["audio"][0].numpy(), sound[start : start + 4000], atol=1e-4)


def test_a_shift_past_the_end_is_silence(tiny_shards: Path):
    reader = loader(tiny_shards, 1)
    member, view = reader._read(0), reader.transform_sampler.sample(0, 0)
    assert member is not None
    object.__setattr__(view, "audio_start", -1000)
    sound = reader.pipeline.run([member], [view])["audio"]
    assert (sound[0, :1000] == 0).all() and sound[0, 1000:].abs().max() > 0


def damage(root: Path, sample: int, kind: str) -> None:
    split = ShardedDataset.open(root).split("train")
    shard = split.shards[int(split.columns["shard"][sample])]
    content = bytearray(shard.read_bytes())
    content[int(split.columns[f"{kind}_offset"][sample]) + 200] ^= 0x10
    shard.write_bytes(content)


def test_an_altered_member_is_masked_and_named_and_harms_no_other(copied: Path):
    clean = loader(copied, 4).load(np.arange(4), 0)
    damage(copied, 2, "video")
    damage(copied, 3, "audio")
    reader = loader(copied, 4)
    batch = reader.load(np.arange(4), 0)
    assert batch.valid.tolist() == [True, True, False, False]
    for name, fed in batch.media.items():
        assert torch.equal(fed[:2], clean.media[name][:2])
    assert set(reader.quarantine.reasons) == {2, 3}
    assert "video altered in train-000000.tar" in reader.quarantine.reasons[2]
    assert "audio altered" in reader.quarantine.reasons[3]


def test_a_batch_of_bad_samples_alone_keeps_its_length(copied: Path):
    damage(copied, 0, "video")
    damage(copied, 1, "video")
    batch = loader(copied, 2).load(np.arange(2), 0)
    assert batch.valid.tolist() == [False, False] and batch.media["frames"].shape[0] == 2


def test_a_clip_that_dali_refuses_is_found_out_and_masked(copied: Path):
    reader = loader(copied, 3)
    whole = reader._read

    def read(sample: int):
        member = whole(sample)
        return member | {"video": b"no video at all" * 20} if sample == 1 else member

    reader._read = read  # type: ignore[method-assign]
    batch = reader.load(np.array([0, 1, 2]), 0)
    assert batch.valid.tolist() == [True, False, True]
    assert "not decodable" in reader.quarantine.reasons[1]
    assert reader.load(np.array([0, 2, 3]), 0).valid.all()


def test_a_shard_that_goes_away_is_named(copied: Path):
    reader = loader(copied, 2)
    (copied / "train-000001.tar").unlink()
    batch = reader.load(np.array([0, 50]), 0)
    assert batch.valid.tolist() == [True, False]
    assert "train-000001.tar" in reader.quarantine.reasons[50]


def test_padding_is_masked_and_not_bad(tiny_shards: Path):
    reader = loader(tiny_shards, 3)
    assert reader.load(np.array([3, PADDING, PADDING]), 0).valid.tolist() == [True, False, False]
    assert not reader.quarantine.reasons


def test_batches_come_in_order_and_errors_reach_the_caller(tiny_shards: Path):
    reader = loader(tiny_shards, 2)
    plan = [(np.array([2 * number, 2 * number + 1]), 0) for number in range(5)]
    assert [batch.ids.tolist() for batch in reader.batches(plan)] == [ids.tolist() for ids, _ in plan]
    with pytest.raises(IndexError):
        list(reader.batches([(np.array([0, 10**6]), 0)]))


@pytest.mark.parametrize("codec", [pytest.param("vp9", marks=pytest.mark.long), "h264"])
def test_other_codecs_go_through_the_same_graph(codec: str, tmp_path: Path):
    for name in ("mjpeg", codec):
        make_shards(
            "synthetic", tmp_path / name, "--train-clips=6", "--test-clips=1", f"--codec={name}", "--short-side=32"
        )
    first, second = (loader(tmp_path / name, 6) for name in ("mjpeg", codec))
    assert second.pipeline.route.decoder is (Decoder.pyav if codec == "h264" else Decoder.video)
    ids = np.arange(6)
    one, other = (each.load(ids, 0).media["frames"].int() for each in (first, second))
    assert second.load(ids, 0).valid.all()
    assert (one - other).abs().float().mean() < 12


def test_webdataset_reads_the_shards(tiny_shards: Path):
    import webdataset

    samples = list(webdataset.WebDataset(str(tiny_shards / "train-000000.tar"), shardshuffle=False))
    assert len(samples) == 40 and {"avi", "flac", "json"} <= set(samples[0])
    facts = json.loads(samples[7]["json"])
    assert facts["id"] == 7 and facts["frames"] == 8 and facts["sample_rate_hz"] == 8000


def test_dali_reads_the_shards_by_their_index(tiny_shards: Path):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def graph():
        return tuple(
            fn.readers.webdataset(
                paths=[str(tiny_shards / "train-000000.tar")],
                index_paths=[str(tiny_shards / "train-000000.idx")],
                ext=["avi", "json"],
            )
        )

    _, facts = graph().run()
    assert [json.loads(bytes(facts.at(row)))["id"] for row in range(4)] == [0, 1, 2, 3]


def test_broken_sets_are_named(copied: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no manifest.json"):
        ShardedDataset.open(tmp_path)
    shards = ShardedDataset.open(copied)
    with pytest.raises(UserError, match="data.train_split=trian .* 'train'"):
        shards.split("trian")
    tar = copied / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(UserError, match=r"train-000001.tar: \d+ bytes, expected"):
        shards.split("train")
    (copied / "index.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="index.parquet has 8 bytes"):
        shards.split("test")


def test_a_users_labels_replace_the_given_ones(tiny_shards: Path, tmp_path: Path):
    shards = ShardedDataset.open(tiny_shards)
    split = shards.split("train")
    given = load_labels(shards, split).given
    table = tmp_path / "mine.csv"
    table.write_text("key,label\ntrain-000000003,disc+tone\n")
    replaced = load_labels(shards, split, str(table)).given
    assert shards.classes[replaced[3]] == "disc+tone"
    assert np.array_equal(np.delete(replaced, 3), np.delete(given, 3))
    table.write_text("key,label\ntrain-000000003,disk+tone\n")
    with pytest.raises(UserError, match=r"unknown class 'disk\+tone'.*'disc\+tone'"):
        load_labels(shards, split, str(table))
    table.write_text("id,label\n999,disc+tone\n")
    with pytest.raises(UserError, match="999"):
        load_labels(shards, split, str(table))
    table.write_text("name,label\nx,y\n")
    with pytest.raises(UserError, match="needs `id` or `key`"):
        load_labels(shards, split, str(table))
