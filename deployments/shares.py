"""Even shares between callers: whose turn it is when several wait."""

from __future__ import annotations


class Shares:
    """What each caller has had of something, in any one unit.

    Who comes begins where the others are: idleness saves nothing up, and leaving pays no debts.

    Source: Goyal, Vin and Cheng, "Start-time fair queueing" (1996).
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        # What the last one who was given something had had until then.
        self._now = 0.0

    def had(self, caller: str) -> float:
        """Return what a caller has had; the turn is of the one with least."""
        return max(self._now, self._had.get(caller, 0.0))

    def charge(self, caller: str, cost: float) -> None:
        """Count what a caller is given."""
        self._now = self.had(caller)
        self._had[caller] = self._now + cost
        # The others begin here, known or not.
        self._had = {name: had for name, had in self._had.items() if had > self._now}
