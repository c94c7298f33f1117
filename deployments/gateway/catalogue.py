"""What the gateway knows of the bundle: names, tables and cards; no weights."""

from __future__ import annotations

from dataclasses import dataclass

from services.bundle.load import Bundle
from services.errors import UnknownDictionary
from services.imaging.dose import Attributes
from services.modality.tables import Cards, ModalityTable


@dataclass(frozen=True)
class Catalogue:
    """The tables of one bundle, read once.

    Attributes
    ----------
    bundle
        The bundle.
    tables, cards
        Modality tables and feature cards, by dictionary; a dictionary may have none.
    attributes
        Doses and attributes; None in a bundle without.
    """

    bundle: Bundle
    tables: dict[str, ModalityTable]
    cards: dict[str, Cards]
    attributes: Attributes | None = None

    @classmethod
    def read(cls, bundle: Bundle) -> Catalogue:
        """Read every table of `bundle`."""
        manifest = bundle.manifest
        return cls(
            bundle,
            {name: bundle.modality(name) for name in manifest.modality},
            {name: bundle.cards(name) for name in manifest.cards.tables},
            bundle.attributes(),
        )

    def resolve(self, name: str, field: str) -> str:
        """Return `name`, or the default dictionary where it is empty.

        Raises
        ------
        UnknownDictionary
            Blaming the request's `field`.
        """
        name = name or self.bundle.manifest.default_dictionary
        if name not in self.bundle.manifest.dictionaries:
            raise UnknownDictionary.named(name, self.bundle.manifest.dictionaries, field)
        return name

    def table(self, name: str, field: str) -> tuple[str, ModalityTable]:
        """Return a dictionary's full name and its modality table.

        Raises
        ------
        UnknownDictionary
            When there is no such dictionary, or none with a table.
        """
        name = self.resolve(name, field)
        if name not in self.tables:
            message = f"dictionary {name!r} has no modality table"
            raise UnknownDictionary(message, [(field, message)])
        return name, self.tables[name]
