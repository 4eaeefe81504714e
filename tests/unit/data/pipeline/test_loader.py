import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distav.config.errors import UserError
from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import MEMBERS, ShardedDataset
from distav.data.pipeline.augmentation import ClipTransformSampler
from distav.data.pipeline.decoder_selection import Decoder
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.sampler import PADDING
from tests.conftest import make_shards
from tests.helpers.modalities import members_of, mixed_shards, write_mixed_folder

CPU = torch.device("cpu")
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)


def loader(root: Path, batch: int, augment: AugmentConfig | None = None, split: str = "train") -> Loader:
    return Loader(ShardedDataset.open(root).split(split), DATA, augment, 0, batch, CPU)


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "dataset"))


def test_augmented_sample_is_the_same_in_any_batch(tiny_shards: Path):
    full = loader(tiny_shards, 6, AugmentConfig()).load(np.arange(6), epoch=3)
    part = loader(tiny_shards, 2, AugmentConfig()).load(np.array([4, 1]), epoch=3)
    assert torch.equal(full.seeds[[4, 1]], part.seeds)
    for name, values in part.media.items():
        assert torch.equal(full.media[name][[4, 1]], values)
    later = loader(tiny_shards, 6, AugmentConfig()).load(np.arange(6), epoch=4)
    frames, audio = full.media["frames"], full.media["audio"]
    assert not torch.equal(frames, later.media["frames"]) and not torch.equal(full.seeds, later.seeds)
    assert frames.shape == (6, 3, 24, 24, 3) and frames.dtype == torch.uint8
    assert audio.shape == (6, 4000) and 0.01 < audio.abs().max() <= 1.1


def test_rows_of_a_batch_may_have_epochs_of_their_own(tiny_shards: Path):
    repeated = loader(tiny_shards, 3, AugmentConfig()).load(np.array([4, 4, 1]), epoch=np.array([3, 3 + 2**32, 0]))
    for row, (sample, epoch) in enumerate([(4, 3), (4, 3 + 2**32), (1, 0)]):
        alone = loader(tiny_shards, 1, AugmentConfig()).load(np.array([sample]), epoch)
        assert torch.equal(repeated.seeds[row], alone.seeds[0])
        assert all(torch.equal(repeated.media[name][row], values[0]) for name, values in alone.media.items())
    frames, audio = repeated.media["frames"], repeated.media["audio"]
    assert repeated.seeds[0] != repeated.seeds[1]
    assert not torch.equal(frames[0], frames[1]) and not torch.equal(audio[0], audio[1])


def test_transforms_stay_within_their_limits(tiny_shards: Path):
    split = ShardedDataset.open(tiny_shards).split("train")
    sampler = ClipTransformSampler(split, DATA, AugmentConfig(audio_shift_s=0.3, crop_area_min=0.3), 0)
    transforms = [sampler.sample(sample, epoch) for sample in range(40) for epoch in range(5)]
    crops = [transform.crop for transform in transforms]
    assert all(0 <= transform.start_frame <= 3 for transform in transforms)
    assert all((crop >= 0).all() and (crop <= 1).all() for crop in crops)
    areas = [(crop[2] - crop[0]) * (crop[3] - crop[1]) for crop in crops]
    assert min(areas) > 0.29 and max(areas) > 0.8
    assert 0.3 < np.mean([transform.flip for transform in transforms]) < 0.7
    for transform in transforms:
        centered = (transform.start_frame + 2.5) / 8 - 0.25
        inside = min(max(centered, 0), 0.5)
        assert abs(transform.audio_start / 8000 - inside) <= 0.3 + 1e-3


def test_without_augmentation_the_center_of_a_clip_is_used(tiny_shards: Path):
    split = ShardedDataset.open(tiny_shards).split("train")
    center = ClipTransformSampler(split, DATA, None, 0).sample(0, 9)
    assert (center.start_frame, center.flip, center.gain) == (1, False, 1.0)
    wide = replace(split, columns=split.columns | {"width": split.columns["width"] * 2})
    assert ClipTransformSampler(wide, DATA, None, 0).sample(0, 0).crop.tolist() == [0, 0.25, 1, 0.75]
    squashed = ClipTransformSampler(wide, replace(DATA, squash=True), None, 0)
    assert squashed.sample(0, 0).crop.tolist() == [0, 0, 1, 1]


def test_pipeline_equals_pyav_and_soundfile(tiny_shards: Path):
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
    decoded = batch.media["frames"][0].numpy().astype(int)
    assert np.abs(decoded - expected).mean() < 4  # Chroma is upsampled differently.
    waveform, _ = soundfile.read(io.BytesIO(member["audio"]), dtype="float32")
    start = reader.transform_sampler.sample(5, 0).audio_start
    np.testing.assert_allclose(batch.media["audio"][0].numpy(), waveform[start : start + 4000], atol=1e-4)


def test_audio_before_the_beginning_of_a_clip_is_silence(tiny_shards: Path):
    reader = loader(tiny_shards, 1)
    members = reader._read(0)
    assert members is not None and reader.transform_sampler is not None
    transform = replace(reader.transform_sampler.sample(0, 0), audio_start=-1000)
    audio = reader.pipeline.run([members], [transform])["audio"]
    assert (audio[0, :1000] == 0).all() and audio[0, 1000:].abs().max() > 0


def damage(root: Path, sample: int, member: str) -> None:
    split = ShardedDataset.open(root).split("train")
    shard = split.shards[int(split.columns["shard"][sample])]
    content = bytearray(shard.read_bytes())
    content[int(split.columns[f"{member}_offset"][sample]) + 200] ^= 0x10
    shard.write_bytes(content)


def test_altered_members_are_quarantined_without_changing_other_samples(copied: Path):
    clean = loader(copied, 4).load(np.arange(4), 0)
    damage(copied, 2, "video")
    damage(copied, 3, "audio")
    reader = loader(copied, 4)
    batch = reader.load(np.arange(4), 0)
    assert batch.valid.tolist() == [True, True, False, False]
    for name, values in batch.media.items():
        assert torch.equal(values[:2], clean.media[name][:2])
    assert set(reader.quarantine.reasons) == {2, 3}
    assert "video altered in train-000000.tar" in reader.quarantine.reasons[2]
    assert "audio altered" in reader.quarantine.reasons[3]


def test_batch_of_corrupt_samples_keeps_its_length(copied: Path):
    damage(copied, 0, "video")
    damage(copied, 1, "video")
    batch = loader(copied, 2).load(np.arange(2), 0)
    assert batch.valid.tolist() == [False, False] and batch.media["frames"].shape[0] == 2


def test_clip_that_dali_cannot_decode_is_quarantined(copied: Path):
    reader = loader(copied, 3)
    original = reader._read

    def read(sample: int):
        members = original(sample)
        return members | {"video": b"no video at all" * 20} if sample == 1 else members

    reader._read = read  # type: ignore[method-assign]
    batch = reader.load(np.array([0, 1, 2]), 0)
    assert batch.valid.tolist() == [True, False, True]
    assert "not decodable" in reader.quarantine.reasons[1]
    assert reader.load(np.array([0, 2, 3]), 0).valid.all()


def test_samples_of_a_deleted_shard_are_quarantined(copied: Path):
    reader = loader(copied, 2)
    (copied / "train-000001.tar").unlink()
    batch = reader.load(np.array([0, 50]), 0)
    assert batch.valid.tolist() == [True, False]
    assert "train-000001.tar" in reader.quarantine.reasons[50]


def test_padding_is_masked_but_not_quarantined(tiny_shards: Path):
    reader = loader(tiny_shards, 3)
    assert reader.load(np.array([3, PADDING, PADDING]), 0).valid.tolist() == [True, False, False]
    assert not reader.quarantine.reasons


def test_batches_are_ordered_and_errors_reach_the_caller(tiny_shards: Path):
    reader = loader(tiny_shards, 2)
    plan = [(np.array([2 * number, 2 * number + 1]), 0) for number in range(5)]
    assert [batch.ids.tolist() for batch in reader.batches(plan)] == [ids.tolist() for ids, _ in plan]
    with pytest.raises(IndexError):
        list(reader.batches([(np.array([0, 10**6]), 0)]))


@pytest.mark.parametrize("codec", [pytest.param("vp9", marks=pytest.mark.long), "h264"])
def test_codecs_give_similar_frames(codec: str, tmp_path: Path):
    for name in ("mjpeg", codec):
        make_shards(
            "synthetic", tmp_path / name, "--train-clips=6", "--test-clips=1", f"--codec={name}", "--short-side=32"
        )
    first, second = (loader(tmp_path / name, 6) for name in ("mjpeg", codec))
    assert second.pipeline.route.decoder is (Decoder.pyav if codec == "h264" else Decoder.video)
    ids = np.arange(6)
    expected, batch = first.load(ids, 0), second.load(ids, 0)
    assert batch.valid.all()
    assert (expected.media["frames"].int() - batch.media["frames"].int()).abs().float().mean() < 12


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


def test_invalid_datasets_are_reported(copied: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no manifest.json"):
        ShardedDataset.open(tmp_path)
    shards = ShardedDataset.open(copied)
    with pytest.raises(UserError, match="data.train_split=trian .* 'train'"):
        shards.split("trian")
    tar = copied / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(UserError, match=r"train-000001.tar: \d+ bytes, expected"):
        shards.split("train")
    (copied / "index.parquet").write_bytes(b"invalid!")
    with pytest.raises(UserError, match="index.parquet has 8 bytes"):
        shards.split("test")


@pytest.mark.parametrize("codec", ["mjpeg", "vp9", "h264"])
def test_a_missing_modality_is_marked_and_zero(codec: str, tmp_path: Path):
    files = write_mixed_folder(tmp_path / "files", ("cat",))
    split = ShardedDataset.open(mixed_shards(files, tmp_path / "shards", "--short-side=32", f"--codec={codec}")).split(
        "train"
    )
    mixed_loader = Loader(split, DATA, AugmentConfig(), 0, len(split), CPU)
    batch = mixed_loader.load(np.append(np.arange(len(split) - 1), PADDING), epoch=0)
    assert batch.valid.tolist() == [True] * (len(split) - 1) + [False] and not mixed_loader.quarantine.reasons
    for row, source in enumerate(split.sources[:-1]):
        members = members_of(source)
        for modality, media in (("visual", "frames"), ("audio", "audio")):
            present = MEMBERS[modality] in members
            assert bool(batch.present[modality][row]) == present
            assert present or not batch.media[media][row].any()
    assert all(
        batch.media[media][batch.present[name]].any() for name, media in (("visual", "frames"), ("audio", "audio"))
    )
    assert not batch.present["visual"][-1] and not batch.present["audio"][-1]
    mixed_loader.close()
