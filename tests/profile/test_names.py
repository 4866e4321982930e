"""Names of JAX's metadata become scopes, a pass and a primitive, in the spelling of every version of JAX."""

from __future__ import annotations

import pytest

from jaxgpt.profile.names import Name, name_of

STEP = "jit(train_step)"


@pytest.mark.parametrize(
    ("source", "scope", "part", "what"),
    [
        (f"{STEP}/optimizer/mul", "optimizer", "", "mul"),
        (
            f"{STEP}/jvp(layers)/while/body/mlp/gate/exp",
            "layers/mlp/gate",
            "forward",
            "exp",
        ),
        (
            f"{STEP}/transpose(jvp(layers))/eval_jaxpr/norm/reduce_sum",
            "layers/norm",
            "backward",
            "reduce_sum",
        ),
        (
            f"{STEP}/transpose(jvp(layers))/while/body/closed_call/checkpoint/rematted_computation/mlp/tanh",
            "layers/mlp",
            "recomputed",
            "tanh",
        ),
        (f"{STEP}/jvp()/closed_call/layer_3/norm.12/mul", "layer/norm", "forward", "mul"),
        (f"{STEP}/jvp(a/scores)/btgrk,bsgk->bgrts/dot_general", "a/scores", "forward", "dot_general"),
        (f"{STEP}/jvp(loss)/jit(take_along_axis)/gather", "loss", "forward", "gather"),
        (f"{STEP}/transpose(jvp(jit(clip)))/min", "", "backward", "min"),
        (f"{STEP}/optimizer/mul;{STEP}/optimizer/add", "optimizer", "", "mul"),
        (f"{STEP}/jvp(layers)/(norm/mul:mlp/reduce_sum)", "layers", "forward", "copy"),  # several at once
        ("jit(f)", "", "", "copy"),
        ("state.params['blocks']['mlp']['up']['weight']", "arguments", "", "copy"),
        ("", "", "", "copy"),
    ],
)
def test_parts_of_a_name(source: str, scope: str, part: str, what: str) -> None:
    assert name_of(source, "copy") == Name(scope, part, what)
