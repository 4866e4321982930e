"""Adapters in the folder format of Hugging Face's peft: `adapter_config.json`, `adapter_model.safetensors`.

Shapes: L layers, I inputs, O outputs, R rank, P virtual tokens, G key-value heads, K head size, D hidden
size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import numpy as np
from safetensors.numpy import save_file

from jaxgpt.config import GPT, IA3, DoRA, LoRA, PrefixTuning, PromptTuning
from jaxgpt.config.tune import Tune
from jaxgpt.convert import files
from jaxgpt.convert.family import Family, Slot, tensors
from jaxgpt.errors import UserError, require
from jaxgpt.files import Count, check_json, write_json
from jaxgpt.tune.base import Flat, flatten, unflatten
from jaxgpt.tune.ia3 import INPUTS, OUTPUTS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KINDS = {"LORA": LoRA, "IA3": IA3, "PROMPT_TUNING": PromptTuning, "PREFIX_TUNING": PrefixTuning}
"""For each `peft_type`: our class (DoRA is LoRA with `use_dora`)."""
_READ = {
    "LORA": {
        "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "fan_in_fan_out",
        "rank_pattern", "alpha_pattern",
    },
    "IA3": {"target_modules", "feedforward_modules", "fan_in_fan_out"},
    "PROMPT_TUNING": {"num_virtual_tokens"},
    "PREFIX_TUNING": {"num_virtual_tokens"},
}  # fmt: skip
"""Fields that decide what is computed."""
_NO_MATTER = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "init_lora_weights", "init_ia3_weights", "runtime_config", "loftq_config",
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "token_dim", "num_attention_heads", "num_layers", "num_transformer_submodules", "encoder_hidden_size",
    "prefix_projection", "qalora_group_size", "target_modules", "exclude_modules", "layers_pattern",
    "layers_to_transform",
    "megatron_core", "megatron_config", "fan_in_fan_out",
}  # fmt: skip
"""Fields that say how it was made, or repeat what the arrays show."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` over which an adapter fits no longer the base alone."""
_EMPTY: tuple[Any, ...] = (None, False, "none", [], {}, 0)


class Config(TypedDict):
    """What is read of adapter_config.json."""

    peft_type: NotRequired[str | None]
    r: NotRequired[Count | None]
    lora_alpha: NotRequired[float | None]
    lora_dropout: NotRequired[float | None]
    use_rslora: NotRequired[bool | None]
    use_dora: NotRequired[bool | None]
    rank_pattern: NotRequired[dict[str, Count] | None]
    alpha_pattern: NotRequired[dict[str, float] | None]
    init_lora_weights: NotRequired[bool | str | None]
    num_virtual_tokens: NotRequired[Count | None]


class Adapter(NamedTuple):
    """What a folder holds: the method, and what is trained as a pure dict."""

    tune: Tune
    learned: dict


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one of peft's."""
    return (folder / CONFIG).is_file()


# ------------------------------------------------------------------------------------------- import


def read_adapter(folder: Path, family: Family, model: Any) -> Adapter:
    """The adapter of a folder, over a model of a family.

    Raises:
      UserError: a kind or field that has no counterpart here, or arrays that do not fit the model.
    """
    config = files.read_json(folder / CONFIG)
    _check_model(model)
    check_json(config, Config, folder / CONFIG, "take the original file")
    kind = config.get("peft_type")
    require(
        kind in KINDS,
        f"{folder / CONFIG}: peft_type is {kind!r:.60}; allowed: {', '.join(KINDS)}.",
    )
    kind = cast(str, kind)
    unknown = {
        name: value
        for name, value in config.items()
        if name not in _NO_MATTER | _READ[kind] and value not in _EMPTY
    }
    require(
        not unknown,
        f"{folder / CONFIG} has {', '.join(f'{n} {v!r:.60}' for n, v in unknown.items())}, which has no "
        "counterpart here; merge the adapter with peft and import the whole model.",
    )
    born = config.get("init_lora_weights")
    require(
        not isinstance(born, str) or not born.lower().startswith(_CHANGES_BASE),
        f"{folder / CONFIG}: init_lora_weights is {born!r:.60}, which changes the base's weights; save it "
        "with path_initial_model_for_weight_conversion, which makes it a plain LoRA.",
    )
    require((folder / TENSORS).is_file(), f"{folder} has no {TENSORS}; save the adapter as safetensors.")
    headers = files.file_headers(folder / TENSORS)
    arrays = {name: np.asarray(array, np.float32) for name, array in files.each(headers, headers)}
    require(bool(arrays), f"{folder / TENSORS} holds no arrays; take the original file.")
    for name, array in arrays.items():
        require(
            bool(np.isfinite(array).all()),
            f"{folder / TENSORS}: {name} is not finite; take the original file.",
        )
    read = {"LORA": _read_lora, "IA3": _read_ia3}.get(kind, _read_virtual)
    return read(config, arrays, family, model, folder)


def _check_model(model: Any) -> None:
    require(
        isinstance(model, GPT),
        f"a {type(model).__name__} has no adapters in peft's format here; `jaxgpt merge` and `jaxgpt export` "
        "write whole models.",
    )


def _modules(family: Family, model: Any) -> dict[str, list[Slot]]:
    """The slots of each linear module's weight, by its name."""
    return {
        name.removesuffix(".weight"): slots
        for name, slots in tensors(family, model).items()
        if name.endswith(".weight") and slots[0].inputs
    }


def _by_module(
    arrays: Mapping[str, np.ndarray], parts: tuple[str, ...], family: Family, model: Any, where: Path
) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each module by the part of the adapter that they are.

    Raises:
      UserError: a name that belongs to no linear layer of the model.
    """
    known, found = _modules(family, model), dict[str, dict[str, np.ndarray]]()
    pattern = re.compile(
        rf"^{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, parts))})(\.default)?(\.weight)?$"
    )
    for name, array in arrays.items():
        match = pattern.match(name)
        module = match[1] if match else name
        require(
            match is not None and module in known,
            f"{where / TENSORS}: {name} belongs to no linear layer of this {family.model_type}; is it of "
            "another "
            "model?",
        )
        assert match is not None
        found.setdefault(module, {})[match[2]] = array
    return found


def _pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of a module, as peft reads them."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _read_lora(
    config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], family: Family, model: Any, where: Path
) -> Adapter:
    parts = ("lora_A", "lora_B", "lora_magnitude_vector")
    by_module = _by_module(arrays, parts, family, model, where)
    dora, stable = bool(config.get("use_dora")), bool(config.get("use_rslora"))
    needed = set(parts if dora else parts[:2])
    odd = [f"{m} has {', '.join(sorted(own))}" for m, own in by_module.items() if own.keys() != needed]
    require(
        not odd,
        f"{where / TENSORS}: {files.shorten(odd, 1)}; with use_dora {dora} each needs "
        f"{', '.join(sorted(needed))}.",
    )
    known, rank = _modules(family, model), max(len(own["lora_A"]) for own in by_module.values())
    alpha = float(config.get("lora_alpha", 8))
    scales = {}
    for module, own in by_module.items():
        r = len(own["lora_A"])
        own_alpha = _pattern_value(config.get("alpha_pattern") or {}, module, alpha)
        scales[module] = own_alpha / (math.sqrt(r) if stable else r)
    # One scale for all: that of the first module; where others differ, B takes the ratio.
    scale = next(iter(scales.values()))
    targets = sorted({".".join(map(str, s.path[:-1])) for module in by_module for s in known[module]})
    tune = (DoRA if dora else LoRA)(
        rank=rank,
        alpha=scale * (math.sqrt(rank) if stable else rank),
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=tuple(targets),
        rank_stabilized=stable,
    )
    learned: Flat = {}
    for module, slots in known.items():
        for slot in slots:
            if ".".join(map(str, slot.path[:-1])) not in targets:
                continue
            own = by_module.get(module)
            require(
                own is not None or not dora,
                f"{where / TENSORS} has no adapter for {module}, though other layers have one; DoRA needs "
                "all.",
            )
            a, b, m = _lora_of(own, slot, rank, scales.get(module, scale) / scale, where, module)
            pieces = {"a": a, "b": b} | ({"magnitude": m} if dora else {})
            for name, piece in pieces.items():
                _put(learned, (*slot.path, name), slot, piece, model)
    return Adapter(tune, unflatten(learned))


def _lora_of(
    own: Mapping[str, np.ndarray] | None, slot: Slot, rank: int, factor: float, where: Path, module: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Our A [*inputs, R], B [R, *outputs] and magnitude [*outputs] of a layer; zeros where it has none."""
    inputs, outputs = slot.shape[: slot.inputs], slot.shape[slot.inputs :]
    I, O = math.prod(inputs), math.prod(outputs)  # noqa: E741
    a, b, m = np.zeros((I, rank), np.float32), np.zeros((rank, O), np.float32), np.ones(O, np.float32)
    if own is not None:
        a_RI, b_OR = own["lora_A"], own["lora_B"]
        r = len(a_RI)
        require(
            a_RI.shape == (r, I) and b_OR.shape == (O * slot.parts, r),
            f"{where / TENSORS}: lora_A and lora_B of {module} are {a_RI.shape} and {b_OR.shape}; this model "
            "needs "
            f"{(r, I)} and {(O * slot.parts, r)}.",
        )
        span = slice(slot.part * O, (slot.part + 1) * O)
        a[:, :r], b[:r] = a_RI.T, factor * b_OR[span].T
        m = own["lora_magnitude_vector"].reshape(-1)[span] if "lora_magnitude_vector" in own else m
    return a.reshape(*inputs, rank), b.reshape(rank, *outputs), m.reshape(outputs)


def _put(learned: Flat, path: tuple[Any, ...], slot: Slot, piece: np.ndarray, model: Any) -> None:
    """Write one layer's piece into the stacked array of a path."""
    require(
        len(slot.index) == 1, "adapters of experts are not read from peft's folders; merge them with peft."
    )
    if path not in learned:
        learned[path] = np.zeros((model.layers, *piece.shape), np.float32)
    learned[path][slot.index[0]] = piece


def _read_ia3(
    config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], family: Family, model: Any, where: Path
) -> Adapter:
    by_module = _by_module(arrays, ("ia3_l",), family, model, where)
    known, learned = _modules(family, model), Flat()
    for module, slots in known.items():
        factors = by_module.get(module, {}).get("ia3_l")
        for slot in slots:
            name = ".".join(map(str, slot.path[:-1]))
            into, out = _scaled(name, INPUTS), _scaled(name, OUTPUTS)
            size = slot.shape[: slot.inputs] if into else slot.shape[slot.inputs :]
            count = math.prod(size)
            own = np.ones(count, np.float32)
            if factors is not None:
                flat = factors.reshape(-1)
                span = slice(0, count) if into else slice(slot.part * count, (slot.part + 1) * count)
                require(
                    len(flat) == count * (1 if into else slot.parts),
                    f"{where / TENSORS}: ia3_l of {module} has {len(flat)} factors; this model needs "
                    f"{count * (1 if into else slot.parts)}, of the {'inputs' if into else 'outputs'}.",
                )
                own = flat[span]
            if into or out:
                _put(learned, (*slot.path, "into" if into else "out"), slot, own.reshape(size), model)
            else:
                require(
                    bool((own == 1).all()),
                    f"{where / TENSORS} scales {name} ({module}); here IA3 scales keys, values and the MLP's "
                    "hidden "
                    "features, so merge the adapter with peft and import the whole model.",
                )
    return Adapter(IA3(), unflatten(learned))


def _scaled(name: str, patterns: tuple[str, ...]) -> bool:
    return any(name.endswith(pattern.removeprefix("*")) for pattern in patterns)


def _read_virtual(
    config: Mapping[str, Any], arrays: Mapping[str, np.ndarray], family: Family, model: Any, where: Path
) -> Adapter:
    name, P = "prompt_embeddings", config.get("num_virtual_tokens")
    require(name in arrays, f"{where / TENSORS} has no {name}; take the original file.")
    array = arrays[name]
    prompt = config["peft_type"] == "PROMPT_TUNING"
    require(
        not prompt or not getattr(model, "embed_scale", False),
        f"{where}: this {family.model_type} scales its embeddings and peft's virtual tokens are not scaled; "
        "use prefix tuning or LoRA.",
    )
    L, G, K, D = model.layers, model.groups, model.head, model.width
    wanted = (P, D) if prompt else (P, L * 2 * G * K)
    require(
        array.shape == wanted,
        f"{where / TENSORS}: {name} is {array.shape}; this model needs {wanted}.",
    )
    assert isinstance(P, int)
    if prompt:
        return Adapter(PromptTuning(tokens=P), {"added": {"prompt": array}})
    keys, values = array.reshape(P, L, 2, G, K).transpose(2, 1, 0, 3, 4)
    return Adapter(PrefixTuning(tokens=P), {"added": {"keys": keys, "values": values}})


# ------------------------------------------------------------------------------------------- export


def write_adapter(work: Path, tune: Tune, learned: dict, family: Family, model: Any) -> int:
    """Write the two files of an adapter; returns the number of arrays.

    Raises:
      UserError: the method has no counterpart in peft.
    """
    name = type(tune).__name__
    _check_model(model)
    if isinstance(tune, LoRA):
        config, arrays = lora_arrays(tune, flatten(learned), family, model)
    elif isinstance(tune, IA3):
        config, arrays = _write_ia3(flatten(learned), family, model)
    elif isinstance(tune, PromptTuning | PrefixTuning):
        config, arrays = _write_virtual(tune, learned["added"], model)
    else:
        raise UserError(
            f"{name} has no counterpart in peft; `jaxgpt export` without --peft or `jaxgpt merge` writes the "
            "whole "
            "model where the method leaves plain weights."
        )
    shared = {"base_model_name_or_path": None, "inference_mode": True, "task_type": "CAUSAL_LM"}
    write_json(work / CONFIG, shared | config)
    save_file(
        {key: np.ascontiguousarray(a, np.float32) for key, a in arrays.items()},
        work / TENSORS,
        {"format": "pt"},
    )
    return len(arrays)


def _short(module: str) -> str:
    """A module's name after its layer's number."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


def lora_arrays(
    tune: LoRA, learned: Flat, family: Family, model: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """adapter_config.json and the arrays of a LoRA or DoRA.

    Raises:
      UserError: one that peft has no form for.
    """
    require(
        tune.init == "zero",
        "tune.init is 'pissa': its base is not the model's own, which peft's folders cannot say; `jaxgpt "
        "merge` or "
        "`jaxgpt export` without --peft writes the whole model.",
    )
    arrays: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for module, slots in _modules(family, model).items():
        mine = [slot for slot in slots if (*slot.path, "a") in learned]
        if not mine:
            continue
        rank = tune.rank * len(mine)
        I = math.prod(mine[0].shape[: mine[0].inputs])  # noqa: E741
        O = math.prod(mine[0].shape[mine[0].inputs :])  # noqa: E741
        a_RI, b_OR = np.zeros((rank, I), np.float32), np.zeros((O * mine[0].parts, rank), np.float32)
        m_O = np.zeros(O * mine[0].parts, np.float32)
        for number, slot in enumerate(mine):
            (layer,), here = slot.index, slice(number * tune.rank, (number + 1) * tune.rank)
            span = slice(slot.part * O, (slot.part + 1) * O)
            a_RI[here] = np.asarray(learned[(*slot.path, "a")][layer]).reshape(I, tune.rank).T
            b_OR[span, here] = np.asarray(learned[(*slot.path, "b")][layer]).reshape(tune.rank, O).T
            if isinstance(tune, DoRA):
                m_O[span] = np.asarray(learned[(*slot.path, "magnitude")][layer]).reshape(O)
        require(
            not isinstance(tune, DoRA) or len(mine) == mine[0].parts,
            f"DoRA of a part of {module} has no counterpart in peft; target q, k and v, or none of them.",
        )
        arrays[f"{PREFIX}{module}.lora_A.weight"], arrays[f"{PREFIX}{module}.lora_B.weight"] = a_RI, b_OR
        if isinstance(tune, DoRA):
            arrays[f"{PREFIX}{module}.lora_magnitude_vector"] = m_O
        ranks[_short(module)] = rank
    require(bool(arrays), "no adapter of this run belongs to a linear layer of its family.")
    own = {name: rank for name, rank in ranks.items() if rank != tune.rank}
    # The same scale with another rank: alpha grows with it, or with its root.
    alphas = {name: tune.scale * (math.sqrt(r) if tune.rank_stabilized else r) for name, r in own.items()}
    config = {
        "peft_type": "LORA",
        "r": tune.rank,
        "lora_alpha": int(tune.alpha) if tune.alpha == int(tune.alpha) else tune.alpha,
        "lora_dropout": tune.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": own,
        "alpha_pattern": alphas,
        "use_rslora": tune.rank_stabilized,
        "use_dora": isinstance(tune, DoRA),
        "fan_in_fan_out": not family.transposed,
        "bias": "none",
    }
    return config, arrays


def _write_ia3(learned: Flat, family: Family, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays: dict[str, np.ndarray] = {}
    into, out = set[str](), set[str]()
    for module, slots in _modules(family, model).items():
        found = {}
        for slot in slots:
            (layer,) = slot.index or (0,)
            for side in ("into", "out"):
                if (*slot.path, side) in learned:
                    found[slot.part] = side, np.asarray(learned[(*slot.path, side)][layer]).reshape(-1)
        if not found:
            continue
        side, first = next(iter(found.values()))
        ones = np.ones_like(first)
        whole = np.concatenate([found.get(i, (side, ones))[1] for i in range(slots[0].parts)])
        arrays[f"{PREFIX}{module}.ia3_l"] = whole[None] if side == "into" else whole[:, None]
        (into if side == "into" else out).add(_short(module))
    config = {
        "peft_type": "IA3",
        "target_modules": sorted(into | out),
        "feedforward_modules": sorted(into),
        "fan_in_fan_out": not family.transposed,
    }
    return config, arrays


def _write_virtual(
    tune: PromptTuning | PrefixTuning, added: dict, model: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    P, L = tune.tokens, model.layers
    shape = {"num_virtual_tokens": P, "num_layers": L, "num_transformer_submodules": 1}
    if isinstance(tune, PromptTuning):
        require(
            not model.embed_scale,
            "prompts of a model that scales its embeddings (Gemma) mean something else in peft; they are not "
            "written.",
        )
        config = shape | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": model.width,
            "num_attention_heads": model.heads,
        }
        return config, {"prompt_embeddings": np.asarray(added["prompt"])}
    both_2LPGK = np.stack([np.asarray(added["keys"]), np.asarray(added["values"])])
    config = shape | {
        "peft_type": "PREFIX_TUNING",
        "token_dim": model.groups * model.head,
        "num_attention_heads": model.groups,
        "encoder_hidden_size": model.groups * model.head,
        "prefix_projection": False,
    }
    return config, {"prompt_embeddings": both_2LPGK.transpose(2, 1, 0, 3, 4).reshape(P, -1)}
