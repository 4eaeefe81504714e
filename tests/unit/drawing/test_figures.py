"""Figures of a run: sizes, colors of cells, reduction of many classes, and text that fits."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from distav.drawing.figures import (
    MAX_CLASSES,
    confusion_matrix,
    frame_rows,
    histogram,
    most_confused,
    short_number,
    spectrograms,
)
from distav.drawing.text import draw_text, fit_text, text_width
from distav.models.mel import mel_centers, mel_filters

WHITE = [255, 255, 255]
BLUE = [47, 111, 176]
ORANGE = [217, 130, 43]


def has_color(image: np.ndarray, color: list[int]) -> bool:
    """Return whether any pixel has a color."""
    return bool((image == np.array(color)).all(-1).any())


def ink(image: np.ndarray) -> int:
    """Return the number of pixels that are not white."""
    return int((image != 255).any(-1).sum())


def test_confusion_cells_have_the_color_of_their_fraction():
    image = confusion_matrix(np.array([[10, 0], [5, 5]]), ["a", "b"], "labels/given_vs_corrected", "given", "corrected")
    assert image.dtype == np.uint8
    cells = [image[-8 - 2 * 38 + row * 38 + 3, :, :] for row in (0, 1)]
    assert has_color(cells[0], [8, 48, 107]) and not has_color(cells[1], [8, 48, 107])
    assert has_color(cells[1], [107, 174, 214])


def test_confusion_has_names_titles_and_numbers():
    plain = confusion_matrix(np.zeros((2, 2), np.int64), ["", ""], "", "", "")
    named = confusion_matrix(np.zeros((2, 2), np.int64), ["dog", "cat"], "title", "given", "corrected")
    numbers = confusion_matrix(np.full((2, 2), 12), ["dog", "cat"], "title", "given", "corrected")
    assert ink(named) > ink(plain) + 100
    assert (numbers[-8 - 76 :] != named[-8 - 76 :]).any()


def test_confusion_of_many_classes_shows_the_most_confused_ones_and_the_rest():
    counts = np.eye(100, dtype=np.int64) * 10
    counts[70, 80] = 5
    counts[80, 90] = 3
    reduced, kept = most_confused(counts, 3)
    assert kept.tolist() == [70, 80, 90]
    assert reduced.tolist() == [[10, 5, 0, 0], [0, 10, 3, 0], [0, 0, 10, 0], [0, 0, 0, 970]]
    names = [f"class {index}" for index in range(100)]
    image = confusion_matrix(counts, names, "title", "given", "corrected")
    few = confusion_matrix(counts[:MAX_CLASSES, :MAX_CLASSES], names[:MAX_CLASSES], "title", "given", "corrected")
    assert few.shape[0] < image.shape[0] < few.shape[0] + 2 * 38 + 60


def test_numbers_of_cells_have_at_most_five_characters():
    numbers = [0, 950, 9999, 10_000, 155_300, 999_999, 1_000_000, 3_440_000, 12_000_000, 2 * 10**9]
    texts = [short_number(number) for number in numbers]
    assert texts == ["0", "950", "9999", "10k", "155k", "1000k", "1.0M", "3.4M", "12M", "2.0G"]
    assert all(text_width(text, 12) <= 38 for text in texts)


def test_histogram_stacks_parts():
    image = histogram({"kept": np.full(30, 0.99), "changed": np.full(10, 0.99)}, "labels", "confidence")
    column = image[:, 8 + 17 + 8 + 470]
    rows = {name: np.flatnonzero((column == np.array(color)).all(-1)) for name, color in
            (("kept", BLUE), ("changed", ORANGE))}  # fmt: skip
    assert len(rows["kept"]) == pytest.approx(3 * len(rows["changed"]), abs=4)
    assert rows["changed"].max() <= rows["kept"].min() + 1
    empty = histogram({"kept": np.zeros(0), "changed": np.array([np.nan])}, "labels", "confidence")
    assert empty.shape[0] == image.shape[0]


@pytest.mark.parametrize(("size", "frames", "shown"), [(16, 4, 4), (32, 20, 8), (224, 3, 3)])
def test_frames_are_enlarged_to_a_readable_size(size: int, frames: int, shown: int):
    clips = np.random.default_rng(0).integers(0, 255, (2, frames, size, size, 3)).astype(np.uint8)
    image = frame_rows(clips, [["given: dog"], ["given: cat"]])
    side = size * max(1, -(-128 // size))
    assert side >= 128 and image.shape[1] == shown * (side + 2) - 2
    assert image[0, 0].tolist() == clips[0, 0, 0, 0].tolist()
    assert image[side - 1, -1].tolist() == clips[0, -1, -1, -1].tolist()
    assert 0 < ink(image[side : image.shape[0] // 2]) < ink(image[: side // 2])


def test_captions_of_small_clips_fit():
    clips = np.zeros((1, 1, 16, 16, 3), np.uint8)
    image = frame_rows(clips, [["given: " + "a long name " * 20]])
    assert image[:, -2:].tolist() == np.full((image.shape[0], 2, 3), 255).tolist()


def test_spectrogram_axes():
    levels = np.zeros((1, 64, 63), np.float32)
    levels[0, 60, 40] = 1
    centers = mel_centers("htk", 64, 0.0, 8000.0)
    image = spectrograms(levels, centers, 0.016, [["given: dog"]])
    bright = np.argwhere((image == np.array([252, 253, 191])).all(-1))
    dark = np.argwhere((image == np.array([0, 0, 4])).all(-1))
    top, left, bottom, right = *dark.min(0), *dark.max(0)
    assert bottom - top + 1 == 128
    assert (bright.mean(0)[0] - top) / (bottom - top) == pytest.approx(1 - 60.5 / 64, abs=0.01)
    assert (bright.mean(0)[1] - left) / (right - left) == pytest.approx(40.5 / 63, abs=0.01)
    assert ink(image[top : bottom + 1, : left - 5]) > 200, "no frequencies"
    assert ink(image[bottom + 5 :, left:]) > 100, "no times"


@pytest.mark.parametrize("frames", [1, 63, 500, 3000])
def test_spectrograms_have_a_limited_width(frames: int):
    image = spectrograms(np.zeros((1, 80, frames), np.float32), mel_centers("slaney", 80, 0.0, 8000.0), 0.01, [[]])
    assert 400 < image.shape[1] < 1100


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_mel_centers_are_the_peaks_of_the_filters(scale: str):
    filters = mel_filters(scale, 8192, 40, 16000, 20.0, 8000.0)
    peaks = filters.argmax(0).numpy() * 16000 / 8192
    assert np.abs(peaks - mel_centers(scale, 40, 20.0, 8000.0)).max() < 2


def test_text_is_truncated_to_its_width():
    text = fit_text("a very long class name", 60, 12)
    assert text.endswith("...") and text_width(text, 12) <= 61
    assert fit_text("dog", 60, 12) == "dog"
    image = Image.new("RGB", (200, 20), "white")
    draw_text(ImageDraw.Draw(image), (0, 0), "w" * 100, 100, 12, "black")
    assert ink(np.asarray(image)[:, 101:]) == 0 and ink(np.asarray(image)) > 100
