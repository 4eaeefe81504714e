"""Figures of a run as arrays: confusion matrix, histogram, frames of clips, spectrograms.

All functions return an image [H, W, 3] uint8. Legend: C classes, M clips, T frames, F mel bins, L spectrogram frames.
Lengths are in pixels.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from distav.drawing.text import draw_text, text_width

BACKGROUND, INK, FAINT, PAPER = "#ffffff", "#1f2933", "#7b8794", "#f4f6f8"
BAR_COLORS = ("#2f6fb0", "#d9822b", "#3d9970")
MAX_CLASSES = 30
"""Rows of a confusion matrix without the row of the other classes."""
MAX_FRAMES = 8
"""Frames of a clip that are shown."""
MIN_FRAME = 128
"""Smallest height and width of a frame."""
PAD, TEXT, TITLE = 8, 12, 15
_LINE = 17
_CELL, _MAX_NAME = 38, 150
_PLOT_WIDTH, _PLOT_HEIGHT = 480, 200
_LEVELS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float64)
"""Colors of a spectrogram from the lowest to the highest level."""
_FRACTIONS = np.array([[255, 255, 255], [107, 174, 214], [8, 48, 107]], np.float64)
"""Colors of the fractions 0, 0.5 and 1."""


def most_confused(counts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a confusion matrix to the classes with the most confusions and one row and column for all others.

    Args:
        counts: [C, C].
        limit: number K of classes that are kept, less than C.

    Returns:
        Counts [K + 1, K + 1], the others last; and the kept classes [K] in ascending order.
    """
    errors = counts - np.diag(np.diag(counts))
    kept = np.sort(np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")[:limit])
    group = np.full(len(counts), limit)
    group[kept] = np.arange(limit)
    reduced = np.zeros((limit + 1, limit + 1), counts.dtype)
    np.add.at(reduced, (group[:, None], group[None, :]), counts)
    return reduced, kept


def confusion_matrix(
    counts: np.ndarray, classes: Sequence[str], title: str, row_title: str, column_title: str
) -> np.ndarray:
    """Draw a confusion matrix: counts as numbers, colored by the fraction of their row.

    More than `MAX_CLASSES` classes are reduced by `most_confused`, which the image states.

    Args:
        counts: [C, C].
        classes: C names.
        title, row_title, column_title: titles of the figure and of its axes.
    """
    names, note = list(classes), "number: clips; color: fraction of the row"
    if len(names) > MAX_CLASSES:
        note = f"the {MAX_CLASSES} of {len(names)} classes with the most confusions, the others in one row; {note}"
        counts, kept = most_confused(counts, MAX_CLASSES)
        names = [names[index] for index in kept] + ["(other classes)"]
    fractions = counts / np.maximum(1, counts.sum(1, keepdims=True))
    name_width = min(_MAX_NAME, max(text_width(name, TEXT) for name in names)) + PAD
    left, top = PAD + _LINE + name_width, 2 * PAD + 3 * _LINE + name_width
    size = _CELL * len(names)
    width = max(left + size + PAD, text_width(title, TITLE) + 2 * PAD, text_width(note, TEXT) + 2 * PAD)
    image = Image.new("RGB", (width, top + size + PAD), BACKGROUND)
    pen = ImageDraw.Draw(image)
    draw_text(pen, (PAD, PAD), title, width - 2 * PAD, TITLE, INK)
    draw_text(pen, (PAD, PAD + _LINE), note, width - 2 * PAD, TEXT, FAINT)
    draw_text(pen, (left + size / 2, PAD + 2 * _LINE + PAD), column_title, size + name_width, TEXT, INK, "ma")
    _draw_rotated(image, row_title, (PAD, top), _LINE, size, "center")
    for index, name in enumerate(names):
        near = top + index * _CELL
        draw_text(pen, (left - PAD / 2, near + _CELL / 2), name, name_width - PAD / 2, TEXT, INK, "rm")
        corner = (left + index * _CELL, top - name_width)
        _draw_rotated(image, name, corner, _CELL, name_width - PAD // 2, "bottom")
    colors = _interpolate(fractions, _FRACTIONS)
    for row, column in np.ndindex(counts.shape):
        corner = left + column * _CELL, top + row * _CELL
        red, green, blue = colors[row, column].tolist()
        pen.rectangle((*corner, corner[0] + _CELL - 1, corner[1] + _CELL - 1), (red, green, blue), FAINT)
        if counts[row, column]:
            ink = BACKGROUND if fractions[row, column] > 0.45 else INK
            center = corner[0] + _CELL / 2, corner[1] + _CELL / 2
            draw_text(pen, center, short_number(int(counts[row, column])), _CELL, TEXT, ink, "mm")
    return np.asarray(image)


def short_number(count: int) -> str:
    """Return a number of at most five characters: 950, 12k, 3.4M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            value = count / (1000 if unit == "k" else size)
            return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return str(count)


def histogram(parts: Mapping[str, np.ndarray], title: str, axis_title: str, num_bins: int = 20) -> np.ndarray:
    """Draw a histogram of values from 0 to 1, with a stacked color for each part.

    Args:
        parts: values of each part, [n] each; values that are not finite are left out. At most 3 parts.
        title, axis_title: titles of the figure and of the axis of the values.
        num_bins: number of bins.
    """
    edges = np.linspace(0, 1, num_bins + 1)
    counts = np.array([np.histogram(values[np.isfinite(values)], edges)[0] for values in parts.values()])
    top_count = max(1, int(counts.sum(0).max(initial=0)))
    left, top = PAD + max(text_width(short_number(top_count), TEXT), _LINE) + PAD, PAD + 3 * _LINE
    bottom, width = top + _PLOT_HEIGHT, max(left + _PLOT_WIDTH + 2 * PAD, text_width(title, TITLE) + 2 * PAD)
    image = Image.new("RGB", (width, bottom + 2 * _LINE + PAD), BACKGROUND)
    pen = ImageDraw.Draw(image)
    draw_text(pen, (PAD, PAD), title, width - 2 * PAD, TITLE, INK)
    x = left
    for (name, values), color in zip(parts.items(), BAR_COLORS, strict=False):
        pen.rectangle((x, PAD + _LINE + 4, x + 9, PAD + _LINE + 13), color)
        label = f"{name}: {len(values)} labels"
        draw_text(pen, (x + 14, PAD + _LINE + 2), label, width, TEXT, INK)
        x += 14 + text_width(label, TEXT) + 2 * PAD
    bar = _PLOT_WIDTH / num_bins
    for index in range(num_bins):
        base = float(bottom)
        for part, color in zip(counts, BAR_COLORS, strict=False):
            height = _PLOT_HEIGHT * part[index] / top_count
            if height:
                pen.rectangle((left + index * bar + 1, base - height, left + (index + 1) * bar - 1, base), color)
            base -= height
    pen.line((left, top, left, bottom, left + _PLOT_WIDTH, bottom), INK)
    for count, y in ((top_count, top), (0, bottom)):
        draw_text(pen, (left - 4, y), short_number(count), left, TEXT, INK, "rm")
    for tick in np.linspace(0, 1, 6):
        draw_text(pen, (left + tick * _PLOT_WIDTH, bottom + 4), f"{tick:.1f}", 40, TEXT, INK, "ma")
    draw_text(pen, (left + _PLOT_WIDTH / 2, bottom + 4 + _LINE), axis_title, _PLOT_WIDTH, TEXT, INK, "ma")
    return np.asarray(image)


def frame_rows(clips: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Draw a row of frames for each clip, at least `MIN_FRAME` high and wide, with lines of text under it.

    Of more than `MAX_FRAMES` frames, evenly spaced ones are shown, which the image states.

    Args:
        clips: [M, T, H, W, 3] uint8.
        captions: lines of text of each clip.
    """
    num_frames, (height, width) = clips.shape[1], clips.shape[2:4]
    shown = np.linspace(0, num_frames - 1, min(num_frames, MAX_FRAMES)).round().astype(int)
    scale = max(1, math.ceil(MIN_FRAME / min(height, width)))
    frame_width, frame_height = width * scale, height * scale
    note = [f"{len(shown)} of {num_frames} frames"] if len(shown) < num_frames else []
    lines = [[*caption, *note] for caption in captions]
    row_height = frame_height + PAD + _LINE * max(map(len, lines), default=0) + PAD
    size = max(len(shown) * (frame_width + 2) - 2, 2 * MIN_FRAME), row_height
    rows = []
    for clip, texts in zip(clips, lines, strict=True):
        row = Image.new("RGB", size, BACKGROUND)
        for place, number in enumerate(shown):
            enlarged = clip[number].repeat(scale, 0).repeat(scale, 1)
            row.paste(Image.fromarray(enlarged), (place * (frame_width + 2), 0))
        pen = ImageDraw.Draw(row)
        for index, text in enumerate(texts):
            draw_text(pen, (2, frame_height + PAD // 2 + index * _LINE), text, size[0] - 4, TEXT, INK)
        rows.append(np.asarray(row))
    return np.concatenate(rows)


def spectrograms(
    levels: np.ndarray, centers_hz: np.ndarray, frame_distance_s: float, captions: Sequence[Sequence[str]]
) -> np.ndarray:
    """Draw spectrograms one below the other, with axes in seconds and Hz; the colors span the levels of each clip.

    Args:
        levels: [M, F, L].
        centers_hz: [F] center frequencies of the mel bins, ascending.
        frame_distance_s: distance of two spectrogram frames in seconds.
        captions: lines of text of each clip.
    """
    num_mels, num_frames = levels.shape[1:]
    width = num_frames * max(1, round(_PLOT_WIDTH / num_frames)) if num_frames < 2 * _PLOT_WIDTH else 2 * _PLOT_WIDTH
    height = num_mels * max(1, math.ceil(MIN_FRAME / num_mels))
    left, num_lines = PAD + text_width("16000 Hz", TEXT) + 6, max(map(len, captions), default=0)
    top = PAD + num_lines * _LINE
    size = left + width + 3 * PAD, top + height + _LINE + PAD
    rows = []
    for clip, texts in zip(levels, captions, strict=True):
        row = Image.new("RGB", size, BACKGROUND)
        pen = ImageDraw.Draw(row)
        for index, text in enumerate(texts):
            draw_text(pen, (left, PAD // 2 + index * _LINE), text, width, TEXT, INK)
        low, high = float(clip.min()), float(clip.max())
        colors = _interpolate((clip[::-1] - low) / (high - low + 1e-6), _LEVELS)
        row.paste(Image.fromarray(colors).resize((width, height), Image.Resampling.NEAREST), (left, top))
        for hz, position in _frequency_ticks(centers_hz, height):
            y = top + height - position
            pen.line((left - 4, y, left - 1, y), INK)
            draw_text(pen, (left - 6, y), f"{hz} Hz", left, TEXT, INK, "rm")
        draw_text(pen, (left - 14, top + height + 4), "mel scale", left, TEXT, FAINT, "ra")
        for seconds in _time_ticks(num_frames * frame_distance_s):
            x = left + width * seconds / (num_frames * frame_distance_s)
            pen.line((x, top + height, x, top + height + 3), INK)
            draw_text(pen, (x, top + height + 4), f"{seconds:g} s", 60, TEXT, INK, "ma")
        rows.append(np.asarray(row))
    return np.concatenate(rows)


def _frequency_ticks(centers_hz: np.ndarray, height: int) -> list[tuple[int, float]]:
    """Return frequencies and their distances from the bottom, at least a line of text apart, the highest first."""
    ticks: list[tuple[int, float]] = []
    for hz in (16000, 8000, 4000, 2000, 1000, 500, 250, 125):
        if centers_hz[0] <= hz <= centers_hz[-1]:
            bins = float(np.interp(hz, centers_hz, np.arange(len(centers_hz)))) + 0.5
            position = height * bins / len(centers_hz)
            if not ticks or ticks[-1][1] - position >= TEXT + 2:
                ticks.append((hz, position))
    return ticks


def _time_ticks(duration_s: float) -> list[float]:
    """Return at most 9 round times from 0 to a duration."""
    magnitude = 10 ** math.floor(math.log10(duration_s / 8))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * magnitude) * 8 >= duration_s)
    return [round(index * step, 6) for index in range(int(duration_s / step + 1e-6) + 1)]


def _interpolate(values: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return the colors of values from 0 to 1: [..., 3] uint8."""
    positions = np.linspace(0, 1, len(colors))
    channels = [np.interp(values, positions, colors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _draw_rotated(image: Image.Image, text: str, corner: tuple[int, int], width: int, height: int, align: str) -> None:
    """Draw a line of text that reads upward in a box, at its bottom or centered.

    Args:
        image: the image.
        text: the text, truncated to the height of the box.
        corner: upper left corner of the box.
        width, height: size of the box.
        align: `bottom` or `center`.
    """
    line = Image.new("RGB", (height, width), BACKGROUND)
    position = (height / 2, width / 2) if align == "center" else (0, width / 2)
    draw_text(ImageDraw.Draw(line), position, text, height, TEXT, INK, "mm" if align == "center" else "lm")
    image.paste(line.transpose(Image.Transpose.ROTATE_90), corner)
