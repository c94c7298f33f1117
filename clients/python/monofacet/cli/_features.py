"""``monofacet features``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from monofacet import _exceptions as exceptions
from monofacet._types import FeatureCard, FeatureDetail, FeatureQuery, ModalityLabel
from monofacet.cli._out import check_folder
from monofacet.cli._session import Session, connected, print_json

COLOURS = {
    ModalityLabel.IMAGE: "cyan",
    ModalityLabel.TEXT: "yellow",
    ModalityLabel.CROSS: "green",
    ModalityLabel.UNRESOLVED: "white",
    ModalityLabel.DEAD: "bright_black",
}


@connected
def features(
    session: Session,
    feature: Annotated[
        int | None, typer.Argument(min=0, help="Show this feature alone, with its top images and texts.")
    ] = None,
    dictionary: Annotated[str, typer.Option(help="Dictionary; '' is the default one.")] = "",
    label: Annotated[
        list[str] | None, typer.Option(help="Only these: image, text, cross, unresolved, dead.")
    ] = None,
    name: Annotated[str, typer.Option(help="Only names that contain this.")] = "",
    min_mds: Annotated[float | None, typer.Option(min=0, max=1, help="Least energy MDS.")] = None,
    max_mds: Annotated[float | None, typer.Option(min=0, max=1, help="Largest energy MDS.")] = None,
    significant: Annotated[
        bool | None,
        typer.Option("--significant/--not-significant", help="Whether co-activation is significant."),
    ] = None,
    order_by: Annotated[
        str,
        typer.Option(help="feature, mds, coactivation, firing_rate_image, energy_image, name_auc, name, ..."),
    ] = "feature",
    descending: Annotated[bool, typer.Option("--descending", help="Largest first.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Show at most this many.")] = 20,
    save_images: Annotated[Path | None, typer.Option(help="With FEATURE: write its images here.")] = None,
) -> None:
    """List the features of a dictionary and what they are about, or show one of them."""
    check_folder(save_images)
    if feature is not None:
        detail = session.client.feature(feature, dictionary=dictionary)
        if session.as_json:
            print_json(detail)
        else:
            _show_detail(session, detail)
        if save_images is not None:
            _save_images(session, detail, save_images)
        return
    query: FeatureQuery = {
        "dictionary": dictionary,
        "labels": label or (),
        "name_contains": name,
        "min_mds": min_mds,
        "max_mds": max_mds,
        "coactivation_significant": significant,
        "order_by": order_by,  # type: ignore[typeddict-item]
        "descending": descending,
    }
    page = session.client.features_page(page_size=min(limit, 200), **query)
    cards = list(page.cards)
    token = page.next_page_token
    while token and len(cards) < limit:
        more = session.client.features_page(page_size=min(limit, 200), page_token=token, **query)
        cards.extend(more.cards)
        token = more.next_page_token
    cards = cards[:limit]
    if session.as_json:
        print_json(
            {"dictionary": page.dictionary, "bundle": page.bundle, "total": page.total, "features": cards}
        )
        return
    session.console.print(card_table(cards, f"{page.dictionary} of {page.bundle}"))
    if page.total > len(cards):
        session.progress.print(f"{len(cards)} of {page.total} features; --limit shows more")


def card_table(cards: list[FeatureCard], title: str) -> Table:
    """Lay out feature cards.

    Parameters
    ----------
    cards
        In the order of the rows.
    title
        Above the table.

    Returns
    -------
    rich.table.Table
        One row a feature.
    """
    table = Table(
        "feature",
        "label",
        "MDS",
        "interval",
        "co-act.",
        "fires image/text",
        "name",
        "AUC [95%] n",
        title=title,
    )
    for card in cards:
        table.add_row(
            str(card.feature),
            f"[{COLOURS[card.label]}]{card.label}[/]",
            number(card.mds_energy),
            f"{number(card.mds_energy_low)} - {number(card.mds_energy_high)}"
            if card.mds_energy is not None
            else "",
            number(card.coactivation) + (" *" if card.coactivation_significant else ""),
            f"{card.firing_rate_image:.1%} / {card.firing_rate_text:.1%}",
            escape(card.name),
            name_area(card),
        )
    return table


def number(value: float | None) -> str:
    """Write a measure.

    Parameters
    ----------
    value
        None if it is undefined.

    Returns
    -------
    str
        Two decimals, or nothing.
    """
    return "" if value is None else f"{value:.2f}"


def name_area(card: FeatureCard) -> str:
    """Write how well a feature detects its name.

    Parameters
    ----------
    card
        With a name or without.

    Returns
    -------
    str
        AUC, its interval and the samples it rests on, as far as they are known; nothing without a name.
    """
    if not card.name or card.name_auc_low is None:
        return number(card.name_auc) if card.name else ""
    interval = f"{number(card.name_auc_low)}, {number(card.name_auc_high)}"
    return escape(f"{number(card.name_auc)} [{interval}] {card.name_count}")


def _show_detail(session: Session, detail: FeatureDetail) -> None:
    session.console.print(card_table([detail.card], f"{detail.dictionary} of {detail.bundle}"))
    if detail.card.label_reason:
        session.console.print(f"{detail.card.label}: {escape(detail.card.label_reason)}.")
    session.console.print(_about_the_name(detail.card))
    table = Table("activation", "top images", "activation", "top texts")
    for image, text in itertools.zip_longest(detail.images, detail.texts):
        table.add_row(
            f"{image.activation:.2f}" if image else "",
            escape(image.caption) if image else "",
            f"{text.activation:.2f}" if text else "",
            escape(text.text) if text else "",
        )
    session.console.print(table)


def _about_the_name(card: FeatureCard) -> str:
    if not card.name:
        best = "no phrase of the captions goes with it"
        if card.name_auc is not None:
            best = f"the phrase it detects best has an AUC of {number(card.name_auc)}"
        return f"No name: {best}."
    if card.name_auc_low is None:
        return f"Name: {escape(card.name)}, AUC {number(card.name_auc)}."
    interval = f"{number(card.name_auc)} [{number(card.name_auc_low)}, {number(card.name_auc_high)}]"
    return escape(f"Name: {card.name}, AUC {interval} on {card.name_count} held-out samples with the phrase.")


def _save_images(session: Session, detail: FeatureDetail, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, example in enumerate(detail.images):
            if example.image is not None:
                example.image.save(folder / f"feature-{detail.card.feature}-{rank:02d}.png")
    except OSError as error:
        raise exceptions.InputError(f"cannot write to {folder}: {error.strerror}") from error
    session.progress.print(f"images are in {folder}")
