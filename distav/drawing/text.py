"""Text in images: characters, fonts, and lines that are truncated to a width. Lengths are in pixels."""

import unicodedata
from functools import lru_cache

from PIL import ImageDraw, ImageFont

from distav.console import printable

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf")
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "DroidSansFallbackFull.ttf", "wqy-microhei.ttc")
"""Fonts for many scripts and for East Asian ones, if installed; Pillow's built-in font has ASCII glyphs only."""
_MAX_CHARACTERS = 400


def display_width(text: str) -> int:
    """Return the number of terminal columns that a text occupies."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def font_for(text: str, size: int) -> Font:
    """Return the font for a text: the built-in one for ASCII, otherwise an installed one for the script, if any."""
    if text.isascii():
        return _font((), size)
    return _font((*WIDE_FONTS, *FONTS) if display_width(text) > len(text) else FONTS, size)


@lru_cache
def _font(names: tuple[str, ...], size: int) -> Font:
    for name in names:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def fit_text(text: object, width: float, size: int) -> str:
    """Return one line of text that is at most `width` wide, ending in ... if it was truncated."""
    line = printable(text)[:_MAX_CHARACTERS]
    font = font_for(line, size)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def text_width(text: str, size: int) -> int:
    """Return the width of a line of text."""
    return int(font_for(text, size).getlength(text)) + 1


def draw_text(
    pen: ImageDraw.ImageDraw,
    position: tuple[float, float],
    text: object,
    width: float,
    size: int,
    color: str,
    anchor: str = "la",
) -> None:
    """Draw one line of text, truncated to a width.

    Args:
        pen: draws on the image.
        position: the point that `anchor` names.
        text: the text.
        width: largest width.
        size: height of the font.
        color: color of the text.
        anchor: see Pillow's text anchors: `la` is the upper left corner, `mm` the middle.
    """
    line = fit_text(text, width, size)
    font = font_for(line, size)
    if isinstance(font, ImageFont.FreeTypeFont):
        pen.text(position, line, color, font, anchor)
    else:
        pen.text(position, line, color, font)
