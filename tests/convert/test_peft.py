"""Adapters of peft: its own compute the same here, and ours are written as it wrote them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import GOLDENS, Numbers, golden, load_folder, write_folder
from safetensors.numpy import load_file, save_file
from tiny import FLOAT32, HERE, plain

from jaxgpt.checkpoint import load_params
from jaxgpt.config import BitFit, LastLayers, LoRA, Run, load_run
from jaxgpt.convert.commands import export, import_, save_params
from jaxgpt.convert.peft import CONFIG, TENSORS, read_adapter, write_adapter
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sharding import make_mesh
from jaxgpt.tune.base import flatten

STORED = dict(np.load(GOLDENS / "peft.npz"))
CASES = sorted(name.removesuffix("/config") for name in STORED if name.endswith("/config"))


def adapter_folder(case: str, folder: Path, **changes: Any) -> Path:
    """A case as peft wrote it; fields of its config may be changed."""
    folder.mkdir(parents=True)
    config = json.loads(str(STORED[f"{case}/config"])) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    head = f"{case}/tensors/"
    tensors = {k.removeprefix(head): np.float32(v) for k, v in STORED.items() if k.startswith(head)}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of the golden models that adapters stand over."""
    folder, found = tmp_path_factory.mktemp("bases"), {}
    for name in ("llama", "gpt2"):
        stored = golden(name)
        tensors = {k: np.float32(v) for k, v in stored["tensors"].items()}
        imported = load_folder(write_folder(folder / f"hf-{name}", stored["config"], tensors))
        run = Run(name=name, model=imported.model, runs=str(folder), compute=FLOAT32)
        (folder / name).mkdir()
        Numbers().save(folder / name / "tokenizer")
        save_params(folder / name, run, imported.params)
        found[name] = folder / name
    return found


def logits(run: Run, params: dict, tokens: np.ndarray) -> jax.Array:
    graph = abstract_model(run.model, FLOAT32, HERE)[0]

    @jax.jit
    def compute(params: dict) -> jax.Array:
        module = assemble(graph, params)
        return module.logits(module.hidden(plain(jnp.asarray(tokens))).x_BTD)

    return compute(params)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_computes_what_it_does_in_peft_and_goes_back(
    case: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    family, kind = case.split("/")
    source = adapter_folder(case, tmp_path / "theirs")
    import_(str(source), str(tmp_path / "run"), base=str(bases[family]))
    run = load_run(tmp_path / "run")
    params, _ = load_params(tmp_path / "run", run, make_mesh({"data": 1}))
    expected = STORED[f"{case}/logits"]
    tokens = golden(family)["tokens"]
    np.testing.assert_allclose(logits(run, params, tokens), expected, atol=1e-4)
    assert np.abs(expected - golden(family)["logits"]).max() > 0.1
    export(str(tmp_path / "run"), str(tmp_path / "ours"), peft=True)
    held, made = load_file(source / TENSORS), load_file(tmp_path / "ours" / TENSORS)
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    theirs = json.loads((source / CONFIG).read_text())
    assert config["peft_type"] == theirs["peft_type"]
    if "c_attn" in theirs.get("target_modules", ""):  # q, k and v have become a block of rank 3 r each
        same_products(held, made, theirs, config)
    else:
        assert held.keys() == made.keys()
        for name, array in held.items():
            np.testing.assert_allclose(made[name], array, atol=1e-6, err_msg=name)
    # And once more: what was written is read as what it was.
    import_(str(tmp_path / "ours"), str(tmp_path / "again"), base=str(bases[family]))
    again, _ = load_params(tmp_path / "again", load_run(tmp_path / "again"), make_mesh({"data": 1}))
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert type(run.tune).__name__.lower().startswith(
        {"rslora": "lora"}.get(kind, kind)[:4]
    ), (kind, run.tune)  # fmt: skip


def same_products(held: dict, made: dict, theirs: dict, ours: dict) -> None:
    """Their change of each weight is ours."""

    def change(tensors: dict, config: dict, module: str) -> np.ndarray:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        own = module.split(".h.")[-1].split(".", 1)[1]
        rank, alpha = (
            config["rank_pattern"].get(own, config["r"]),
            config["alpha_pattern"].get(own, config["lora_alpha"]),
        )
        assert len(a) == rank
        return alpha / rank * b @ a

    modules = {name.split(".lora_")[0] for name in held}
    assert modules == {name.split(".lora_")[0] for name in made}
    for module in modules:
        np.testing.assert_allclose(change(made, ours, module), change(held, theirs, module), atol=1e-5)
        if magnitude := f"{module}.lora_magnitude_vector" if theirs["use_dora"] else "":
            np.testing.assert_allclose(made[magnitude], held[magnitude], atol=1e-6)


def test_modules_of_other_ranks_and_scales_and_layers_without_an_adapter(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """What is less in one place is the same adapter with zeros, and another scale a factor of B."""
    source = adapter_folder(
        "llama/lora", tmp_path / "theirs", alpha_pattern={"q_proj": 12}, layers_to_transform=[0, 1]
    )
    tensors = load_file(source / TENSORS)
    lost = {k: v for k, v in tensors.items() if ".layers.1.mlp." not in k}
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    lost[f"{q}.lora_A.weight"] = lost[f"{q}.lora_A.weight"][:2]
    lost[f"{q}.lora_B.weight"] = np.ascontiguousarray(lost[f"{q}.lora_B.weight"][:, :2])
    save_file(lost, source / TENSORS, {"format": "pt"})
    family, model, *_ = load_folder(bases["llama"].with_name("hf-llama"))
    tune, learned = read_adapter(source, family, model)
    flat = flatten(learned)
    a, b = (
        flat["blocks", "attention", "q", "weight", "a"][0],
        flat["blocks", "attention", "q", "weight", "b"][0],
    )
    ours = tune.scale * a.reshape(32, -1) @ b.reshape(tune.rank, -1)
    theirs = 12 / 2 * (lost[f"{q}.lora_B.weight"] @ lost[f"{q}.lora_A.weight"]).T
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not flat["blocks", "mlp", "down", "weight", "b"][1].any()


def test_what_has_no_counterpart_is_refused_in_one_sentence(bases: dict[str, Path], tmp_path: Path) -> None:
    family, model, *_ = load_folder(bases["llama"].with_name("hf-llama"))
    cases = {
        "peft_type is 'VERA'; allowed: LORA, IA3": {"peft_type": "VERA"},
        "has bias 'all', which has no counterpart here; merge the adapter": {"bias": "all"},
        "has modules_to_save \\['lm_head'\\], which has no": {"modules_to_save": ["lm_head"]},
        "has new_field 3, which has no counterpart": {"new_field": 3},
        r"adapter_config.json is damaged .*lora_alpha": {"lora_alpha": "much"},
        "init_lora_weights is 'pissa_niter_4', which changes the base": {
            "init_lora_weights": "pissa_niter_4"
        },
        r"_proj has lora_A, lora_B and \d+ more; with use_dora True each": {"use_dora": True},
    }
    for i, (words, changes) in enumerate(cases.items()):
        with pytest.raises(UserError, match=words):
            read_adapter(adapter_folder("llama/lora", tmp_path / str(i), **changes), family, model)
    scaled = adapter_folder("llama/prompt", tmp_path / "scaled")
    with pytest.raises(UserError, match="this llama scales its embeddings and peft's virtual tokens are not"):
        read_adapter(scaled, family, replace(model, embed_scale=True))
    wrong = adapter_folder("gpt2/lora", tmp_path / "wrong")
    with pytest.raises(UserError, match="belongs to no linear layer of this llama; is it of another model"):
        read_adapter(wrong, family, model)
    (wrong / TENSORS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors; save the adapter as safetensors"):
        read_adapter(wrong, family, model)
    right = adapter_folder("llama/lora", tmp_path / "right")
    with pytest.raises(UserError, match=r"is an adapter of peft; name the run of its model with --base"):
        import_(str(right), str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"has no adapter_config.json, as an adapter of peft has; drop it"):
        import_(str(bases["llama"].with_name("hf-llama")), str(tmp_path / "run"), base=str(bases["llama"]))
    with pytest.raises(
        UserError, match=r"--peft writes the adapter of a tuned run, and .* trains all parameters"
    ):
        export(str(bases["llama"]), str(tmp_path / "out"), peft=True)
    for tune, words in (
        (BitFit(), "BitFit has no counterpart in peft; "),
        (LastLayers(), "LastLayers has no counterpart in peft; "),
        (LoRA(init="pissa"), "its base is not the model's own, which peft's folders cannot say"),
    ):
        with pytest.raises(UserError, match=words):
            write_adapter(tmp_path, tune, {}, family, model)
