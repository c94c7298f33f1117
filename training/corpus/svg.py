"""SVG documents from iconify JSON, restyled and rasterised.

Restyling draws the same picture with another pen: an outline around every shape, its fills kept or turned
white. It teaches the image tower that colour and shading are the artist's, and the shape is the concept's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

_SHAPES = ("path", "circle", "ellipse", "rect", "polygon", "polyline")


class Style(StrEnum):
    """How a drawing is rendered."""

    PLAIN = "plain"
    OUTLINED = "outlined"  # a dark line around every shape, fills kept
    LINES = "lines"  # a dark line around every shape, fills white


def _css(style: Style, stroke_width: float) -> str:
    if style is Style.PLAIN:
        return ""
    shapes = ",".join(_SHAPES)
    rules = (
        f"{shapes}{{stroke:#000;stroke-width:{stroke_width:.3f};stroke-linejoin:round;stroke-linecap:round}}"
    )
    if style is Style.LINES:
        rules += f"{shapes}{{fill:#fff}}[fill=none]{{fill:none}}"
    return f"<style>{rules}</style>"


def document(
    icon: Mapping[str, Any], defaults: Mapping[str, Any], style: Style = Style.PLAIN, stroke: float = 0.02
) -> str:
    """Return the SVG document of one icon.

    Parameters
    ----------
    icon : Mapping
        The icon's entry: ``body`` and optionally ``left``, ``top``, ``width``, ``height`` (user units).
    defaults : Mapping
        The set's own ``width`` and ``height``.
    style : Style
        How to draw it.
    stroke : float
        Width of an added line as a share of the drawing's width.
    """
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", defaults.get("width", 16))
    height = icon.get("height", defaults.get("height", 16))
    body = icon["body"].replace("currentColor", "#000")
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{_css(style, stroke * max(width, height))}{body}</svg>"
    )


def rasterise(svg: str, size: int) -> np.ndarray:
    """Draw an SVG document on a white square, centred, its longer side filling the square.

    Parameters
    ----------
    svg : str
        The document; its ``width`` and ``height`` attributes give the aspect ratio.
    size : int
        Side of the square, pixels.

    Returns
    -------
    np.ndarray
        RGB, uint8 [size, size, 3].
    """
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, background="#ffffff")
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    if image.size == (size, size):
        return np.asarray(image)
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)
