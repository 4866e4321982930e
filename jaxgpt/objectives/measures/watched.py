"""A model whose features are noted as an objective computes them."""

from __future__ import annotations

from typing import Any

import jax

from jaxgpt.batch import Batch, Features


class Watched:
    """Stands for a model in traced code; what its `hidden` returns is kept in `features`."""

    features: Features

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, batch: Batch, key: jax.Array | None = None) -> Features:
        """As the model's own."""
        self.features = self._model.hidden(batch, key)
        return self.features
