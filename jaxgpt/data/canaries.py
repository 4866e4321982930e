"""Canaries: random texts planted among training documents, so that what a model remembers can be measured
(Carlini et al. 2019, section 4).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from jaxgpt.files import Count, read_json, write_json

FILE = "canaries.json"
"""In a prepared folder: what was planted."""
DIGITS = 9
FORMAT = "My secret access number is {}."


class Canaries(TypedDict):
    """What `FILE` holds: the form with a place for a secret, the secrets, how often each was planted."""

    form: str
    digits: Count
    secrets: list[str]
    repeats: list[Count]


def make_canaries(count: int, repeats: Sequence[int], seed: int = 0) -> Canaries:
    """Canaries with random secrets; canary i is planted `repeats[i % len(repeats)]` times.

    Args:
      count: how many.
      repeats: how often each is planted.
      seed: of the secrets.
    """
    chance = random.Random(f"canary {seed}")
    secrets: list[str] = [" ".join(chance.choices("0123456789", k=DIGITS)) for _ in range(count)]
    often = [repeats[i % len(repeats)] for i in range(count)]
    return {"form": FORMAT, "digits": DIGITS, "secrets": secrets, "repeats": often}


def planted(canaries: Canaries) -> list[str]:
    """The documents to plant."""
    pairs = zip(canaries["secrets"], canaries["repeats"], strict=True)
    return [canaries["form"].format(secret) for secret, times in pairs for _ in range(times)]


def write_canaries(folder: Path, canaries: Canaries) -> None:
    """Leave in a prepared folder what was planted."""
    write_json(folder / FILE, canaries)


def read_canaries(folder: str | Path) -> Canaries | None:
    """What was planted in a prepared folder; None where nothing was.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / FILE
    return read_json(path, Canaries, "prepare the folder again") if path.is_file() else None
