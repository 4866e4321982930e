"""Distillation: a student is taught a larger model's whole distribution of each next token.

The teacher is a run of its own, which the step gives to the objective as `model.teacher`. Without one, as in
evaluation, the loss is the next token's alone: validation losses are those of any language model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import CausalLM, Distillation
from jaxgpt.layers.distil import Mix, distil
from jaxgpt.objectives.causal import causal_lm
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def distillation(config: Distillation, vocabulary: Vocabulary) -> Objective:
    """hard_weight nll + (1 - hard_weight) softening^2 KL(teacher || student) (Hinton et al. 2015).

    The metric `divergence` is the second part in nats per target, with the square of `softening`.
    """
    mix, plain = Mix(config.softening, config.hard_weight), causal_lm(CausalLM(), vocabulary)

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        teacher = getattr(model, "teacher", None)
        if teacher is None:
            return plain(model, batch, key)
        features = model.hidden(batch, key)
        theirs = teacher.hidden(replace(batch, memory=None), None)
        heads = model.unembedding, teacher.unembedding
        made = distil(
            heads[0],
            model.transform(features.x_BTD),
            batch.targets_BT,
            batch.weights_BT,
            *jax.lax.stop_gradient((heads[1], teacher.transform(theirs.x_BTD))),
            mix,
            model.compute.loss_chunk,
        )
        weight = jnp.sum(batch.weights_BT)
        stats = {name: value * weight for name, value in (features.stats or {}).items()}
        metrics = {"nll": made.nll, "correct": made.correct, "bytes": jnp.zeros(())}
        metrics |= {"divergence": made.divergence} | stats
        return Sums(made.loss + features.balance * weight, weight, metrics, features.memory)

    return objective
