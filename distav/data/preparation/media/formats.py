"""Formats of media files that need special treatment."""

from pathlib import Path

from av.container import InputContainer

from distav.data.preparation.encoding import RejectedClip

_TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")
"""Formats of text art, as which FFmpeg reads text and binary files with some extensions, such as .txt."""
_IMAGE_FORMATS = ("image2", "_pipe")
"""Ends of the names of FFmpeg's formats for single images."""
_ESTIMATED_FORMATS = ("aac", "ac3", "eac3", "dts", "truehd", "mlp")
"""Formats without a declared duration; FFmpeg estimates it from the bit rate of the first packets."""
_MP3_DURATION_TAGS = (b"Xing", b"Info", b"VBRI")
"""Tags in the first frame of an MP3 file that declares its duration."""
_MP3_HEAD_BYTES = 4096


def check_format(container: InputContainer) -> None:
    """Close and reject an image, or a text file that FFmpeg reads as frames of characters.

    Raises:
        RejectedClip: for such a file.
    """
    name = container.format.name
    if name in _TEXT_FORMATS or name.endswith(_IMAGE_FORMATS):
        container.close()
        raise RejectedClip(f"not a video: the file is {'text' if name in _TEXT_FORMATS else 'an image'}")


def declares_duration(container: InputContainer, path: Path) -> bool:
    """Return whether the duration of a file is declared in it, and not estimated from its size."""
    name = container.format.name
    if name != "mp3":
        return name not in _ESTIMATED_FORMATS
    with open(path, "rb") as file:
        tag = file.read(10)
        if tag[:3] == b"ID3":  # The size of the tag, which may contain images, has seven bits per byte.
            size = 0
            for byte in tag[6:10]:
                size = size << 7 | byte & 127
            file.seek(10 + size)
        head = file.read(_MP3_HEAD_BYTES)
    return any(mark in head for mark in _MP3_DURATION_TAGS)


def missing_factor(container: InputContainer, path: Path) -> float:
    """Return by how much longer a truncated WAV file was; 1 for complete files and other formats.

    FFmpeg computes the duration of a WAV file from the bytes that exist.
    """
    if container.format.name != "wav":
        return 1.0
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] != b"RIFF":  # Files of 4 GiB and more have their size in another place.
        return 1.0
    return max(1.0, (int.from_bytes(head[4:], "little") + 8) / path.stat().st_size)
