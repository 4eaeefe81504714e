"""Clips of files with one stream, or with a stream that cannot be decoded."""

from pathlib import Path

import av
import numpy as np
import pytest

from distav.data.preparation.encoding import ANY_HINT, Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.decoding import decode_clips
from distav.data.preparation.media.formats import declares_duration
from tests.helpers.media import AUDIO_CODECS, CODECS, copy_stream, event_times, write_audio, write_media, write_silent

ENCODING = Encoding(fps=25, short_side=32, clip_s=2.0, modalities="any")
BOTH = Encoding(fps=25, short_side=32, clip_s=2.0)


def cut(path: Path, encoding: Encoding = ENCODING, start_s: float = 0.0, end_s: float | None = None) -> list[Clip]:
    return list(decode_clips(path, ClipSource(path.name, "a", "train", start_s, end_s), encoding))


def check_kind(clips: list[Clip], kind: str, count: int) -> None:
    """Check the number of clips, and that all have only video or only audio, of the complete length."""
    assert len(clips) == count
    for clip in clips:
        assert set(clip.members(ENCODING)) == {kind}
        if clip.frames is not None:
            assert len(clip.frames) == ENCODING.num_frames and clip.size != (0, 0)
        if clip.waveform is not None:
            assert len(clip.waveform) == ENCODING.num_audio_samples and clip.size == (0, 0)


@pytest.mark.parametrize("suffix", sorted(CODECS))
def test_silent_videos_are_cut_at_the_times_of_their_frames(suffix: str, tmp_path: Path):
    path = write_silent(tmp_path / f"clip{suffix}", 8.0)
    clips = cut(path)
    check_kind(clips, "video", 4)
    np.testing.assert_allclose(event_times(clips, ENCODING)[0], [1, 4, 7], atol=1.5 / 25)
    with pytest.raises(RejectedClip, match=f"^no audio: the file has no audio stream; {ANY_HINT}$"):
        cut(path, BOTH)


@pytest.mark.parametrize(
    ("suffix", "cover"), [*((suffix, False) for suffix in AUDIO_CODECS), (".mp3", True), (".flac", True)]
)
def test_audio_files_are_cut_at_the_times_of_their_samples(suffix: str, cover: bool, tmp_path: Path):
    path = write_audio(tmp_path / f"clip{suffix}", 8.0, cover=cover)
    clips = cut(path)
    check_kind(clips, "audio", 4)
    np.testing.assert_allclose(event_times(clips, ENCODING)[1], [1, 4, 7], atol=0.06)
    with pytest.raises(RejectedClip, match=f"^no video: the file has no video stream; {ANY_HINT}$"):
        cut(path, BOTH)


def test_files_with_both_streams_do_not_depend_on_the_option(tmp_path: Path):
    path = write_media(tmp_path / "clip.mkv", 8.0, audio_seconds=6.0)
    any_clips, both_clips = cut(path), cut(path, BOTH)
    assert len(any_clips) == len(both_clips) == 3
    for any_clip, both_clip in zip(any_clips, both_clips, strict=True):
        assert any_clip.members(ENCODING) == both_clip.members(BOTH)
        assert any_clip.repairs == both_clip.repairs


def test_holes_and_intervals_of_one_stream(tmp_path: Path):
    def edit(_: str, time_s: float) -> float | None:
        return None if 2.1 < time_s < 5.8 else time_s

    both = write_media(tmp_path / "both.mkv", 10.0, edit=edit)
    # A frame may be displayed for a second longer than usual before its clip has a hole.
    for kind, starts in (("video", [0, 2, 6, 8]), ("audio", [0, 6, 8])):
        clips = cut(copy_stream(both, tmp_path / f"{kind}.mkv", kind))
        check_kind(clips, kind, len(starts))
        assert [clip.start_s for clip in clips] == starts
    path = write_audio(tmp_path / "clip.flac", 12.0)
    clips = cut(path, start_s=5.0, end_s=9.0)
    assert [clip.start_s for clip in clips] == [5, 7]
    np.testing.assert_allclose(event_times(clips, ENCODING)[1], [7], atol=0.06)


def test_a_clip_that_is_almost_complete_is_filled(tmp_path: Path):
    for path, kind, filling in (
        (write_silent(tmp_path / "a.mp4", 3.88), "video", "the last frame"),
        (write_audio(tmp_path / "a.wav", 3.88), "audio", "silence"),
    ):
        clips = cut(path)
        check_kind(clips, kind, 2)
        assert clips[0].repairs == () and f"0.12 s missing, filled with {filling}" in clips[1].repairs[0]
    with pytest.raises(RejectedClip, match=r"^too short: 1.00 s of audio, a clip has 2 s$"):
        cut(write_audio(tmp_path / "short.wav", 1.0))


def test_a_truncated_audio_file_is_rejected(tmp_path: Path):
    for suffix in (".wav", ".mp3"):
        path = write_audio(tmp_path / f"clip{suffix}", 20.0)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 3 // 10])
        with pytest.raises(RejectedClip, match="^truncated: 20.0"):
            cut(path)


def test_only_declared_durations_are_compared_with_the_content(tmp_path: Path):
    """FFmpeg estimates the duration of raw streams from the first packets, here as far too short or too long."""
    for name, options, expected in (
        ("tag.mp3", {}, True),
        ("cover.mp3", {}, True),
        ("none.mp3", {"write_xing": "0"}, False),
        ("raw.aac", {}, False),
        ("a.flac", {}, True),
    ):
        path = write_audio(tmp_path / name, 4.0, cover=name.startswith("cover"), options=options)
        with av.open(str(path)) as container:
            assert declares_duration(container, path) == expected, name
        check_kind(cut(path), "audio", 2)


@pytest.mark.parametrize("damaged", ["video", "audio"])
def test_a_stream_that_cannot_be_decoded_is_left_out(damaged: str, tmp_path: Path):
    source = write_media(tmp_path / "source.mkv", 8.0)
    path = tmp_path / "damaged.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        streams = {stream.index: written.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.dts is None:
                continue
            stream = streams[packet.stream.index]
            if packet.stream.type == damaged:
                noise = av.Packet(rng.bytes(200))
                noise.pts, noise.dts, noise.time_base = packet.pts, packet.dts, packet.time_base
                noise.is_keyframe = packet.is_keyframe
                packet = noise
            packet.stream = stream
            written.mux(packet)
    clips = cut(path)
    check_kind(clips, "audio" if damaged == "video" else "video", 4)
    assert all(len(clip.repairs) == 1 and clip.repairs[0].startswith(f"{damaged}: left out, ") for clip in clips)
    with pytest.raises(RejectedClip):
        cut(path, BOTH)


@pytest.mark.parametrize("name", ["notes.txt", "page.nfo", "data.bin", "cover.jpg", "cover.png"])
def test_text_and_images_are_not_videos(name: str, tmp_path: Path):
    from PIL import Image

    path = tmp_path / name
    if path.suffix in (".jpg", ".png"):
        Image.new("RGB", (64, 48), "red").save(path)
    else:
        path.write_text("some lines of text\n" * 200)
    for encoding in (ENCODING, BOTH, Encoding(fps=10, short_side=32, clip_s=0.1, modalities="any")):
        with pytest.raises(RejectedClip, match="^not a video"):
            cut(path, encoding)


def test_a_file_without_any_stream_gets_no_hint(tmp_path: Path):
    path = tmp_path / "clip.srt"
    path.write_text("1\n00:00:00,000 --> 00:00:02,000\nWords\n\n")
    for encoding in (ENCODING, BOTH):
        with pytest.raises(RejectedClip, match="^no video: the file has neither a video nor an audio stream$"):
            cut(path, encoding)


def test_a_source_that_yields_one_modality_needs_the_option():
    waveform = np.zeros(32000, np.float32)
    assert set(Clip(None, waveform).members(ENCODING)) == {"audio"}
    with pytest.raises(RejectedClip, match=f"no video: the source yields no video; {ANY_HINT}"):
        Clip(None, waveform).members(BOTH)
    with pytest.raises(RejectedClip, match="no video: the source yields no video$"):
        Clip(None, None).members(ENCODING)
