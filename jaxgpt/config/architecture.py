"""The base of every architecture's config but GPT's, and of those that live outside the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxgpt.config.gpt import GPT, MoE


class Blocks:
    """Sizes of an architecture whose layers are those of a `GPT` config."""

    @property
    def blocks(self) -> GPT:
        """The config of its layers."""
        raise NotImplementedError

    @property
    def groups(self) -> int:
        return self.blocks.groups

    @property
    def head(self) -> int:
        return self.blocks.head

    @property
    def hidden(self) -> int:
        return self.blocks.hidden

    @property
    def moe(self) -> MoE | None:
        return self.blocks.moe

    @property
    def row(self) -> int:
        return self.blocks.row

    @property
    def logit_softcap(self) -> None:
        """None: its logits are not capped."""
        return

    def window(self, layer: int) -> int:
        """See `GPT.window`."""
        return self.blocks.window(layer)


@dataclass(frozen=True, kw_only=True)
class Architecture(Blocks):
    """An architecture in a file of its user, as a frozen dataclass derived from this (docs/add-a-model.md).

    A run stores it as `FILE.py:NAME` and keeps a copy of the file (`jaxgpt.config.code`).
    """

    abstract: ClassVar[bool] = True
    """That a config cannot hold this class itself; derived ones are not."""

    def __init_subclass__(cls) -> None:
        cls.abstract = False

    if TYPE_CHECKING:  # its fields, with the names that all architectures have

        @property
        def vocab_size(self) -> int: ...
        @property
        def context(self) -> int: ...
        @property
        def layers(self) -> int: ...
        @property
        def width(self) -> int: ...
        @property
        def heads(self) -> int: ...

    @property
    def causal(self) -> bool:
        """Whether later tokens are hidden."""
        return True

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output projection."""
        return True

    def module(self) -> Callable[..., Any]:
        """The class of its module, called as (model, compute, target, key, scanned=...)."""
        raise NotImplementedError(f"{type(self).__name__} has no module(); return the module's class there.")
