"""``monofacet attributes``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from monofacet._types import Attribute, AttributeShare
from monofacet.cli._session import Session, connected, print_json


@connected
def attributes(
    session: Session,
    name: Annotated[str | None, typer.Argument(help="Show this attribute alone, with its features.")] = None,
) -> None:
    """List the attributes that pictures can be steered by, and what each was measured to do.

    Turn one with: monofacet generate "red heart" --attribute blue
    """
    if name is not None:
        one = session.client.attribute(name)
        if session.as_json:
            print_json(one)
        else:
            session.console.print(_table([one], "attribute"))
            features = Table("feature", "weight", title=f"features of {escape(one.features.dictionary)}")
            for feature, value in zip(one.features.indices, one.features.values, strict=True):
                features.add_row(str(feature), f"{value:+.3f}")
            session.console.print(features)
        return
    found = session.client.attributes()
    if session.as_json:
        print_json(found)
    elif not found.attributes:
        session.console.print(f"{escape(found.bundle)} has no attributes")
    else:
        session.console.print(_table(list(found.attributes), f"attributes of {escape(found.bundle)}"))


def _table(several: list[Attribute], title: str) -> Table:
    table = Table(
        "attribute",
        "group",
        "hit",
        "without it",
        "concept kept",
        "known without it",
        "off data",
        "dose",
        "pairs",
    )
    table.title = title
    for one in several:
        m = one.measures
        measured = (
            [""] * 5
            if m is None
            else [
                _share(m.hit),
                f"{m.hit_before.value:.0%}",
                _share(m.concept_kept),
                f"{m.concept_kept_before.value:.0%}",
                f"{m.off_distribution:.2f}",
            ]
        )
        table.add_row(escape(one.name), escape(one.group), *measured, f"{one.dose:.2f}", str(one.pairs))
    return table


def _share(share: AttributeShare) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]".replace("[", "\\[")
