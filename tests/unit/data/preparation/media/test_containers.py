"""Files that other tools have been reported to fail on: names, playlists, programs, seeking, and order of frames."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from distav.data.preparation.encoding import Clip, ClipSource, Encoding, RejectedClip
from distav.data.preparation.media.containers import has_unknown_size
from distav.data.preparation.media.decoding import decode_clips
from tests.helpers.media import event_times, write_audio, write_media

ENCODING = Encoding(fps=25, short_side=32, clip_s=2.0)
ANY = Encoding(fps=25, short_side=32, clip_s=2.0, modalities="any")


def cut(path: Path, start_s: float = 0.0, encoding: Encoding = ENCODING) -> list[Clip]:
    return list(decode_clips(path, ClipSource(path.name, "a", "train", start_s), encoding))


def check_events(clips: list[Clip], expected: list[float]) -> None:
    flashes, beeps = event_times(clips, ENCODING)
    np.testing.assert_allclose(flashes, expected, atol=1.5 / 25)
    np.testing.assert_allclose(beeps, expected, atol=1.5 / 25)


def repairs_of(clips: list[Clip]) -> list[str]:
    return [repair for clip in clips for repair in clip.repairs]


@pytest.mark.parametrize("name", ["12:30:00.mkv", "concat:a|b.mkv", "http:x.mkv", "data:x.mkv", "%03d.mkv", "-i.mkv"])
def test_a_relative_path_is_no_url(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_media(tmp_path / "clip.mkv", 2.0).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(cut(Path(name))) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("live.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nclip.ts\n"),
        ("list.mp4", "ffconcat version 1.0\nfile clip.ts\n"),
        ("bom.mp4", "\ufeff\nffconcat version 1.0\nfile clip.ts\n"),
    ],
)
def test_a_playlist_is_rejected(name: str, content: str, tmp_path: Path):
    """FFmpeg would read the other files, also outside of the directory, and wait for the next file of a live list."""
    write_media(tmp_path / "clip.ts", 4.0)
    (tmp_path / name).write_text(content)
    with pytest.raises(RejectedClip, match="^not a video: the file is a playlist of other files"):
        cut(tmp_path / name)


def test_formats_that_read_from_a_network_are_not_opened(tmp_path: Path):
    session = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    (tmp_path / "clip.mp4").write_text(session + "a=rtpmap:96 H264/90000\n")
    with pytest.raises(RejectedClip, match="^not a video: Invalid argument"):  # The format is not on the list.
        cut(tmp_path / "clip.mp4")


def section(table: int, number: int, body: bytes) -> bytes:
    """Return the packet content of a table of a transport stream."""
    content = bytes([table, 0xB0, len(body) + 9]) + number.to_bytes(2, "big") + b"\xc1\x00\x00" + body
    checksum = 0xFFFFFFFF
    for byte in content:
        checksum ^= byte << 24
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x04C11DB7 if checksum >> 31 else 0)) & 0xFFFFFFFF
    return b"\x00" + content + checksum.to_bytes(4, "big")


def map_of(program: int, streams: Iterable[tuple[int, int]]) -> bytes:
    """Return the table of a program with streams of a type and a packet identifier."""
    body = b"".join(bytes([kind, 0xE0 | pid >> 8, pid & 255, 0xF0, 0]) for kind, pid in streams)
    clock = list(streams)[0][1]
    return section(2, program, bytes([0xE0 | clock >> 8, clock & 255, 0xF0, 0]) + body)


def test_audio_belongs_to_the_program_of_the_video(tmp_path: Path):
    """The first program is a radio station: its audio precedes that of the video."""
    source, single = write_media(tmp_path / "source.ts", 4.0), tmp_path / "single.ts"
    with av.open(str(source)) as read, av.open(str(single), "w", format="mpegts") as written:
        radio = written.add_stream("mp2", rate=48000, layout="mono")
        streams = {stream.index: written.add_stream_from_template(stream) for stream in read.streams}
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 4 * 48000)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, 0
        resampler = av.AudioResampler("s16", "mono", 48000, frame_size=1152)
        packets = [packet for part in resampler.resample(frame) for packet in radio.encode(part)]
        for packet in [*packets, *(packet for packet in read.demux() if packet.size)]:
            if packet.stream.index in streams and packet not in packets:
                packet.stream = streams[packet.stream.index]
            written.mux(packet)
    programs = section(0, 1, b"\x00\x01\xf0\x00\x00\x02\xf0\x01")
    maps = {0x1000: map_of(1, [(3, 0x100)]), 0x1001: map_of(2, [(2, 0x101), (3, 0x102)])}
    content, counter = b"", 0
    for start in range(0, len(single.read_bytes()), 188):
        packet = single.read_bytes()[start : start + 188]
        pid = int.from_bytes(packet[1:3], "big") & 0x1FFF
        tables = {0: {0: programs}, 0x1000: maps}.get(pid)
        if tables is None:
            content += packet
            continue
        counter += pid == 0
        for table_pid, table in tables.items():
            head = b"\x47" + (0x4000 | table_pid).to_bytes(2, "big") + bytes([0x10 | counter % 16])
            content += (head + table).ljust(188, b"\xff")
    path = tmp_path / "programs.ts"
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video", "audio"]
    check_events(cut(path), [1])


def test_a_stream_without_decoder_is_chosen_last(tmp_path: Path):
    """As the spatial audio of phones."""
    source, path = write_media(tmp_path / "source.avi", 4.0), tmp_path / "clip.mov"
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        video = written.add_stream_from_template(read.streams.video[0])
        first = written.add_stream("pcm_s16be", rate=48000, layout="mono")
        second = written.add_stream("pcm_s24be", rate=48000, layout="mono")
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = video
                written.mux(packet)
        for stream, sample_format in ((first, "s16"), (second, "s32")):
            resampler = av.AudioResampler(sample_format, "mono", 48000)
            with av.open(str(source)) as audio:
                for frame in audio.decode(audio=0):
                    for part in resampler.resample(frame):
                        written.mux(stream.encode(part))
    content = path.read_bytes()
    assert content.count(b"twos") == 1
    path.write_bytes(content.replace(b"twos", b"apac"))
    check_events(cut(path), [1])


def write_frames(path: Path, codec: str, frames: list[av.VideoFrame], b_frames: int = 0, options: dict | None = None):
    """Write frames at 25 per second, with silence."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=25, options=options or {})
        assert isinstance(video, VideoStream)
        video.width, video.height, video.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        video.codec_context.max_b_frames = b_frames
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        packets = []
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += video.encode(frame)
        packets += video.encode()
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000 * len(frames) // 25), np.int16), "s16", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        packets += audio.encode(silence) + audio.encode()
        for packet in sorted(packets, key=lambda packet: float((packet.dts or 0) * packet.time_base)):
            container.mux(packet)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
@pytest.mark.parametrize("start_s", [0.0, 2.0])
def test_frames_in_the_order_of_decoding_are_displayed_in_order(codec: str, start_s: float, tmp_path: Path):
    """AVI stores no times of presentation. Each frame is brighter than its predecessor."""
    shades = np.linspace(20, 230, 100)
    frames = [
        av.VideoFrame.from_ndarray(np.full((32, 48, 3), shade, np.uint8), "rgb24").reformat(format="yuv420p")
        for shade in shades
    ]
    options = (
        {"x264-params": "b-adapt=0:keyint=20:scenecut=0"}
        if codec == "libx264"
        else {"g": "12", "qmin": "1", "qmax": "1"}
    )
    write_frames(tmp_path / "clip.avi", codec, frames, b_frames=3 if codec == "libx264" else 2, options=options)
    clips = cut(tmp_path / "clip.avi", start_s)
    assert len(clips) == 2 - start_s / 2
    for clip in clips:
        expected = shades[round(clip.start_s * 25) :][:50]
        assert np.abs(clip.frames.mean((1, 2, 3)) - expected)[:-3].max() < 3  # Neighbors differ by 2.1.


def test_frames_with_a_palette_are_read_from_the_beginning(tmp_path: Path):
    """Only the first packet has the palette."""
    palette = np.array([[255, 200, 60, 20]] * 256, np.uint8)  # alpha, red, green, blue
    frames = [av.VideoFrame.from_ndarray((np.zeros((32, 48), np.uint8), palette), format="pal8") for _ in range(100)]
    write_frames(tmp_path / "clip.avi", "rawvideo", frames)
    for start_s in (0.0, 2.0):
        color = cut(tmp_path / "clip.avi", start_s)[0].frames[10].mean((0, 1))
        np.testing.assert_allclose(color, [200, 60, 20], atol=2)


def test_a_recording_may_start_between_key_frames(tmp_path: Path):
    frames = [
        av.VideoFrame.from_ndarray(
            np.random.default_rng(number).integers(0, 255, (32, 48, 3), np.uint8), "rgb24"
        ).reformat(format="yuv420p")
        for number in range(150)
    ]
    source, path = tmp_path / "source.mkv", tmp_path / "clip.ts"
    write_frames(source, "libx264", frames, options={"x264-params": "keyint=50:scenecut=0:repeat-headers=1"})
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        video = written.add_stream_from_template(read.streams.video[0])
        audio = written.add_stream("mp2", rate=8000 * 2, layout="mono")
        for packet in read.demux(read.streams.video[0]):
            if packet.size and packet.pts >= 200:
                packet.stream = video
                written.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
        silence.sample_rate = 16000
        for number in range(84):
            silence.pts = number * 1152
            written.mux(audio.encode(silence))
    clips = cut(path)
    assert len(clips) == 3 and any("filled with the first frame" in repair for repair in clips[0].repairs)
    assert not any("damaged" in repair for repair in repairs_of(clips))
    assert clips[1].frames.std() > 20


class Pipe:
    """A file that cannot seek."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, content: bytes) -> int:
        """Append bytes."""
        self.content += content
        return len(content)


def test_an_avi_file_without_its_size_has_no_declared_duration(tmp_path: Path):
    """As written to a pipe: the header has placeholders, here of 11 hours."""
    source, path, pipe = write_media(tmp_path / "source.avi", 4.0), tmp_path / "clip.avi", Pipe()
    with av.open(str(source)) as read, av.open(pipe, "w", format="avi") as written:
        streams = {stream.index: written.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                written.mux(packet)
    path.write_bytes(pipe.content)
    assert has_unknown_size(path) and not has_unknown_size(source)
    check_events(cut(path), [1])
    path.write_bytes(b"RIFF\x10\x20\x00\x00" + pipe.content[8:])
    with pytest.raises(RejectedClip, match="truncated"):
        cut(path)


@pytest.mark.parametrize("size", [0, 0x7FFFF024, 0xFFFFFFFF])
def test_a_wav_file_of_a_pipe_has_no_declared_duration(size: int, tmp_path: Path):
    path = write_audio(tmp_path / "clip.wav", 4.0)
    content = path.read_bytes()
    data = content.index(b"data") + 4
    placeholder = max(0, size - 36).to_bytes(4, "little")
    path.write_bytes(content[:4] + size.to_bytes(4, "little") + content[8:data] + placeholder + content[data + 4 :])
    assert len(cut(path, encoding=ANY)) == 2


def test_a_wav_file_may_have_a_size_of_64_bits(tmp_path: Path):
    path = write_audio(tmp_path / "clip.wav", 4.0)
    content = path.read_bytes()
    data = content.index(b"data") + 4
    sizes = (len(content) + 28).to_bytes(8, "little") + (len(content) - data - 4).to_bytes(8, "little")
    large = b"RF64\xff\xff\xff\xffWAVEds64\x1c\x00\x00\x00" + sizes + bytes(12)
    path.write_bytes(large + content[12:data] + b"\xff" * 4 + content[data + 4 :])
    assert len(cut(path, encoding=ANY)) == 2


@pytest.mark.parametrize("codec", ["adpcm_ms", "adpcm_ima_wav"])
def test_an_interval_of_compressed_wav_starts_at_its_time(codec: str, tmp_path: Path):
    path = tmp_path / "clip.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48000, layout="mono")
        time_s = np.arange(8 * 48000) / 48000
        samples = (16000 * np.sin(2 * np.pi * 1000 * time_s) * (time_s % 3 < 0.2)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate, frame.pts = 48000, 0
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48000, stream.codec_context.frame_size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode())
    np.testing.assert_allclose(event_times(cut(path, 4.0, ANY), ENCODING)[1], [6], atol=0.01)


def test_samples_that_are_not_finite_are_missing(tmp_path: Path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * 16000).astype(np.float32)
    samples[8000:9600], samples[20000:20100], samples[24000] = np.nan, np.inf, -np.inf
    source, path = write_media(tmp_path / "source.mkv", 2.0), tmp_path / "clip.mkv"
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        video = written.add_stream_from_template(read.streams.video[0])
        audio = written.add_stream("pcm_f32le", rate=16000, layout="mono")
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = video
                written.mux(packet)
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        for packet in audio.encode(frame):
            written.mux(packet)
    (clip,) = cut(path)
    assert np.isfinite(clip.waveform).all() and np.abs(clip.waveform[8000:9600]).max() == 0
    assert np.abs(clip.waveform).std() > 0.1
    assert any(repair.startswith("audio: 0.1") and "missing" in repair for repair in clip.repairs)


def test_a_video_that_starts_late_is_a_repair(tmp_path: Path):
    def edit(kind: str, time_s: float) -> float | None:
        return None if kind == "video" and time_s < 2.87 else time_s

    clips = cut(write_media(tmp_path / "clip.mkv", 8.0, edit=edit))
    assert [repair for repair in repairs_of(clips) if "video" in repair] == [
        "video: 1.88 s missing, filled with the first frame"
    ]


@pytest.mark.parametrize("still_s", [0, 2])
def test_the_last_frame_is_displayed_for_its_duration(still_s: int, tmp_path: Path):
    """As in a video that ends with a still image, or consists of one."""
    source, path = tmp_path / "source.mkv", tmp_path / "clip.mkv"
    frames = [av.VideoFrame.from_ndarray(np.full((32, 48, 3), 99, np.uint8), "rgb24") for _ in range(100)]
    write_frames(source, "libx264", [frame.reformat(format="yuv420p") for frame in frames])
    with av.open(str(source)) as read, av.open(str(path), "w") as written:
        streams = {stream.index: written.add_stream_from_template(stream) for stream in read.streams}
        for packet in read.demux():
            if not packet.size or packet.pts is None:
                continue
            if packet.stream.type == "video":
                if packet.pts > 1000 * still_s:
                    continue
                if packet.pts == 1000 * still_s:
                    packet.duration = 4000 - packet.pts
            packet.stream = streams[packet.stream.index]
            written.mux(packet)
    clips = cut(path)
    assert len(clips) == 2 and abs(clips[1].frames[-1].mean() - 99) < 3


@pytest.mark.parametrize("size", [(1400, 2), (2, 1400)])
def test_a_shape_that_no_codec_stores_is_rejected(size: tuple[int, int], tmp_path: Path):
    """An error of the encoder would end the command."""
    frames = [av.VideoFrame.from_ndarray(np.zeros((size[1], size[0], 3), np.uint8), "rgb24") for _ in range(50)]
    write_frames(tmp_path / "clip.mkv", "ffv1", [frame.reformat(format="bgr0") for frame in frames])
    with pytest.raises(RejectedClip, match=r"^not supported: frames of .* allowed: 16384$"):
        cut(tmp_path / "clip.mkv")
