"""Even shares between callers: whose turn it is when several wait."""

from __future__ import annotations


class Shares:
    """What each caller has had of something, in any one unit.

    A new caller begins at the level of the others: being idle earns no credit, and leaving clears no debt.

    Source: Goyal, Vin and Cheng, "Start-time fair queueing" (1996).
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        # What the caller who was served last had been given before that.
        self._now = 0.0

    def had(self, caller: str) -> float:
        """Return what a caller has had; the turn is of the one with least."""
        return max(self._now, self._had.get(caller, 0.0))

    def charge(self, caller: str, cost: float) -> None:
        """Count what a caller is given."""
        self._now = self.had(caller)
        self._had[caller] = self._now + cost
        # Callers below that count as being there, so they need not be stored.
        self._had = {name: had for name, had in self._had.items() if had > self._now}
