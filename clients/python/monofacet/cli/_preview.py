"""``monofacet preview``."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._types import SteeringPreview
from monofacet.cli._edits import (
    Attribute,
    Delta,
    Dictionary,
    Dose,
    Feature,
    FromImage,
    FromText,
    Label,
    Quantile,
    Scale,
    Strength,
    attributes,
    edits,
)
from monofacet.cli._inputs import Truncate, read_inputs
from monofacet.cli._session import Session, connected, print_json


@connected
def preview(
    session: Session,
    value: Annotated[str, typer.Argument(metavar="INPUT", help="An image file or a text.")],
    from_image: FromImage = None,
    from_text: FromText = None,
    quantile: Quantile = None,
    scale: Scale = None,
    label: Label = None,
    feature: Feature = None,
    strength: Strength = 1.0,
    dictionary: Dictionary = "",
    delta: Delta = None,
    attribute: Attribute = None,
    dose: Dose = None,
    captions: Annotated[int, typer.Option(min=0, max=100, help="Nearest captions listed.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="Strongest features listed, before and after.")] = 20,
    truncate: Truncate = False,
) -> None:
    """Tell what an edit does to an embedding, without making an image. Every bundle can.

    An edit is features (--label or --feature) and a target (--from-image, --from-text, --quantile or --scale), or an
    attribute of the bundle (--attribute).
    """
    asked = edits(from_image, from_text, quantile, scale, label, feature, strength)
    turned = attributes(attribute)
    if not asked and not turned:
        raise exceptions.InputError("give an edit: --label or --feature, and a target; or --attribute")
    inputs = read_inputs([value], ())
    if len(inputs) != 1:
        raise exceptions.InputError(f"{value} is {len(inputs)} inputs; give one image or text")
    result = session.client.preview_steering(
        inputs[0][1],
        asked,
        dictionary=dictionary,
        delta=delta,
        attributes=turned,
        dose=dose,
        max_captions=captions,
        max_features=top,
        truncate=truncate,
    )
    if session.as_json:
        print_json(result)
    else:
        _show(session, result)


def _show(session: Session, result: SteeringPreview) -> None:
    before, after = (
        dict(zip(features.indices.tolist(), features.values.tolist(), strict=True))
        for features in (result.features, result.steered_features)
    )
    dose = "" if result.dose is None else f", dose {result.dose:.2f}"
    steering = f"steering {result.delta:.3f}{dose}"
    table = Table("feature", "before", "after", title=steering, highlight=True)
    for feature in dict.fromkeys([*after, *before]):
        values = (f"{side[feature]:.3f}" if feature in side else "" for side in (before, after))
        table.add_row(str(feature), *values)
    session.console.print(table)
    near = Table("nearest captions before", "cosine", "after", "cosine", highlight=True)
    for pair in itertools.zip_longest(result.captions, result.steered_captions):
        near.add_row(
            *(
                cell
                for one in pair
                for cell in ((escape(one.text), f"{one.similarity:.3f}") if one else ("", ""))
            )
        )
    if result.captions or result.steered_captions:
        session.console.print(near)
