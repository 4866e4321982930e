"""Which documents stood there before: keys of each, computed by jobs, and the decision over all of them.

Shapes: D documents, P permutations of MinHash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config.filters import Filters
from jaxgpt.errors import UserError
from jaxgpt.text.filters import exact_key, shingles

PERMUTATIONS = 128
TOGETHER = 4096
"""n-grams hashed at a time: datasketch makes a table [n-grams, P] of them."""
EARLIER = 8
"""Earlier documents of a bucket that one is compared with."""


def key_function(config: Filters) -> Callable[[str], np.ndarray]:
    """What a document is told by: one hash [1], or its MinHash [P] (Broder 1997), uint64.

    Raises:
      UserError: datasketch is not installed.
    """
    if config.duplicates == "exact":
        return lambda text: np.asarray([exact_key(text)], np.uint64)
    minhash = _datasketch().MinHash

    def signature(text: str) -> np.ndarray:
        made = minhash(num_perm=PERMUTATIONS, seed=1)
        grams = (gram.encode("utf-8", "replace") for gram in shingles(text))
        while part := list(islice(grams, TOGETHER)):
            made.update_batch(part)
        return made.hashvalues.astype(np.uint64)

    return signature


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise UserError(
            "near duplicates are found by datasketch, which is not installed; run `pip install "
            "'jaxgpt[clean]'`."
        ) from None
    return datasketch


def find_duplicates(keys: Sequence[Path], config: Filters) -> list[np.ndarray]:
    """For each file of keys [D, P or 1] in order, which of its documents are like an earlier one, [D] bool.

    Keys stay on the disk; memory holds three numbers per document, for one band of MinHash at a time.
    Near duplicates share a band of their signatures, with bands chosen by datasketch so that few are
    missed (what shares a band is compared, so that a false one costs time alone), and agree in as large a
    share of their permutations. They are compared with the first documents of the bucket.
    """
    parts = [np.load(path, mmap_mode="r") for path in keys]
    ends = np.cumsum([0, *(len(part) for part in parts)])
    repeated_D = np.zeros(ends[-1], bool)
    if config.duplicates == "exact":
        for group in _groups(np.concatenate([part[:, 0] for part in parts])):
            repeated_D[group[1:]] = True
    else:
        lsh = _datasketch().MinHashLSH(
            threshold=min(config.similarity, 0.98), num_perm=PERMUTATIONS, weights=(0.02, 0.98)
        )  # it knows no bands for 1

        def signature(place: int) -> np.ndarray:
            part = int(np.searchsorted(ends, place, "right")) - 1
            return parts[part][place - ends[part]]

        for band in range(lsh.b):
            columns = slice(band * lsh.r, (band + 1) * lsh.r)
            for group in _groups(np.concatenate([_mixed(part[:, columns]) for part in parts])):
                first = [signature(place) for place in group[:EARLIER]]
                for i, place in enumerate(group[1:], 1):
                    if not repeated_D[place]:
                        own = signature(place)
                        repeated_D[place] = any(
                            np.mean(own == other) >= config.similarity for other in first[:i]
                        )
    return [repeated_D[a:b] for a, b in pairwise(ends)]


def _groups(keys_D: np.ndarray) -> Iterator[np.ndarray]:
    """Places of the documents of each key that more than one has, in order."""
    order_D = np.argsort(keys_D, kind="stable")
    edges = np.flatnonzero(np.diff(keys_D[order_D]) != 0) + 1
    for start, end in zip([0, *edges], [*edges, len(keys_D)], strict=True):
        if end - start > 1:
            yield order_D[start:end]


def _mixed(band_DR: np.ndarray) -> np.ndarray:
    """One number [D] for the values of a band (a polynomial over odd numbers, modulo 2^64)."""
    mixed_D = np.zeros(len(band_DR), np.uint64)
    for i in range(band_DR.shape[1]):
        mixed_D = mixed_D * np.uint64(0x9E3779B97F4A7C15) + band_DR[:, i] * np.uint64(0xBF58476D1CE4E5B9)
    return mixed_D
