"""Decoder selection, decoded frames, and handling of clips that cannot be decoded."""

import io
import logging
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from distav.config.schema import AugmentConfig, DataConfig
from distav.data.dataset import ShardedDataset, Split
from distav.data.pipeline.augmentation import ClipTransform, ClipTransformSampler
from distav.data.pipeline.avi import jpeg_frames
from distav.data.pipeline.color import change_colors
from distav.data.pipeline.dali import ClipPipeline
from distav.data.pipeline.dali_errors import DeviceError, dali_reason
from distav.data.pipeline.decoder_selection import Decoder, Route, select_decoder
from distav.data.pipeline.loader import Loader
from distav.data.pipeline.reader import DecodeError, Members, ShardReader
from distav.data.pipeline.sampler import PADDING
from distav.data.preparation.encoding import Encoding, encode_video
from tests.conftest import make_shards

CPU = torch.device("cpu")
DATA = DataConfig(num_frames=3, frame_stride=2, frame_size=24, audio_s=0.5)
JPEG, VIDEO, PYAV = Decoder.jpeg, Decoder.video, Decoder.pyav


@pytest.mark.parametrize(
    ("codec", "on_gpu", "sides", "route"),
    [
        ("mjpeg", False, (24, 24), Route(JPEG, False)),
        ("mjpeg", True, (24, 24), Route(JPEG, True)),
        ("mjpeg", True, (256, 456), Route(JPEG, True)),
        ("mjpeg", True, (720, 8000), Route(JPEG, True)),
        ("vp9", False, (256, 456), Route(VIDEO, False)),
        ("vp9", True, (256, 456), Route(VIDEO, True)),
        ("vp9", True, (143, 456), Route(VIDEO, False)),
        ("vp9", True, (256, 4097), Route(VIDEO, False)),
        ("h264", False, (256, 456), Route(PYAV, False)),
        ("h264", True, (256, 456), Route(VIDEO, True)),
        ("h264", True, (143, 456), Route(PYAV, False)),
        ("h264", True, (256, 4097), Route(PYAV, False)),
    ],
)
def test_decoder_depends_on_codec_device_and_size(codec: str, on_gpu: bool, sides: tuple[int, int], route: Route):
    assert select_decoder(codec, on_gpu, sides) == route


def mjpeg(num_frames: int = 5, height: int = 48, width: int = 64) -> bytes:
    smooth = np.linspace(0, 255, height * width).reshape(height, width)
    frames = np.stack([np.roll(np.stack([smooth, smooth.T.reshape(height, width), 255 - smooth], 2), 7 * number, 1)
                       for number in range(num_frames)]).astype(np.uint8)  # fmt: skip
    return encode_video(frames, Encoding("mjpeg", fps=num_frames, short_side=height, clip_s=1.0))


def test_jpeg_frames_equal_demultiplexed_packets():
    content = mjpeg()
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert [frame.tobytes() for frame in jpeg_frames(content, range(5))] == packets
    assert [frame.tobytes() for frame in jpeg_frames(content, [3, 4, 9])] == [packets[3], packets[4], packets[4]]


def test_empty_chunk_repeats_the_previous_frame():
    content = bytearray(mjpeg())
    index = content.rindex(b"idx1") + 8
    movi = content.index(b"movi")
    offset = int.from_bytes(content[index + 16 + 8 : index + 16 + 12], "little")
    for position in (index + 16 + 12, movi + offset + 4):
        content[position : position + 4] = bytes(4)
    first, second, third = jpeg_frames(bytes(content), range(3))
    assert first.tobytes() == second.tobytes() != third.tobytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"no video at all" * 20, "not an AVI file"),
        (lambda content: content[: content.rindex(b"idx1")], "no index"),
        (lambda content: content[: content.rindex(b"idx1") + 8], "no index"),
        (lambda content: content.replace(b"movi00dc", b"movi01wb"), "frame 0 does not start where the AVI index"),
        (lambda content: b"", "not an AVI file"),
    ],
)
def test_files_without_a_valid_index_are_rejected(change, reason: str):
    with pytest.raises(DecodeError, match=reason):
        jpeg_frames(change(mjpeg()), [0, 1])


def _color_twist(frame: np.ndarray, color: np.ndarray) -> np.ndarray:
    pipeline = Pipeline(1, 1, None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    with pipeline:
        source = fn.external_source(name="frame", ndim=3, dtype=types.DALIDataType.UINT8, layout="HWC")
        brightness, contrast, saturation, hue = color.tolist()
        pipeline.set_outputs(
            fn.color_twist(source, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)  # pyright: ignore
        )
    pipeline.build()
    pipeline.feed_input("frame", [frame])
    return pipeline.run()[0].as_array()[0]


@pytest.mark.parametrize("side", [15, 16])
def test_color_changes_equal_color_twist(side: int):
    rng = np.random.default_rng(0)
    color = np.array(
        [[1, 1, 1, 0], [1.3, 0.7, 1.4, 20], [0.6, 1.4, 0.6, -36], [1, 1, 1, 30], [1.4, 1.4, 1.4, 36], [1, 1.4, 1, 0]],
        np.float32,
    )
    frames = rng.integers(0, 256, (len(color), 2, side, 17, 3), np.uint8)
    changed = frames.copy()
    change_colors(changed, color)
    assert np.array_equal(changed[0], frames[0])
    for clip in range(len(color)):
        for actual, before in zip(changed[clip].astype(int), frames[clip], strict=True):
            difference = np.abs(actual - _color_twist(before, color[clip]))
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.fixture(scope="module")
def photo_like(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Rendered clips of 64 x 64 pixels."""
    out = tmp_path_factory.mktemp("shards") / "mjpeg"
    make_shards("synthetic", out, "--train-clips=12", "--test-clips=1", "--short-side=64")
    return ShardedDataset.open(out).split("train")


def _crop_full_frames(members: Members, transform: ClipTransform) -> np.ndarray:
    """Decode full frames, then crop, resize and flip them: [T, S, S, 3]."""
    numbers = [transform.start_frame + 2 * number for number in range(3)]
    images = [np.asarray(Image.open(io.BytesIO(image.tobytes()))) for image in jpeg_frames(members["video"], numbers)]
    pipeline = Pipeline(3, 1, None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    with pipeline:
        source = fn.external_source(name="frame", ndim=3, dtype=types.DALIDataType.UINT8, layout="HWC")
        top, left, bottom, right = transform.crop.tolist()
        resized = fn.resize(source, roi_start=[top, left], roi_end=[bottom, right], roi_relative=True, size=[24, 24],
                            interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)  # fmt: skip
        pipeline.set_outputs(fn.flip(resized, horizontal=int(transform.flip)))
    pipeline.build()
    pipeline.feed_input("frame", images)
    return pipeline.run()[0].as_array()


def test_crop_of_a_decoded_band_equals_crop_of_the_full_frame(photo_like: Split):
    augment = AugmentConfig(crop_area_min=0.08, brightness=0, contrast=0, saturation=0, hue=0)
    sampler, reader = ClipTransformSampler(photo_like, DATA, augment, 0), ShardReader(photo_like)
    transforms = [sampler.sample(sample, epoch) for sample in range(12) for epoch in range(4)]
    clips = [reader.read(sample) for sample in range(12) for _ in range(4)]
    assert min(transform.crop[2] - transform.crop[0] for transform in transforms) < 0.4
    batch = ClipPipeline(DATA, photo_like, 48, CPU).run(clips, transforms)["frames"].numpy()
    for frames, clip, transform in zip(batch, clips, transforms, strict=True):
        assert np.abs(frames.astype(int) - _crop_full_frames(clip, transform)).max() <= 1


def test_image_decoder_and_video_decoder_give_similar_frames(photo_like: Split):
    augment = AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0)
    sampler, reader = ClipTransformSampler(photo_like, DATA, augment, 0), ShardReader(photo_like)
    transforms, clips = (
        [sampler.sample(sample, 0) for sample in range(12)],
        [reader.read(sample) for sample in range(12)],
    )
    image_pipeline, video_pipeline = ClipPipeline(DATA, photo_like, 12, CPU), ClipPipeline(DATA, photo_like, 12, CPU)
    video_pipeline.route = Route(VIDEO, False)
    frames = [pipeline.run(clips, transforms)["frames"].int() for pipeline in (image_pipeline, video_pipeline)]
    difference = (frames[0] - frames[1]).abs().float()
    assert difference.mean() < 0.5 and (difference > 1).float().mean() < 0.02 and difference.max() <= 4


def test_complete_images_and_bands_give_the_same_frames(photo_like: Split, monkeypatch: pytest.MonkeyPatch):
    sampler, reader = ClipTransformSampler(photo_like, DATA, AugmentConfig(), 0), ShardReader(photo_like)
    clips = [reader.read(sample) for sample in range(12)]
    transforms = [sampler.sample(sample, 0) for sample in range(12)]
    bands = ClipPipeline(DATA, photo_like, 12, CPU).run(clips, transforms)["frames"].int()
    monkeypatch.setattr(ClipPipeline, "_decodes_bands", False)
    complete = ClipPipeline(DATA, photo_like, 12, CPU).run(clips, transforms)["frames"].int()
    assert (bands - complete).abs().max() <= 1


def test_pipeline_is_rebuilt_after_a_corrupt_jpeg(photo_like: Split):
    reader, pipeline = ShardReader(photo_like), ClipPipeline(DATA, photo_like, 1, CPU)
    clip, transform = reader.read(0), ClipTransformSampler(photo_like, DATA, None, 0).sample(0, 0)
    image = jpeg_frames(clip["video"], [transform.start_frame])[0].tobytes()
    corrupt = clip | {"video": clip["video"].replace(image, bytes(len(image)))}
    with pytest.raises(DecodeError, match="nvImageCodec|Unrecognized image format"):
        pipeline.run([corrupt], [transform])
    assert pipeline.run([clip], [transform])["frames"].any()


MESSAGE = """Critical error in pipeline:
Error in {kind} operator `nvidia.dali.fn.decoders.video`,
which was used in the pipeline definition with the following traceback:

  File "somewhere.py", line 3, in graph
    frames = fn.decoders.video(

encountered:

{reason}
Current pipeline object is no longer valid."""


def test_reason_is_extracted_from_messages_of_dali():
    assert dali_reason(MESSAGE.format(kind="CPU", reason="Format not recognized.")) == "Format not recognized."
    assert dali_reason("Critical error in pipeline:\nUnknown error\nmore") == "Unknown error"
    assert dali_reason("") == "the decoder gave no reason"


class _Failing:
    """A pipeline that raises an error of DALI."""

    def __init__(self, reason: str):
        self.reason = reason

    def feed_input(self, name: str, values: object) -> None:
        """Accept any input."""

    def run(self) -> None:
        raise RuntimeError(MESSAGE.format(kind="Mixed", reason=self.reason))


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access was encountered",
        "CUDA driver API error CUDA_ERROR_OUT_OF_MEMORY (2):\nout of memory",
        "CUDA allocation failed",
        "Can't allocate 1073741824 bytes: std::bad_alloc",
        "nvImageCodec failure: '#5'",
        "dlopen libnvcuvid.so failed!. Please install NVIDIA GPU driver",
    ],
)
def test_device_failure_does_not_quarantine_clips(photo_like: Split, reason: str):
    loader = Loader(photo_like, DATA, None, 0, 4, CPU)
    loader.load(np.arange(4), 0)
    loader.pipeline._pipelines["frames"] = _Failing(reason)  # pyright: ignore
    with pytest.raises(DeviceError, match=reason.splitlines()[0][:20]):
        loader.load(np.arange(4), 0)
    assert not loader.quarantine.reasons
    assert loader.load(np.arange(4), 0).valid.all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_pipeline_on_a_missing_gpu_raises_a_device_error(photo_like: Split):
    pipeline = ClipPipeline(DATA, photo_like, 1, torch.device("cuda", 0))
    with pytest.raises(DeviceError, match="CUDA is not available"):
        pipeline.run([ShardReader(photo_like).read(0)], [ClipTransformSampler(photo_like, DATA, None, 0).sample(0, 0)])


@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_clips_are_decoded_on_the_cpu_if_nvdec_fails(codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_shards("synthetic", tmp_path, "--train-clips=4", "--test-clips=1", f"--codec={codec}", "--short-side=32")
    split = ShardedDataset.open(tmp_path).split("train")
    loaders = [Loader(split, DATA, None, 0, 4, CPU) for _ in range(2)]
    pipeline = loaders[1].pipeline
    pipeline.route, pipeline._nvdec_tested = Route(VIDEO, True), False  # pyright: ignore
    with caplog.at_level(logging.WARNING, "distav"):
        batches = [loader.load(np.arange(4), 0) for loader in loaders]
    assert batches[1].valid.all() and not loaders[1].quarantine.reasons
    assert torch.equal(batches[0].media["frames"], batches[1].media["frames"])
    assert caplog.text.count("NVDEC cannot decode") == 1
    assert loaders[1].pipeline.route == select_decoder(codec, False, split.sides)  # pyright: ignore


class _CountingPipeline:
    """Records the batch size of every run of a pipeline."""

    def __init__(self, pipeline: ClipPipeline):
        self.pipeline, self.shapes, self.batch_sizes = pipeline, pipeline.shapes, []

    def run(self, members: list, transforms: list) -> dict[str, torch.Tensor]:
        self.batch_sizes.append(len(members))
        return self.pipeline.run(members, transforms)


def _counting_loader(split: Split, batch: int, undecodable: set[int]) -> tuple[Loader, _CountingPipeline]:
    """Return a loader whose clips at these positions, in the order of reading, cannot be decoded."""
    data = DataConfig(num_frames=1, frame_size=8, audio_s=0.1)
    loader = Loader(split, data, None, 0, batch, CPU)
    pipeline = loader.pipeline = _CountingPipeline(loader.pipeline)  # pyright: ignore
    original, positions = loader._read, iter(range(10**6))

    def read(sample: int) -> Members | None:
        clip = original(sample)
        return clip | {"video": b"no video at all" * 20} if clip and next(positions) in undecodable else clip

    loader._read = read  # pyright: ignore
    return loader, pipeline  # pyright: ignore


@pytest.mark.parametrize("row", [0, 389, 1023])
def test_one_undecodable_clip_among_1024_costs_few_small_decodes(photo_like: Split, row: int):
    ids = np.arange(1024) % 12
    clean_loader, _ = _counting_loader(photo_like, 1024, set())
    loader, pipeline = _counting_loader(photo_like, 1024, {row})
    expected, batch = clean_loader.load(ids, 0), loader.load(ids, 0)
    valid = np.arange(1024) != row
    assert batch.valid.tolist() == valid.tolist()
    assert torch.equal(batch.media["frames"][valid], expected.media["frames"][valid])
    assert torch.equal(batch.media["audio"][valid], expected.media["audio"][valid])
    assert "not an AVI file" in loader.quarantine.reasons[int(ids[row])]
    assert len(pipeline.batch_sizes) <= 1 + 2 * 10 and sum(pipeline.batch_sizes) <= 3 * 1024
    sizes = sorted(pipeline.batch_sizes, reverse=True)
    assert sizes[0] == 1024 and all(small <= large for large, small in pairwise(sizes)) and sizes[1] == 512


def test_failure_of_a_large_batch_quarantines_no_clip(photo_like: Split):
    loader, pipeline = _counting_loader(photo_like, 8, set())
    original = pipeline.pipeline.run

    def run(members: list, transforms: list) -> dict[str, torch.Tensor]:
        if len(members) == 8:
            raise DecodeError("too many clips at once")
        return original(members, transforms)

    pipeline.pipeline.run = run  # type: ignore
    batch = loader.load(np.arange(8), 0)
    assert batch.valid.all() and not loader.quarantine.reasons and pipeline.batch_sizes == [8, 4, 4]


def test_undecodable_split_fails_after_few_decodes(photo_like: Split):
    loader, pipeline = _counting_loader(photo_like, 1024, set(range(1024)))
    with pytest.raises(
        RuntimeError, match=r"65 samples of one batch of split train .* not an AVI file.*inspect_shards"
    ):
        loader.load(np.arange(1024) % 12, 0)
    assert len(pipeline.batch_sizes) < 200


def test_masked_rows_repeat_a_decoded_clip(photo_like: Split):
    loader = Loader(photo_like, DATA, None, 0, 4, CPU)
    batch = loader.load(np.array([PADDING, 3, PADDING, 5]), 0)
    assert batch.valid.tolist() == [False, True, False, True]
    for values in batch.media.values():
        assert torch.equal(values[0], values[1]) and torch.equal(values[2], values[1])
        assert not torch.equal(values[3], values[1])
    empty = loader.load(np.full(4, PADDING), 0)
    assert not empty.valid.any() and not any(values.any() for values in empty.media.values())
