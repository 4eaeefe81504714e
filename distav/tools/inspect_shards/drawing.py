"""The drawing of a contact sheet with Pillow.

Legend: T frames, H W pixels, N audio samples. All lengths are pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distav.tools.inspect_shards.text_table import printable
from distav.tools.inspect_shards.text_table import width as width_of

FRAME = (128, 96)
"""Width and height of the field in which a frame stands."""
TEXT, WAVE, PAD, GAP = 36, 36, 8, 10
"""Height of the two lines of text, and of a waveform; room inside a cell, and between cells."""
WIDEST = 1800
GROUND, CARD, INK, FAINT, SOUND, FAULT = "#e4e7eb", "#ffffff", "#1f2933", "#7b8794", "#2f6fb0", "#b3261e"
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf")
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc")
"""Fonts of many scripts, and of East Asian ones, where the system has them; Pillow's own is Latin."""


@dataclass(frozen=True)
class Cell:
    """One clip of a sheet: frames [T, H, W, 3] uint8 and sound [N] float32; None where it cannot be decoded."""

    key: str
    label: str
    note: str
    """What is told beside the key: of the sound, or why the clip cannot be decoded."""
    frames: np.ndarray | None = None
    sound: np.ndarray | None = None


def cell_size(frames: int) -> tuple[int, int]:
    """Return width and height of a cell with so many frames."""
    return frames * FRAME[0] + 2 * PAD, TEXT + FRAME[1] + WAVE + 3 * PAD


def places(count: int, frames: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the size of a sheet of so many cells, and where the upper left corner of each is."""
    width, height = cell_size(frames)
    columns = max(1, min(count, (WIDEST - GAP) // (width + GAP)))
    rows = -(-count // columns)
    corners = [
        (GAP + number % columns * (width + GAP), GAP + number // columns * (height + GAP)) for number in range(count)
    ]
    return (GAP + columns * (width + GAP), GAP + rows * (height + GAP)), corners


def draw(cells: Sequence[Cell], frames: int) -> Image.Image:
    """Return the sheet of some clips, so many frames of each."""
    size, corners = places(len(cells), frames)
    sheet = Image.new("RGB", size, GROUND)
    for cell, corner in zip(cells, corners, strict=True):
        sheet.paste(_card(cell, frames), corner)
    return sheet


def _card(cell: Cell, frames: int) -> Image.Image:
    width, height = cell_size(frames)
    card = Image.new("RGB", (width, height), CARD)
    pen = ImageDraw.Draw(card)
    inside = width - 2 * PAD
    whole = cell.frames is not None
    _write(pen, (PAD, PAD - 2), cell.label, inside, 15, INK)
    _write(pen, (PAD, PAD + TEXT // 2 - 1), f"{cell.key}   {cell.note}", inside, 12, FAINT if whole else FAULT)
    top = PAD + TEXT
    if cell.frames is not None and cell.sound is not None:
        shown = np.linspace(0, len(cell.frames) - 1, frames).round().astype(int)
        for place, number in enumerate(shown):
            picture = _fitted(cell.frames[number])
            left = PAD + place * FRAME[0] + (FRAME[0] - picture.width) // 2
            card.paste(picture, (left, top + (FRAME[1] - picture.height) // 2))
        _wave(pen, cell.sound, (PAD, top + FRAME[1] + PAD, inside, WAVE))
    else:
        pen.line((PAD, top, width - PAD, height - PAD), FAULT)
        pen.line((PAD, height - PAD, width - PAD, top), FAULT)
    return card


def _fitted(frame: np.ndarray) -> Image.Image:
    """Return a frame as large as its field allows; small ones keep their pixels apart."""
    height, width = frame.shape[:2]
    room = FRAME[0] - 4, FRAME[1]
    scale = min(room[0] / width, room[1] / height)
    way = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return Image.fromarray(frame).resize((max(1, round(width * scale)), max(1, round(height * scale))), way)


def _wave(pen: ImageDraw.ImageDraw, sound: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Draw least and greatest of each column's samples, as high as the box where the sound is loudest."""
    left, top, width, height = box
    middle = top + height / 2
    pen.line((left, middle, left + width, middle), FAINT)
    edges = np.linspace(0, len(sound), width + 1).astype(int)
    scale = (height / 2 - 1) / max(float(np.abs(sound).max(initial=0.0)), 1e-3)
    for column, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        piece = sound[first : max(last, first + 1)]
        if len(piece):
            ends = middle - float(piece.max()) * scale, middle - float(piece.min()) * scale
            pen.line((left + column, ends[0], left + column, ends[1]), SOUND)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, size: int, ink: str) -> None:
    """Write one line, cut where it would run over."""
    text = printable(text)[:400]
    font = _font(size, width_of(text) > len(text))
    if font.getlength(text) > width:
        while text and font.getlength(text + "...") > width:
            text = text[:-1]
        text += "..."
    pen.text(place, text, ink, font)


@lru_cache
def _font(size: int, wide: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in (*WIDE_FONTS, *FONTS) if wide else FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
