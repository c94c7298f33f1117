"""Several pictures as one."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image

GAP = 4
GROUND = (255, 255, 255)


def grid(rows: Sequence[Sequence[PIL.Image.Image | None]]) -> PIL.Image.Image:
    """Put pictures of one size into rows and columns.

    Parameters
    ----------
    rows
        Of pictures; None leaves a gap. A single long row is broken into a square.

    Returns
    -------
    PIL.Image.Image
        RGB, on white.
    """
    if len(rows) == 1 and len(rows[0]) > 4:
        columns = -(-len(rows[0]) // int(len(rows[0]) ** 0.5))
        rows = [rows[0][start : start + columns] for start in range(0, len(rows[0]), columns)]
    pictures = [picture for row in rows for picture in row if picture is not None]
    width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    columns = max(map(len, rows))
    sheet = PIL.Image.new("RGB", (columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), GROUND)
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            if picture is not None:
                sheet.paste(picture, (GAP + across * (width + GAP), GAP + down * (height + GAP)))
    return sheet
