"""Images inside a page, and the look of matplotlib's figures."""

from __future__ import annotations

import base64
import functools
import io
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image

from kdtrain.config.program import printable

WIDTH_IN, DPI = 11.0, 150
INK, SOFT, LINE, LABEL, EDGE = "#1f2937", "#6b7280", "#e5e7eb", "#4b5563", "#9ca3af"
LEGEND: dict[str, Any] = {"frameon": False, "labelcolor": "#374151"}
SMALL: dict[str, Any] = {"va": "center", "fontsize": 7.5}


def drawable(text: str) -> str:
    """The text with escapes for $ and for characters that the figure's font lacks."""
    known = _characters()
    text = printable(text, lines=True)
    shown = (c if ord(c) in known or c == "\n" else ascii(c)[1:-1] for c in text)
    return "".join(shown).replace("$", r"\$")


@functools.cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def face(image: np.ndarray) -> str:
    """A (3, H, W) uint8 image as a data URI: JPEG, half as long as PNG."""
    buffer = io.BytesIO()
    whole = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    whole.save(buffer, format="jpeg", quality=88, subsampling=0, optimize=True)
    return data_uri(buffer.getvalue(), "jpeg")


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file as the source of an image inside a page."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
