"""Few combinations of options in which every pair of values of two options occurs."""

from __future__ import annotations

import itertools
import random
from typing import Any


def pairwise(options: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """The same combinations at every call: greedy, from values of `options` by name."""
    draw = random.Random(0)
    names = list(options)
    missing = {
        (one, a, other, b)
        for one, other in itertools.combinations(range(len(names)), 2)
        for a in range(len(options[names[one]]))
        for b in range(len(options[names[other]]))
    }

    def pairs(chosen: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        places = itertools.combinations(range(len(names)), 2)
        return {(one, chosen[one], other, chosen[other]) for one, other in places}

    combinations = []
    while missing:
        one, a, other, b = min(missing)
        candidates = []
        for _ in range(30):
            chosen = [draw.randrange(len(options[name])) for name in names]
            chosen[one], chosen[other] = a, b
            candidates.append(tuple(chosen))
        best = max(candidates, key=lambda chosen: len(pairs(chosen) & missing))
        missing -= pairs(best)
        combinations.append(best)
    return [
        {name: options[name][at] for name, at in zip(names, chosen, strict=True)}
        for chosen in combinations
    ]
