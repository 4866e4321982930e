"""Several sources of rows as one, in shares that their weights say.

Row n takes the place x = (n GOLDEN + offset) mod 2^32 on a circle that is divided among the sources by
their weights. Steps of the golden section spread evenly over any arc (Steinhaus's three distances; Knuth,
TAOCP vol. 3, 6.4), so after n rows a source has given its share of them but for O(log n) rows, and no
source bunches up. How many of the first n places lie on an arc has a closed form, so that row n is known
from its number alone: which source it is of, and which of that source's rows.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from jaxgpt.data.packing import ENDLESS, Row, Rows, StreamRows
from jaxgpt.errors import require

CIRCLE = 1 << 32
GOLDEN = 2654435769
"""The odd number nearest to 2^32 / 1.618..."""


class MixedRows:
    """Rows of several sources, each source's in its own order and none left out.

    With a seed the stream is endless and mixes endless sources by weight; what the seed decides is where
    on the circle it begins. Without one, all rows of one source follow those of the one before.

    Args:
      sources: of rows of one length and padding; a column that only some have is 0 in the others.
      weights: of each source, the share of the rows that it gives; any positive numbers.
      seed: of the order, or None.

    Raises:
      UserError: no sources, weights that are not positive, sources that do not fit each other, or
        streams, whose rows go on from batch to batch.
    """

    def __init__(self, sources: Sequence[Rows], weights: Sequence[float], seed: int | None) -> None:
        require(
            len(sources) == len(weights) > 0 and all(0 < w < math.inf for w in weights),
            f"{len(sources)} sources have the weights {list(weights)}; give each source one above 0.",
        )
        for name in ("length", "pad"):
            values = [getattr(source, name) for source in sources]
            require(len(set(values)) == 1, f"sources of one mix have the {name} {values}; give all one.")
        require(
            not any(isinstance(source, StreamRows) for source in sources),
            "contiguous text goes on from batch to batch and cannot be mixed; set data.contiguous to False.",
        )
        self.sources, self.seed = list(sources), seed
        self.length, self.pad = sources[0].length, sources[0].pad
        self.masked = all(source.masked for source in sources)
        self._blank = {name: np.zeros_like(c) for s in sources for name, c in s[0].items()}
        self._shares = [weight / sum(weights) for weight in weights]
        self._edges = [round(CIRCLE * min(share, 1.0)) for share in accumulate(self._shares, initial=0.0)]
        self._edges[-1] = CIRCLE
        self._offset = 0 if seed is None else int(np.random.default_rng(seed).integers(CIRCLE))
        told = [seed, *self._edges, *(source.fingerprint for source in sources)]
        self.fingerprint = f"mix-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"

    @property
    def epoch_rows(self) -> int:
        """Rows until every source has given its (first) epoch once."""
        if self.seed is None:
            return len(self)
        pairs = zip(self.sources, self._shares, strict=True)
        return math.ceil(max(source.epoch_rows / share for source, share in pairs))

    def __len__(self) -> int:
        return ENDLESS if self.seed is not None else sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Row:
        number, row = self.place(int(index))
        return self._blank | self.sources[number][row]

    def given(self, count: int) -> list[int]:
        """Of the first `count` rows, how many each source has given; of an endless stream."""
        beyond = [self._beyond(edge, count) for edge in self._edges]
        return [a - b for a, b in pairwise(beyond)]

    def place(self, index: int) -> tuple[int, int]:
        """The source of a row, and the row's number in it."""
        if self.seed is None:
            ends = list(accumulate(map(len, self.sources)))
            number = bisect_right(ends, index)
            return number, index - (ends[number - 1] if number else 0)
        x = (GOLDEN * index + self._offset) % CIRCLE
        number = bisect_right(self._edges, x) - 1
        low, high = self._edges[number : number + 2]
        return number, self._beyond(low, index) - self._beyond(high, index)

    def _beyond(self, edge: int, count: int) -> int:
        """How many of the first `count` places are at `edge` or beyond it."""
        turned = floor_sum(count, CIRCLE, GOLDEN, self._offset + CIRCLE - edge)
        return turned - floor_sum(count, CIRCLE, GOLDEN, self._offset)


def floor_sum(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over i = 0 .. n - 1, of whole numbers not below 0 (m above 0).

    By Euclid's algorithm on (a, m), as points below a line are counted (Graham, Knuth and Patashnik,
    Concrete Mathematics, section 3.5): O(log m) steps.
    """
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        n, b = divmod(a % m * n + b % m, m)
        a, m = m, a % m
    return total
