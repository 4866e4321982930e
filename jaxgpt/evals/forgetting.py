"""What a run has lost of what the one before it knew (`jaxgpt eval RUN --forgetting BASE`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jaxgpt.config import Chat, Labelled, Mix, Tagged, Task, Text
from jaxgpt.errors import require
from jaxgpt.evals.loss import loss_of
from jaxgpt.sample.load import Trained

SHOWN = {"bits_per_byte": "Bits per byte", "loss": "Loss (nats per target)", "accuracy": "Accuracy"}
"""What is compared, with its name."""


class Forgotten(NamedTuple):
    """A source of the earlier run's validation data under both.

    Attributes:
      name: of the source.
      before, after: `SHOWN` of the earlier run and of the later one.
    """

    name: str
    before: dict[str, float]
    after: dict[str, float]

    def figures(self) -> dict[str, float]:
        """Each value before and after, and after less before."""
        found: dict[str, float] = {}
        for key in (key for key in SHOWN if key in self.before):
            before, after = self.before[key], self.after[key]
            found |= {f"{key}_before": before, key: after, f"{key}_difference": after - before}
        return found

    @staticmethod
    def titles() -> dict[str, str]:
        """The names of these figures."""
        suffixes = {"_before": " before", "": " now", "_difference": ", now less before"}
        return {f"{key}{end}": name + words for key, name in SHOWN.items() for end, words in suffixes.items()}


def forgotten(trained: Trained, base: Trained, batch_size: int = 32, batches: int = 0) -> Iterator[Forgotten]:
    """Losses on each source of a base's validation data, of the base itself and of a run that came after.

    Args:
      trained: the later run.
      base: the earlier one.
      batch_size: rows at a time.
      batches: of each source; 0 means all.

    Raises:
      UserError: the two cannot be scored on the same data.
    """
    data, kinds = base.run.data, (Text, Chat, Task, Mix, Tagged, Labelled)
    require(
        isinstance(data, kinds),
        f"--forgetting {base.folder} has {type(data).__name__} data; it must have one of "
        f"{', '.join(kind.__name__ for kind in kinds)}.",
    )
    require(
        trained.tokenizer.digest == base.tokenizer.digest,
        f"--forgetting {base.folder} has another tokenizer than {trained.folder}, so that their losses do "
        "not compare; name a run with the same one.",
    )
    require(
        trained.run.headed == base.run.headed if base.run.headed else trained.run.headed is None,
        f"--forgetting {base.folder} has another head than {trained.folder}; name a run whose head is the "
        "same.",
    )
    length = min(base.run.length, trained.run.row)
    # By the base's objective, which says what is a target of its data.
    later = trained._replace(run=replace(base.run, model=trained.run.model))
    names = data.source_names if isinstance(data, Mix) else ("",)
    for name, source in zip(names, data.sources if isinstance(data, Mix) else (data,), strict=True):
        one: Any = replace(source, length=length)
        held = [loss_of(each, one, batch_size=batch_size, batches=batches) for each in (base, later)]
        before, after = ({key: found[key] for key in SHOWN if key in found} for found in held)
        yield Forgotten(name, before, after)
