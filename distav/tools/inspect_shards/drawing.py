"""Drawing of a contact sheet with Pillow.

Legend: T frames, H W pixels, N audio samples. All lengths are in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from distav.drawing.text import draw_text

FRAME = (128, 96)
"""Width and height of the box of a frame."""
TEXT, WAVE, PAD, GAP = 36, 36, 8, 10
"""Height of the two lines of text and of a waveform; padding within a cell and gap between cells."""
MAX_WIDTH = 1800
"""Largest width of a sheet with more than one column."""
BACKGROUND, CARD, INK, FAINT, WAVE_COLOR, FAULT = "#e4e7eb", "#ffffff", "#1f2933", "#7b8794", "#2f6fb0", "#b3261e"


@dataclass(frozen=True)
class Cell:
    """One clip of a sheet.

    Attributes:
        key: key of the clip.
        label: class names of the clip.
        note: shown beside the key: properties of the audio, or why the clip cannot be decoded.
        frames: [T, H, W, 3] uint8; None if the clip has no video or cannot be decoded.
        audio: [N] float32; None if the clip has no audio or cannot be decoded.
    """

    key: str
    label: str
    note: str
    frames: np.ndarray | None = None
    audio: np.ndarray | None = None

    @property
    def is_fault(self) -> bool:
        """Whether the clip cannot be decoded."""
        return self.frames is None and self.audio is None


def cell_size(frames: int) -> tuple[int, int]:
    """Return width and height of a cell with a number of frames."""
    return frames * FRAME[0] + 2 * PAD, TEXT + FRAME[1] + WAVE + 3 * PAD


def layout(count: int, frames: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Return the size of a sheet with `count` cells, and the upper left corner of each cell."""
    width, height = cell_size(frames)
    columns = max(1, min(count, (MAX_WIDTH - GAP) // (width + GAP)))
    rows = -(-count // columns)
    corners = [
        (GAP + index % columns * (width + GAP), GAP + index // columns * (height + GAP)) for index in range(count)
    ]
    return (GAP + columns * (width + GAP), GAP + rows * (height + GAP)), corners


def draw(cells: Sequence[Cell], frames: int) -> Image.Image:
    """Return the sheet of some clips, with a number of frames for each."""
    size, corners = layout(len(cells), frames)
    sheet = Image.new("RGB", size, BACKGROUND)
    for cell, corner in zip(cells, corners, strict=True):
        sheet.paste(_draw_cell(cell, frames), corner)
    return sheet


def _draw_cell(cell: Cell, frames: int) -> Image.Image:
    width, height = cell_size(frames)
    card = Image.new("RGB", (width, height), CARD)
    pen = ImageDraw.Draw(card)
    inner_width = width - 2 * PAD
    note_color = FAULT if cell.is_fault else FAINT
    draw_text(pen, (PAD, PAD - 2), cell.label, inner_width, 15, INK)
    draw_text(pen, (PAD, PAD + TEXT // 2 - 1), f"{cell.key}   {cell.note}", inner_width, 12, note_color)
    top = PAD + TEXT
    wave_top = top + FRAME[1] + PAD
    if cell.is_fault:
        pen.line((PAD, top, width - PAD, height - PAD), FAULT)
        pen.line((PAD, height - PAD, width - PAD, top), FAULT)
        return card
    if cell.frames is None:
        draw_text(pen, (PAD, top + FRAME[1] // 2 - 8), "no video", inner_width, 15, FAINT)
    else:
        numbers = np.linspace(0, len(cell.frames) - 1, frames).round().astype(int)
        for index, number in enumerate(numbers):
            image = _resize(cell.frames[number])
            left = PAD + index * FRAME[0] + (FRAME[0] - image.width) // 2
            card.paste(image, (left, top + (FRAME[1] - image.height) // 2))
    if cell.audio is None:
        draw_text(pen, (PAD, wave_top + WAVE // 2 - 8), "no audio", inner_width, 15, FAINT)
    else:
        _draw_waveform(pen, cell.audio, (PAD, wave_top, inner_width, WAVE))
    return card


def _resize(frame: np.ndarray) -> Image.Image:
    """Return a frame scaled to its box; strongly enlarged frames show their pixels."""
    height, width = frame.shape[:2]
    box = FRAME[0] - 4, FRAME[1]
    scale = min(box[0] / width, box[1] / height)
    resampling = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(frame).resize(size, resampling)


def _draw_waveform(pen: ImageDraw.ImageDraw, audio: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Draw minimum and maximum of the samples of each column, scaled so that the peak fills the box."""
    left, top, width, height = box
    middle = top + height / 2
    pen.line((left, middle, left + width, middle), FAINT)
    edges = np.linspace(0, len(audio), width + 1).astype(int)
    scale = (height / 2 - 1) / max(float(np.abs(audio).max(initial=0.0)), 1e-3)
    for column, (first, end) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        samples = audio[first : max(end, first + 1)]
        if len(samples):
            ends = middle - float(samples.max()) * scale, middle - float(samples.min()) * scale
            pen.line((left + column, ends[0], left + column, ends[1]), WAVE_COLOR)
