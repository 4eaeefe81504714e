"""Clips of media files: video and audio belong together whatever the container, its time stamps and its damage."""

import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.audio import mix_weights
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.media.video import VideoTrack
from tests.helpers.media import CODECS, event_times, write_media

ENCODING = Encoding(fps=25, short_side=32, clip_s=2.0)


def cut(path: Path, encoding: Encoding = ENCODING, start_s: float = 0.0, end_s: float | None = None) -> list[Clip]:
    return list(decode_clips(path, ClipSource(path.name, "a", "train", start_s, end_s), encoding))


def check_events(clips: list[Clip], expected: list[float], encoding: Encoding = ENCODING) -> None:
    """Check the times of flashes and beeps: half a frame, the frame of an audio codec's delay, and a millisecond."""
    flashes, beeps = event_times(clips, encoding)
    np.testing.assert_allclose(flashes, beeps, atol=0.5 / encoding.fps + 1e-3)
    np.testing.assert_allclose(flashes, expected, atol=1.5 / encoding.fps)


def repairs_of(clips: list[Clip]) -> list[str]:
    return [repair for clip in clips for repair in clip.repairs]


@pytest.mark.parametrize("suffix", CODECS)
def test_video_and_audio_are_in_step_in_every_container(suffix: str, tmp_path: Path):
    rate_hz = 44100 if suffix in (".flv", ".wmv") else 48000
    clips = cut(write_media(tmp_path / f"clip{suffix}", 8.0, rate_hz=rate_hz))
    assert len(clips) == 4
    check_events(clips, [1, 4, 7])


@pytest.mark.parametrize(
    ("clip_s", "fps", "sample_rate_hz"),
    [
        (1.5, 15, 16000),
        (0.96, 8, 16000),
        (2.0, 29.97, 44100),
        (1.001, 23.976, 11025),
        (0.7, 5, 8000),
        (3.3, 12.5, 22050),
    ],
)
def test_no_clip_length_or_rate_moves_video_and_audio_apart(
    clip_s: float, fps: float, sample_rate_hz: int, tmp_path: Path
):
    encoding = Encoding(fps=fps, short_side=32, clip_s=clip_s, sample_rate_hz=sample_rate_hz)
    clips = cut(write_media(tmp_path / "clip.mkv", 60.0, every_s=7.32, size=(32, 32)), encoding)
    assert len(clips) == round(60 / clip_s - 0.4)
    assert all(len(clip.frames) == encoding.num_frames for clip in clips)
    assert all(len(clip.waveform) == encoding.num_audio_samples for clip in clips)
    complete = [
        time_s for time_s in np.arange(1, 55, 7.32) if time_s % clip_s < clip_s - 0.3
    ]  # not cut by the end of a clip
    flashes, beeps = event_times(clips, encoding)
    for time_s in complete:
        near = [min(times, key=lambda found: abs(found - time_s)) for times in (flashes, beeps)]
        assert abs(near[0] - near[1]) <= 0.5 / fps + 1e-3 and abs(near[1] - time_s) < 2e-3


@pytest.mark.long
@pytest.mark.parametrize("constant_rate", [True, False])
@pytest.mark.parametrize("suffix", sorted(set(CODECS) - {".mpg"}))  # MPEG-PS stores the times of some frames only.
def test_video_and_audio_stay_together_for_two_minutes(suffix: str, constant_rate: bool, tmp_path: Path):
    """Check 120 s with six combinations of clip length and rate; the largest distances are printed."""

    def dropped(number: int) -> bool:  # No frame at the start or the end of a flash.
        return not constant_rate and number % 61 not in (0, 5) and (number * 7919) % 3 == 0

    rate_hz = 44100 if suffix in (".flv", ".wmv") else 48000
    signal_times = [1 + 2.44 * event for event in range(48)]
    path = write_media(
        tmp_path / f"clip{suffix}", 120.0, rate_hz=rate_hz, every_s=2.44,
        dropped=lambda number: dropped(number - 25),
    )  # fmt: skip
    for clip_s, fps in ((2.0, 8), (1.5, 15), (0.96, 8), (2.0, 29.97), (3.2, 12.5), (10.0, 25)):
        encoding = Encoding(fps=fps, short_side=32, clip_s=clip_s)
        flashes, beeps = event_times(cut(path, encoding), encoding)
        largest = 0.0
        for time_s in signal_times:
            if time_s % clip_s < clip_s - 0.3:  # not cut by the end of a clip
                flash, beep = (min(times, key=lambda found: abs(found - time_s)) for times in (flashes, beeps))
                largest = max(largest, abs(flash - beep))
        print(
            f"{suffix} clip_s={clip_s} fps={fps} constant={constant_rate}: {1000 * largest:.1f} of {500 / fps:.1f} ms"
        )
        assert largest <= 0.5 / fps + 1e-3


def test_frames_at_irregular_times_are_shown_at_their_times(tmp_path: Path):
    rng = np.random.default_rng(0)
    times = np.sort(rng.choice(8 * 60, 8 * 20, replace=False)) / 60
    times = np.union1d(times, [0, 1, 1.2, 4, 4.2, 7, 7.2])
    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, frame_times=times))
    check_events(clips, [1, 4, 7])


@pytest.mark.parametrize("suffix", [".avi", ".mkv"])
def test_repeated_frames_keep_their_duration(suffix: str, tmp_path: Path):
    """In AVI, as in Theora, an empty packet repeats the previous frame."""

    def dropped(number: int) -> bool:  # All frames without a change but the last.
        return 0 < number < 199 and (number - 25) % 75 not in (0, 5)

    clips = cut(write_media(tmp_path / f"clip{suffix}", 8.0, dropped=dropped))
    check_events(clips, [1, 4, 7])


def test_missing_audio_packets_become_silence(tmp_path: Path):
    def edit(kind: str, time_s: float) -> float | None:
        return None if kind == "audio" and 1.5 <= time_s < 3.2 else time_s

    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=edit))
    check_events(clips, [1, 4, 7])
    assert sum("audio" in repair and "filled with silence" in repair for repair in repairs_of(clips)) == 2


def test_missing_video_packets_become_a_still_frame(tmp_path: Path):
    def edit(kind: str, time_s: float) -> float | None:
        return None if kind == "video" and 1.4 < time_s <= 3.84 else time_s

    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=edit))
    check_events(clips, [1, 4, 7])
    assert any("video" in repair and "last frame" in repair for repair in repairs_of(clips))


@pytest.mark.parametrize("jump_s", [60.0, 3600.0])
def test_a_jump_of_both_clocks_is_left_out(jump_s: float, tmp_path: Path):
    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=lambda _, time_s: time_s + jump_s * (time_s >= 2.9)))
    check_events(clips, [1, 4 + jump_s, 7 + jump_s])
    assert len(clips) in (4, 5)


def test_a_clock_that_is_set_back_goes_on(tmp_path: Path):
    first = write_media(tmp_path / "first.ts", 6.0).read_bytes()
    (tmp_path / "twice.ts").write_bytes(first + first)
    clips = cut(tmp_path / "twice.ts")
    check_events(clips, [1, 4, 7, 10])
    assert len(clips) == 6


def test_a_single_wrong_time_stamp_is_ignored(tmp_path: Path):
    def edit(kind: str, time_s: float) -> float:
        return time_s + 500 if kind == "audio" and 2.5 < time_s < 2.53 else time_s

    check_events(cut(write_media(tmp_path / "clip.mkv", 8.0, edit=edit)), [1, 4, 7])


def test_time_stamps_may_wrap_around(tmp_path: Path):
    wrap_s = 2**33 / 90000
    clips = cut(write_media(tmp_path / "clip.ts", 8.0, edit=lambda _, time_s: time_s + wrap_s - 5))
    check_events(clips, [1, 4, 7])


@pytest.mark.parametrize("late", ["video", "audio"])
def test_a_stream_that_starts_late_keeps_its_times(late: str, tmp_path: Path):
    def edit(kind: str, time_s: float) -> float | None:
        return None if kind == late and time_s < 2.87 else time_s

    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=edit))
    flashes, beeps = event_times(clips, ENCODING)
    for times, kind in ((flashes, "video"), (beeps, "audio")):
        np.testing.assert_allclose(times, [4, 7] if kind == late else [1, 4, 7], atol=0.03)


def test_times_before_zero_are_kept_apart_from_zero(tmp_path: Path):
    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=lambda _, time_s: time_s - 0.5))
    check_events(clips, [1, 4, 7])


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".ts"])
@pytest.mark.parametrize("audio_seconds", [6.0, 10.0])
def test_streams_of_different_lengths_are_used_as_far_as_both_reach(suffix: str, audio_seconds: float, tmp_path: Path):
    clips = cut(write_media(tmp_path / f"clip{suffix}", 8.0, audio_seconds=audio_seconds))
    assert len(clips) == (3 if audio_seconds < 8 else 4)
    check_events(clips, [1, 4] if audio_seconds < 8 else [1, 4, 7])


def test_a_clip_that_is_almost_complete_is_filled(tmp_path: Path):
    path = write_media(tmp_path / "clip.mp4", 9.96)
    clips = cut(path)
    assert len(clips) == 5 and len(clips[-1].frames) == 50
    assert any("missing" in repair for repair in clips[-1].repairs)
    assert len(cut(write_media(tmp_path / "half.mp4", 9.0))) == 4


def test_an_interval_is_relative_to_the_start_of_the_file(tmp_path: Path):
    path = write_media(tmp_path / "clip.ts", 12.0, edit=lambda _, time_s: time_s + 900)
    clips = cut(path, start_s=5.0, end_s=9.0)
    assert [clip.start_s for clip in clips] == [5, 7]
    check_events(clips, [7])


def test_a_damaged_packet_is_skipped(tmp_path: Path):
    path = write_media(tmp_path / "clip.ts", 8.0)
    content = bytearray(path.read_bytes())
    middle = len(content) // 376 * 188
    content[middle : middle + 3 * 188] = bytes(3 * 188)
    path.write_bytes(content)
    assert len(cut(path)) == 4


def test_damaged_bytes_cost_their_frames_only(tmp_path: Path):
    path = write_media(tmp_path / "clip.mkv", 8.0)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for position in range(middle, middle + 200):
        content[position] ^= 0x5A
    path.write_bytes(content)
    clips = cut(path)
    assert len(clips) == 4
    check_events([clips[0], clips[3]], [1, 7])


def test_a_file_that_is_mostly_missing_is_rejected_and_half_of_one_is_used(tmp_path: Path):
    path = write_media(tmp_path / "clip.mkv", 20.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 10])
    with pytest.raises(RejectedClip, match="truncated: 20"):
        cut(path)
    path.write_bytes(content[: len(content) * 7 // 10])
    assert 5 <= len(cut(path)) <= 8


def test_another_size_and_sample_rate_may_follow(tmp_path: Path):
    first = write_media(tmp_path / "first.ts", 6.0)
    second = write_media(
        tmp_path / "second.ts", 6.0, size=(96, 96), rate_hz=44100, layout="stereo", edit=lambda _, time_s: time_s + 6
    )
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    clips = cut(tmp_path / "both.ts", Encoding(fps=25, short_side=32, clip_s=4.0))
    assert len(clips) == 3
    assert [clip.size for clip in clips] == [(32, 48), (32, 48), (32, 32)]
    check_events(clips, [1, 4, 7, 10])
    assert any("format changes" in repair for repair in repairs_of(clips))
    assert clips[1].frames[-1][:, :6].max() < 10, "a frame of another shape has black borders"


def noise(layout: str) -> Callable[[np.ndarray], np.ndarray]:
    """Independent full-scale square waves in all channels."""
    num_channels = av.AudioLayout(layout).nb_channels

    def signal(time_s: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        steps = rng.choice([-0.95, 0.95], (num_channels, len(time_s) // 200 + 1))
        return np.repeat(steps, 200, axis=1)[:, : len(time_s)]

    return signal


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1"])
def test_no_mix_is_clipped_and_it_equals_that_of_ffmpeg(layout: str, tmp_path: Path):
    path = write_media(tmp_path / "clip.mkv", 2.0, layout=layout, signal=noise(layout))
    encoding = Encoding(fps=25, short_side=32, clip_s=2.0, sample_rate_hz=48000)
    (clip,) = cut(path, encoding)
    assert (np.abs(clip.waveform) > 0.99).mean() == 0
    with av.open(str(path)) as container:  # With integers, FFmpeg normalizes the mix.
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48000)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        expected = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames]) / 32768
    np.testing.assert_allclose(clip.waveform[: len(expected)], expected[: len(clip.waveform)], atol=2e-3)


def test_weights_of_a_mix():
    np.testing.assert_allclose(mix_weights(["FL", "FR"]), [0.5, 0.5])
    np.testing.assert_allclose(mix_weights(["FL", "FR", "FC", "LFE", "BL", "BR"])[[2, 3]], [0.2929, 0], atol=1e-4)
    np.testing.assert_allclose(mix_weights(["LFE"]), [1])
    np.testing.assert_allclose(mix_weights(["NONE"] * 3), [1 / 3] * 3)


@pytest.mark.parametrize(("left", "right"), [(1, -1), (1, 1), (0, 1), (1, 0)])
def test_no_relation_of_two_channels_silences_a_mix(left: float, right: float, tmp_path: Path):
    def signal(time_s: np.ndarray) -> np.ndarray:
        return np.outer([left, right], 0.8 * np.sin(2 * np.pi * 440 * time_s))

    (clip,) = cut(write_media(tmp_path / "clip.mkv", 2.0, layout="stereo", signal=signal))
    assert 0.35 < np.abs(clip.waveform).max() < 0.85


QUADRANTS = np.repeat(np.repeat(np.array([[0, 1], [2, 3]], np.uint8), 24, 0), 32, 1)


@pytest.mark.parametrize(
    ("matrix", "corners"),
    [
        ((1, 0, 0, 1), [[0, 1], [2, 3]]),
        ((-1, 0, 0, 1), [[1, 0], [3, 2]]),
        ((1, 0, 0, -1), [[2, 3], [0, 1]]),
        ((-1, 0, 0, -1), [[3, 2], [1, 0]]),
        ((0, 1, -1, 0), [[2, 0], [3, 1]]),
        ((0, -1, 1, 0), [[1, 3], [0, 2]]),
        ((0, 1, 1, 0), [[0, 2], [1, 3]]),
        ((0, -1, -1, 0), [[3, 1], [2, 0]]),
    ],
)
def test_turned_and_mirrored_videos_are_upright(matrix: tuple[int, ...], corners: list[list[int]], tmp_path: Path):
    pixels = np.repeat(60 * QUADRANTS[:, :, None], 3, 2)
    path = write_media(tmp_path / "clip.mp4", 2.0, size=(64, 48), pixels=pixels, matrix=matrix)
    (clip,) = cut(path)
    height, width = clip.size
    assert (height < width) == (matrix[0] != 0)
    image = clip.frames[10].mean(2)
    actual = [
        [image[height // 4 + row * height // 2, width // 4 + column * width // 2] for column in (0, 1)]
        for row in (0, 1)
    ]
    np.testing.assert_allclose(np.array(actual) / 60, corners, atol=0.3)


@pytest.mark.parametrize(
    ("ratio", "size"), [(Fraction(64, 45), (32, 56)), (Fraction(1, 2), (52, 32)), (Fraction(1), (32, 40))]
)
def test_pixels_that_are_not_square_become_square(ratio: Fraction, size: tuple[int, int], tmp_path: Path):
    (clip,) = cut(write_media(tmp_path / "clip.mkv", 2.0, size=(80, 64), aspect_ratio=ratio))
    assert clip.size == size


def test_the_default_audio_stream_is_used(tmp_path: Path):
    source, path = write_media(tmp_path / "clip.mkv", 4.0), tmp_path / "two.mkv"
    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(file.streams.video[0])
        commentary = out.add_stream("flac", rate=48000, layout="mono")
        main = out.add_stream_from_template(file.streams.audio[0])
        main.disposition = av.stream.Disposition.default
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4 * 48000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        resampler = av.AudioResampler("s16", "mono", 48000, frame_size=4608)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(commentary.encode(part))
        for packet in file.demux():
            if packet.size:
                packet.stream = video if packet.stream.type == "video" else main
                out.mux(packet)
    check_events(cut(path), [1])


def test_memory_does_not_depend_on_the_length(tmp_path: Path):
    path = write_media(tmp_path / "long.mkv", 600.0, fps=2, rate_hz=8000, every_s=200)
    encoding = Encoding(fps=4, short_side=64, clip_s=2.0, sample_rate_hz=8000)
    tracemalloc.start()
    num_clips = sum(1 for _ in decode_clips(path, ClipSource("long.mkv", "a", "train"), encoding))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_clips == 300 and peak < 4 * 2**20  # All frames are 45 MB.


def test_no_failure_of_a_file_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_media(tmp_path / "clip.mkv", 4.0)
    for error, message in ((MemoryError(), "too large"), (KeyError("x"), "not decodable: KeyError")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(VideoTrack, "images", fail)
        with pytest.raises(RejectedClip, match=message):
            cut(path)
