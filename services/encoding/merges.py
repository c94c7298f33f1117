"""Byte-pair encoding of one word in time n log n, with the merges of CLIP's own encoder, which takes n squared.

CLIP's encoder looks for the pair of neighbours that was learned first, merges all its occurrences from left to right,
and begins again. What a merge makes may belong to a pair that was learned still earlier, and waits until all
occurrences are merged: that order is kept here. A queue holds every pair of neighbours by when it was learned and where
it stands; those of one pair are taken out together.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def merge(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return the symbols of a word after all merges.

    Parameters
    ----------
    symbols : sequence of str
        Of a word, as it begins: one a byte.
    ranks : mapping
        When each pair was learned, from 0.
    """
    parts: list[str | None] = list(symbols)
    count = len(parts)
    before, after = list(range(-1, count - 1)), list(range(1, count + 1))
    queue: list[tuple[int, int]] = []

    def enqueue(place: int) -> None:
        right = after[place]
        if right < count:
            rank = ranks.get((parts[place], parts[right]))  # type: ignore[arg-type]
            if rank is not None:
                heapq.heappush(queue, (rank, place))

    for place in range(count - 1):
        enqueue(place)
    while queue:
        rank = queue[0][0]
        # All occurrences that are there now; what their merging makes is for later, even where it was learned earlier.
        places = []
        while queue and queue[0][0] == rank:
            places.append(heapq.heappop(queue)[1])
        merged = []
        for place in places:
            right = after[place]
            # Else a neighbour was merged since, into another pair or the one before of this kind.
            if right < count and ranks.get((parts[place], parts[right])) == rank:  # type: ignore[arg-type]
                parts[place] = f"{parts[place]}{parts[right]}"
                parts[right] = None
                after[place] = after[right]
                if after[place] < count:
                    before[after[place]] = place
                merged.append(place)
        for place in merged:
            if before[place] >= 0:
                enqueue(before[place])
            enqueue(place)
    return [part for part in parts if part is not None]
