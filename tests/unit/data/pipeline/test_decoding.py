"""How clips are decoded: by which decoder, to which frames, and what happens where one fails."""

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
from distav.data.pipeline.dali import ClipPipeline, DeviceError, dali_reason
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
def test_the_decoder_follows_from_codec_device_and_size(codec: str, on_gpu: bool, sides: tuple[int, int], route: Route):
    assert select_decoder(codec, on_gpu, sides) == route


def mjpeg(num_frames: int = 5, height: int = 48, width: int = 64) -> bytes:
    smooth = np.linspace(0, 255, height * width).reshape(height, width)
    frames = np.stack([np.roll(np.stack([smooth, smooth.T.reshape(height, width), 255 - smooth], 2), 7 * number, 1)
                       for number in range(num_frames)]).astype(np.uint8)  # fmt: skip
    return encode_video(frames, Encoding("mjpeg", fps=num_frames, short_side=height, clip_s=1.0))


def test_jpeg_frames_are_those_that_a_demultiplexer_finds():
    content = mjpeg()
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert [each.tobytes() for each in jpeg_frames(content, range(5))] == packets
    assert [each.tobytes() for each in jpeg_frames(content, [3, 4, 9])] == [packets[3], packets[4], packets[4]]


def test_a_repeated_frame_is_the_one_before_it():
    content = bytearray(mjpeg())
    index = content.rindex(b"idx1") + 8
    movi = content.index(b"movi")
    offset = int.from_bytes(content[index + 16 + 8 : index + 16 + 12], "little")
    for place in (index + 16 + 12, movi + offset + 4):
        content[place : place + 4] = bytes(4)
    first, second, third = jpeg_frames(bytes(content), range(3))
    assert first.tobytes() == second.tobytes() != third.tobytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"no video at all" * 20, "no AVI file"),
        (lambda content: content[: content.rindex(b"idx1")], "no index"),
        (lambda content: content[: content.rindex(b"idx1") + 8], "no index"),
        (lambda content: content.replace(b"movi00dc", b"movi01wb"), "frame 0 is not where the index"),
        (lambda content: b"", "no AVI file"),
    ],
)
def test_files_without_an_index_are_refused(change, reason: str):
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
def test_colors_change_as_by_color_twist(side: int):
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
        for ours, before in zip(changed[clip].astype(int), frames[clip], strict=True):
            difference = np.abs(ours - _color_twist(before, color[clip]))
            assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.fixture(scope="module")
def photo_like(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Rendered clips of 64 x 64 pixels."""
    out = tmp_path_factory.mktemp("shards") / "mjpeg"
    make_shards("synthetic", out, "--train-clips=12", "--test-clips=1", "--short-side=64")
    return ShardedDataset.open(out).split("train")


def _whole_frames(members: Members, view: ClipTransform) -> np.ndarray:
    """Decode whole frames, then crop, resize and flip them: [T, S, S, 3]."""
    wanted = [view.start_frame + 2 * number for number in range(3)]
    images = [np.asarray(Image.open(io.BytesIO(each.tobytes()))) for each in jpeg_frames(members["video"], wanted)]
    pipeline = Pipeline(3, 1, None, exec_async=False, exec_pipelined=False, prefetch_queue_depth=1)
    with pipeline:
        source = fn.external_source(name="frame", ndim=3, dtype=types.DALIDataType.UINT8, layout="HWC")
        top, left, bottom, right = view.crop.tolist()
        resized = fn.resize(source, roi_start=[top, left], roi_end=[bottom, right], roi_relative=True, size=[24, 24],
                            interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)  # fmt: skip
        pipeline.set_outputs(fn.flip(resized, horizontal=int(view.flip)))
    pipeline.build()
    pipeline.feed_input("frame", images)
    return pipeline.run()[0].as_array()


def test_the_decoded_band_of_a_frame_gives_the_same_crop_as_the_whole_frame(photo_like: Split):
    augment = AugmentConfig(crop_area_min=0.08, brightness=0, contrast=0, saturation=0, hue=0)
    viewer, reader = ClipTransformSampler(photo_like, DATA, augment, 0), ShardReader(photo_like)
    views = [viewer.sample(sample, epoch) for sample in range(12) for epoch in range(4)]
    members = [reader.read(sample) for sample in range(12) for _ in range(4)]
    assert min(view.crop[2] - view.crop[0] for view in views) < 0.4
    frames = ClipPipeline(DATA, photo_like, 48, CPU).run(members, views)["frames"].numpy()
    for ours, member, view in zip(frames, members, views, strict=True):
        assert np.abs(ours.astype(int) - _whole_frames(member, view)).max() <= 1


def test_jpeg_frames_are_decoded_as_by_the_video_decoder(photo_like: Split):
    viewer, reader = (
        ClipTransformSampler(photo_like, DATA, AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0), 0),
        (ShardReader(photo_like)),
    )
    views, members = [viewer.sample(sample, 0) for sample in range(12)], [reader.read(sample) for sample in range(12)]
    by_image, by_video = (ClipPipeline(DATA, photo_like, 12, CPU) for _ in range(2))
    by_video.route = Route(VIDEO, False)
    one, other = (graph.run(members, views)["frames"].int() for graph in (by_image, by_video))
    difference = (one - other).abs().float()
    assert difference.mean() < 0.5 and (difference > 1).float().mean() < 0.02 and difference.max() <= 4


def test_a_frame_that_is_no_jpeg_is_refused(photo_like: Split):
    reader, graph = ShardReader(photo_like), ClipPipeline(DATA, photo_like, 1, CPU)
    members, view = reader.read(0), ClipTransformSampler(photo_like, DATA, None, 0).sample(0, 0)
    image = jpeg_frames(members["video"], [view.start_frame])[0].tobytes()
    gone = b"\0" * len(image)
    with pytest.raises(DecodeError, match="nvImageCodec"):
        graph.run([members | {"video": members["video"].replace(image, gone)}], [view])
    assert graph.run([members], [view])["frames"].any()  # The pipeline is built again.


MESSAGE = """Critical error in pipeline:
Error in {kind} operator `nvidia.dali.fn.decoders.video`,
which was used in the pipeline definition with the following traceback:

  File "somewhere.py", line 3, in graph
    frames = fn.decoders.video(

encountered:

{reason}
Current pipeline object is no longer valid."""


def test_the_reason_is_what_dali_encountered():
    assert dali_reason(MESSAGE.format(kind="CPU", reason="Format not recognised.")) == "Format not recognised."
    assert dali_reason("Critical error in pipeline:\nUnknown error\nmore") == "Unknown error"
    assert dali_reason("") == "the decoder gave no reason"


class _Failing:
    """A pipeline that fails as DALI's do."""

    def __init__(self, reason: str):
        self.reason = reason

    def feed_input(self, name: str, values: object) -> None:
        """Take anything."""

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
def test_a_failing_device_quarantines_no_clip(photo_like: Split, reason: str):
    loader = Loader(photo_like, DATA, None, 0, 4, CPU)
    loader.load(np.arange(4), 0)
    loader.pipeline._pipelines["frames"] = _Failing(reason)  # pyright: ignore
    with pytest.raises(DeviceError, match=reason.splitlines()[0][:20]):
        loader.load(np.arange(4), 0)
    assert not loader.quarantine.reasons
    assert loader.load(np.arange(4), 0).valid.all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is used")
def test_a_graph_for_a_missing_gpu_blames_the_device(photo_like: Split):
    graph = ClipPipeline(DATA, photo_like, 1, torch.device("cuda", 0))
    with pytest.raises(DeviceError, match="CUDA is not available"):
        graph.run([ShardReader(photo_like).read(0)], [ClipTransformSampler(photo_like, DATA, None, 0).sample(0, 0)])


@pytest.mark.parametrize("codec", ["vp9", "h264"])
def test_without_nvdec_clips_are_decoded_on_the_cpu(codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make_shards("synthetic", tmp_path, "--train-clips=4", "--test-clips=1", f"--codec={codec}", "--short-side=32")
    split = ShardedDataset.open(tmp_path).split("train")
    loaders = [Loader(split, DATA, None, 0, 4, CPU) for _ in range(2)]
    graph = loaders[1].pipeline
    graph.route, graph._nvdec_tried = Route(VIDEO, True), False  # pyright: ignore
    with caplog.at_level(logging.WARNING, "distav"):
        logging.getLogger("distav").propagate = True
        batches = [loader.load(np.arange(4), 0) for loader in loaders]
    assert batches[1].valid.all() and not loaders[1].quarantine.reasons
    assert torch.equal(batches[0].media["frames"], batches[1].media["frames"])
    assert caplog.text.count("NVDEC does not decode") == 1
    assert loaders[1].pipeline.route == select_decoder(codec, False, split.sides)  # pyright: ignore


class _Counted:
    """A graph that counts its runs."""

    def __init__(self, graph: ClipPipeline):
        self.graph, self.shapes, self.runs = graph, graph.shapes, []

    def run(self, members: list, views: list) -> dict[str, torch.Tensor]:
        self.runs.append(len(members))
        return self.graph.run(members, views)


def _counted_loader(split: Split, batch: int, bad: set[int]) -> tuple[Loader, _Counted]:
    data = DataConfig(num_frames=1, frame_size=8, audio_s=0.1)
    loader = Loader(split, data, None, 0, batch, CPU)
    graph = loader.pipeline = _Counted(loader.pipeline)  # pyright: ignore
    plain, rows = loader._read, iter(range(10**6))

    def read(sample: int) -> Members | None:
        members = plain(sample)
        return members | {"video": b"no video at all" * 20} if members and next(rows) in bad else members

    loader._read = read  # pyright: ignore
    return loader, graph  # pyright: ignore


@pytest.mark.parametrize("place", [0, 389, 1023])
def test_one_bad_clip_among_1024_costs_few_small_decodes(photo_like: Split, place: int):
    ids = np.arange(1024) % 12
    clean, _ = _counted_loader(photo_like, 1024, set())
    loader, graph = _counted_loader(photo_like, 1024, {place})
    expected, batch = clean.load(ids, 0), loader.load(ids, 0)
    good = np.arange(1024) != place
    assert batch.valid.tolist() == good.tolist()
    assert torch.equal(batch.media["frames"][good], expected.media["frames"][good])
    assert torch.equal(batch.media["audio"][good], expected.media["audio"][good])
    assert "no AVI file" in loader.quarantine.reasons[int(ids[place])]
    assert len(graph.runs) <= 1 + 2 * 10 and sum(graph.runs) <= 3 * 1024
    sizes = sorted(graph.runs, reverse=True)
    assert sizes[0] == 1024 and all(small <= large for large, small in pairwise(sizes)) and sizes[1] == 512


def test_a_failure_that_no_clip_causes_quarantines_none(photo_like: Split):
    loader, graph = _counted_loader(photo_like, 8, set())
    plain = graph.graph.run
    graph.graph.run = lambda members, views: plain(members, views) if len(members) < 8 else _refuse()  # type: ignore
    batch = loader.load(np.arange(8), 0)
    assert batch.valid.all() and not loader.quarantine.reasons and graph.runs == [8, 4, 4]


def _refuse() -> dict[str, torch.Tensor]:
    raise DecodeError("too many at once")


def test_a_split_that_cannot_be_decoded_ends_soon(photo_like: Split):
    loader, graph = _counted_loader(photo_like, 1024, set(range(1024)))
    with pytest.raises(RuntimeError, match=r"65 samples of one batch of split train .* no AVI file.*inspect_shards"):
        loader.load(np.arange(1024) % 12, 0)
    assert len(graph.runs) < 200


def test_masked_rows_repeat_a_clip_of_the_batch(photo_like: Split):
    loader = Loader(photo_like, DATA, None, 0, 4, CPU)
    batch = loader.load(np.array([PADDING, 3, PADDING, 5]), 0)
    assert batch.valid.tolist() == [False, True, False, True]
    for values in batch.media.values():
        assert torch.equal(values[0], values[1]) and torch.equal(values[2], values[1])
        assert not torch.equal(values[3], values[1])
    empty = loader.load(np.full(4, PADDING), 0)
    assert not empty.valid.any() and not any(values.any() for values in empty.media.values())
