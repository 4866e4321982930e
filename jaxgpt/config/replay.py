"""Earlier data that are read again while a run learns from its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.config.bounds import Part
from jaxgpt.config.check import check_types
from jaxgpt.config.data import Chat, Data, Mix, Text
from jaxgpt.config.tasks import Task
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Rows of earlier data among those of a run (experience replay), so that they are not forgotten. A run's
    data then are a `Mix`, which its folder's config shows, and validation has a loss for each source.
    """

    run: str = ""
    """Folder of the run whose data are replayed."""
    data: Text | Chat | Mix | Task | None = None
    """Or the data themselves."""
    share: Part = 0.1
    """Share of the rows that they give."""

    def __post_init__(self) -> None:
        check_types(self, "replay")
        require(
            bool(self.run) != (self.data is not None),
            f"replay.run is {self.run!r} and replay.data is {'given' if self.data else 'None'}; name a run "
            "or give data, not both.",
        )


def replayed(own: Data, earlier: Data, share: float) -> Mix:
    """The mixture of a run's own data and earlier data, whose sources' names begin with `replay-`.

    Raises:
      UserError: either cannot be mixed, or is a mixture whose own weights are not said.
    """
    parts = _weighted(own, "data", ""), _weighted(earlier, "the replayed data", "replay-")
    pairs = zip(parts, (1 - share, share), strict=True)
    mixed = [(source, weight * total, name) for part, total in pairs for source, weight, name in part]
    sources, weights, names = zip(*mixed, strict=True)
    length, workers = (getattr(own, name, None) for name in ("length", "workers"))
    return Mix(sources=sources, weights=weights, names=names, length=length, workers=workers or 0)


def _weighted(data: Any, where: str, prefix: str) -> list[tuple[Any, float, str]]:
    """Each source alone with its weight, all of which make 1, and its name."""
    require(
        isinstance(data, Text | Chat | Mix | Task),
        f"replay mixes Text, Chat and tasks, but {where} are {type(data).__name__}; drop replay.",
    )
    alone = () if isinstance(data, Mix) else (replace(data, length=None, workers=0),)
    mix = data if isinstance(data, Mix) else Mix(sources=alone)
    require(
        bool(mix.weights) or len(mix.sources) == 1,
        f"{where} are a Mix whose weights follow from its sizes, which replay cannot know; give it weights.",
    )
    weights = mix.weights or (1.0,)
    shares = [weight / sum(weights) for weight in weights]
    return [(s, w, prefix + n) for s, w, n in zip(mix.sources, shares, mix.source_names, strict=True)]
