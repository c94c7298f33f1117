"""The options of a steering edit, which ``generate`` and ``preview`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from monofacet import _exceptions as exceptions
from monofacet._types import SteeringAttribute, SteeringEdit

FromImage = Annotated[Path | None, typer.Option(help="Edit: take the activations of this picture.")]
FromText = Annotated[str | None, typer.Option(help="Edit: take the activations of this text.")]
Quantile = Annotated[
    float | None, typer.Option(min=0, max=1, help="Edit: set to this quantile of the active values.")
]
Scale = Annotated[
    float | None, typer.Option(min=-16, max=16, help="Edit: multiply the activations; 0 removes them.")
]
Label = Annotated[str | None, typer.Option(help="Features to edit, by label: image, text, cross, ...")]
Feature = Annotated[list[int] | None, typer.Option(help="Feature to edit, by id; may be repeated.")]
Strength = Annotated[float, typer.Option(min=0, max=4, help="Of the edit: 0 none, 1 all of it.")]
Dictionary = Annotated[str, typer.Option(help="Whose features; '' is the default one.")]
Attribute = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=STRENGTH]",
        help="Attribute to turn, such as blue or red=0.5 (monofacet attributes lists them); may be repeated.",
    ),
]
Dose = Annotated[
    float | None,
    typer.Option(min=0, max=4, help="Rescale the whole change to this dose, as the generator sees it."),
]
Delta = Annotated[float | None, typer.Option(min=0, max=2, help="Rescale the whole change to this size.")]


def edits(
    from_image: Path | None,
    from_text: str | None,
    quantile: float | None,
    scale: float | None,
    label: str | None,
    features: list[int] | None,
    strength: float,
) -> list[SteeringEdit]:
    """Make the edit that the options ask for.

    Parameters
    ----------
    from_image, from_text, quantile, scale
        The target; at most one is not None.
    label, features
        What is edited; at most one is given.
    strength
        Of the edit.

    Returns
    -------
    list of SteeringEdit
        One, or none without any of these options.

    Raises
    ------
    InputError
        If the target or the features are missing, or given twice.
    """
    if from_image is not None and from_text is not None:
        raise exceptions.InputError("give --from-image or --from-text, not both")
    reference = from_image if from_image is not None else from_text
    targets = {"reference": reference, "quantile": quantile, "scale": scale}
    given = {name: value for name, value in targets.items() if value is not None}
    if not given and label is None and not features:
        return []
    if len(given) != 1 or (label is None) == (not features):
        raise exceptions.InputError(
            "an edit is one of --label and --feature, and one of --from-image, --from-text, --quantile and --scale"
        )
    chosen = label if label is not None else tuple(features or ())
    return [SteeringEdit(chosen, strength=strength, **given)]  # type: ignore[arg-type]  # one of the three


def attributes(turns: list[str] | None) -> list[SteeringAttribute]:
    """Read attributes to turn.

    Parameters
    ----------
    turns
        Each a name, or a name, an equals sign and a strength.

    Returns
    -------
    list of SteeringAttribute
        In order.

    Raises
    ------
    InputError
        If a strength is no number.
    """
    found = []
    for turn in turns or ():
        name, _, strength = turn.partition("=")
        try:
            found.append(SteeringAttribute(name, float(strength) if strength else 1.0))
        except ValueError as error:
            raise exceptions.InputError(f"--attribute {turn}: {strength!r} is no strength") from error
    return found
