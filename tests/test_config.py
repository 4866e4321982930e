"""Configs: strict both ways, loaded, overridden, and every mistake named in one sentence."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import (
    GPT,
    Bert,
    CausalLM,
    Chat,
    Compute,
    MaskedLM,
    Mesh,
    MoE,
    Optim,
    Run,
    Text,
    Train,
    from_json,
    load,
    override,
    to_json,
)
from jaxgpt.errors import UserError

RUN = Run(name="r")
DATA = "Chat, Labelled, Mix, Pairs, Prompts, Rated, Tagged, Text"


def refused(make: Any, *args: Any, **fields: Any) -> str:
    """The message with which a call is refused, checked to be one line."""
    with pytest.raises(UserError) as caught:
        make(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------- round trip

SHARE = st.floats(0, 0.99)
SMALL = st.integers(0, 9)
POSITIVE = st.floats(1e-9, 1e6)


@st.composite
def models(draw: st.DrawFn) -> GPT:
    kv_heads, rope, causal = draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans())
    heads = kv_heads * draw(st.integers(1, 4))
    windows = st.lists(st.integers(0, 5000), max_size=4) if causal else st.lists(st.just(0), max_size=4)
    return GPT(
        vocab_size=draw(st.integers(1, 300_000)),
        context=draw(st.integers(64, 100_000)),
        layers=draw(st.integers(1, 100)),
        width=heads * 2 * draw(st.integers(1, 64)),
        heads=heads,
        kv_heads=draw(st.sampled_from([None, kv_heads])),
        head_width=draw(st.sampled_from([None, 2, 64])),
        mlp_width=draw(st.none() | st.integers(1, 9999)),
        position="rope" if rope else "learned",
        rope_theta=draw(POSITIVE),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        mlp=draw(st.sampled_from(["gelu", "swiglu"])),
        bias=draw(st.booleans()),
        logit_softcap=draw(st.none() | POSITIVE),
        dropout=draw(SHARE),
        windows=tuple(draw(windows)),
        causal=causal,
    )


@st.composite
def runs(draw: st.DrawFn) -> Run:
    model = replace(draw(models()), causal=True)
    length = draw(st.none() | st.integers(2, model.context))
    words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
    texts = st.tuples(words, words)
    chat = st.builds(Chat, train=texts, validation=texts, length=st.just(length), workers=SMALL)
    text = st.builds(Text, path=words, length=st.just(length), workers=SMALL)
    accumulate, steps = draw(st.integers(1, 8)), draw(st.integers(1, 10**7))
    peak = draw(POSITIVE)
    return Run(
        name=draw(
            st.from_regex(r"[\w.äλ中][\w.-]{0,40}", fullmatch=True).filter(lambda n: n not in (".", ".."))
        ),
        model=model,
        data=draw(text | chat),
        objective=CausalLM(z_loss=draw(st.floats(0, 1))),
        optim=Optim(
            name=draw(st.sampled_from(["adamw", "muon"])),
            schedule=draw(st.sampled_from(["cosine", "linear", "wsd", "constant"])),
            peak_lr=peak,
            final_lr=peak * draw(SHARE),
            warmup_steps=draw(st.integers(0, steps)),
            b1=draw(SHARE),
        ),
        train=Train(steps=steps, accumulate=accumulate, batch_size=accumulate * draw(st.integers(1, 99))),
        mesh=Mesh(fsdp=draw(st.integers(1, 64)), tensor=draw(st.integers(1, 64))),
        compute=Compute(unroll=draw(st.none() | st.integers(1, 9)), strict=draw(st.booleans())),
        init_from=draw(words),
    )


@settings(max_examples=60, deadline=None)
@given(runs())
def test_any_run_survives_json(run: Run) -> None:
    text = json.dumps(to_json(run), allow_nan=False)
    again = from_json(Run, json.loads(text))
    assert again == run
    assert hash(again) == hash(run)  # tuples came back as tuples: a config is a cache's key
    assert json.dumps(to_json(again)) == text


def test_integers_become_floats_where_a_field_is_one() -> None:
    record = to_json(RUN) | {"optim": {"peak_lr": 1, "final_lr": 0}}
    rate = from_json(Run, record).optim.peak_lr
    assert rate == 1.0
    assert type(rate) is float


def test_fields_left_out_take_their_defaults() -> None:
    assert from_json(Run, {"name": "r", "model": {"kind": "GPT", "layers": 3}}) == Run(
        name="r", model=GPT(layers=3)
    )


def gpt(fields: dict) -> dict:
    return {"model": {"kind": "GPT", **fields}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "config has no field 'modle'; did you mean 'model'?"),
        (gpt({"widht": 1}), "model has no field 'widht'; did you mean 'width'?"),
        ({"model": 3}, "model is 3; it must be a GPT or a Bert or a TransformerXL or a Classifier or a Re"),
        ({"model": {"kind": "Brt"}}, "model.kind is 'Brt'; did you mean 'Bert'?"),
        (gpt({"layers": "12"}), "model.layers is '12'; it must be a value of type int."),
        (gpt({"layers": 12.0}), "model.layers is 12.0; it must be a value of type int."),
        (gpt({"layers": True}), "model.layers is True; it must be a value of type int."),
        (gpt({"bias": 1}), "model.bias is 1; it must be a value of type bool."),
        (
            {"model": {"kind": "GPT", "dropout": False}},
            "model.dropout is False; it must be a value of type float.",
        ),
        (
            {"model": {"kind": "GPT", "kv_heads": "4"}},
            "model.kv_heads is '4'; it must be a value of type int.",
        ),
        (gpt({"windows": 4}), "model.windows is 4; it must be a list."),
        (
            {"model": {"kind": "GPT", "windows": [4, None]}},
            "model.windows[1] is None; it must be a value of type int.",
        ),
        (gpt({"width": None}), "model.width is None; it must be a value of type int."),
        ({"optim": {"eps": float("nan")}}, "optim.eps is nan; it must be a finite number."),
        ({"optim": {"clip_norm": float("inf")}}, "optim.clip_norm is inf; it must be a finite number."),
        ({"optim": {"name": "adam"}}, "optim.name is 'adam'; did you mean 'adamw'?"),
        ({"optim": {"name": 3}}, "optim.name is 3; allowed: adamw, muon"),
        (
            {"data": {"path": "x"}},
            f"data.kind is None; allowed: {DATA}",
        ),
        ({"data": {"kind": "Txt", "path": "x"}}, "data.kind is 'Txt'; did you mean 'Text'?"),
        ({"data": {"kind": "Text"}}, "data.path is missing; Text needs it."),
        ({"data": {"kind": "Text", "path": "x", "bins": 3}}, "data has no field 'bins'; allowed: "),
    ],
)
def test_json_is_strict(change: dict[str, Any], message: str) -> None:
    assert refused(from_json, Run, {"name": "r"} | change).startswith(message)


def test_json_without_a_name_or_of_another_shape_is_refused() -> None:
    assert refused(from_json, Run, {}) == "name is missing; Run needs it."
    assert refused(from_json, Run, [1]) == "config is [1]; it must be an object (Run)."


# ------------------------------------------------------------------------------- impossible values


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (GPT, {"layers": 0}, "model.layers is 0; it must be between 1 and 4,096."),
        (GPT, {"mlp_width": 0}, "model.mlp_width is 0; it must be between 1 and 1,048,576."),
        (GPT, {"logit_softcap": -1.0}, "model.logit_softcap is -1; it must be between 1e-30 and 1e+30."),
        (GPT, {"rope_theta": 0.0}, "model.rope_theta is 0; it must be between 1e-30 and 1e+30."),
        (GPT, {"norm_eps": -1e-5}, "model.norm_eps is -1e-05; it must be between 1e-30 and 1e+30."),
        (GPT, {"dropout": 1.0}, "model.dropout is 1; it must be between 0 and 0.999999."),
        (
            GPT,
            {"width": 770},
            "model.width 770 is not divisible by model.heads 12; change one of them or set model.head_width.",
        ),
        (GPT, {"kv_heads": 5}, "model.heads 12 is not divisible by model.kv_heads 5; "),
        (GPT, {"kv_heads": 24}, "model.heads 12 is not divisible by model.kv_heads 24; "),
        (
            GPT,
            {"position": "rope", "head_width": 33},
            "model.head_width is 33; rotary positions need an even",
        ),
        (GPT, {"position": "rope", "width": 12}, "model.head_width is 1; rotary positions need an even one"),
        (GPT, {"windows": (4, -1)}, "model.windows[1] is -1; it must be between 0 and 16,777,216."),
        (
            GPT,
            {"windows": (4, 0), "causal": False},
            "model.windows is (4, 0) but model.causal is False; a sliding window looks back only: "
            "set causal=True or windows=().",
        ),
        (Compute, {"loss_chunk": 0}, "compute.loss_chunk is 0; it must be between 1 and 16,777,216."),
        (Compute, {"unroll": 0}, "compute.unroll is 0; it must be between 1 and 4,096."),
        (Text, {"path": ""}, "data.path is empty; give a folder made by `jaxgpt data prepare`."),
        (Text, {"path": "x", "length": 1}, "data.length is 1; it must be between 2 and 16,777,216."),
        (Text, {"path": "x", "workers": -1}, "data.workers is -1; it must be between 0 and 1,024."),
        (Chat, {"train": ()}, "data.train is empty; name at least one file."),
        (Chat, {"train": ("x",), "length": 0}, "data.length is 0; it must be between 2 and 16,777,216."),
        (Chat, {"train": ("x",), "bins": 0}, "data.bins is 0; it must be between 1 and 1,048,576."),
        (
            Chat,
            {"train": ("x",), "validation_fraction": 1.0},
            "data.validation_fraction is 1; it must be between 1e-06 and 0.999999.",
        ),
        (CausalLM, {"z_loss": -1.0}, "objective.z_loss is -1; it must be between 0 and 1e+06."),
        (Optim, {"peak_lr": 0.0}, "optim.peak_lr is 0; it must be between 1e-30 and 1e+06."),
        (Optim, {"muon_lr": 0.0}, "optim.muon_lr is 0; it must be between 1e-30 and 1e+06."),
        (Optim, {"eps": 0.0}, "optim.eps is 0; it must be between 1e-30 and 1e+30."),
        (Optim, {"b2": 1.0}, "optim.b2 is 1; it must be between 0 and 0.999999."),
        (Optim, {"final_lr": 1.0}, "optim.final_lr is 1.0; it must be between 0 and optim.peak_lr 0.0006."),
        (Optim, {"warmup_steps": -1}, "optim.warmup_steps is -1; it must be between 0 and 2,147,483,647."),
        (Optim, {"clip_norm": -1.0}, "optim.clip_norm is -1; it must be between 0 and 1e+30."),
        (Optim, {"decay_fraction": 0.0}, "optim.decay_fraction is 0; it must be between 1e-06 and 1."),
        (Mesh, {"fsdp": 0}, "mesh.fsdp is 0; it must be -1 or at least 1."),
        (
            Mesh,
            {"fsdp": -1},
            "mesh {'data': -1, 'fsdp': -1, 'tensor': 1, 'expert': 1} has more than one -1; ",
        ),
        (Train, {"steps": 0}, "train.steps is 0; it must be between 1 and 2,147,483,647."),
        (Train, {"seed": -1}, "train.seed is -1; it must be between 0 and 4,294,967,295."),
        (Train, {"accumulate": 3}, "train.batch_size 32 is not divisible by train.accumulate 3; every "),
        (Run, {"name": ""}, "name is ''; a run's name is a folder's name: letters, digits, -, _ and "),
        (Run, {"name": "a/b"}, "name is 'a/b'; a run's name is a folder's name"),
        *(
            (Run, {"name": name}, f"name is {name!r:.80}; a run's name is a folder's name")
            for name in (".", "..", "-r", "a b", "a\\b", "a\n", "a\x1b[2J", "a\u202eb", "ä" * 101, "a" * 201)
        ),
        (Run, {"name": "a\0b"}, "name is 'a\\x00b'; it must be text without NUL and half surrogate pairs."),
        (
            Run,
            {"name": "a\udc80"},
            "name is 'a\\udc80'; it must be text without NUL and half surrogate pairs.",
        ),
        (
            Run,
            {
                "name": "r",
                "model": Bert(vocab_size=1),
                "objective": MaskedLM(),
            },
            "model.vocab_size is 1; objective=MaskedLM() needs a mask and a token to hide: at least 2.",
        ),
        (
            Run,
            {"name": "r", "data": Text(path="x", length=2048)},
            "data.length 2048 is more than model.context 1024; lower the one or raise the other",
        ),
        (Run, {"name": "r", "model": GPT(causal=False)}, "model.causal is False but the objective predicts "),
        (
            Run,
            {"name": "r", "train": Train(steps=9)},
            "optim.warmup_steps 100 is more than train.steps 9; warm up for fewer steps.",
        ),
    ],
    ids=str,
)
def test_what_is_impossible_is_refused(make: type, fields: dict[str, Any], message: str) -> None:
    assert refused(make, **fields).startswith(message)


@pytest.mark.parametrize(
    ("make", "fields", "message"),
    [
        (Optim, {"peak_lr": "3e-4"}, "optim.peak_lr is '3e-4'; it must be a value of type float."),
        (GPT, {"width": 768.0}, "model.width is 768.0; it must be a value of type int."),
        (GPT, {"norm": "layer"}, "model.norm is 'layer'; did you mean 'layernorm'?"),
        (Compute, {"dtype": "float16"}, "compute.dtype is 'float16'; did you mean 'bfloat16'?"),
        (
            Run,
            {"name": "r", "model": Optim()},
            "model.kind is 'Optim'; ",
        ),
        (
            Run,
            {"name": "r", "data": GPT()},
            f"data.kind is 'GPT'; allowed: {DATA}",
        ),
    ],
)
def test_wrong_types_are_named_where_a_class_is_called(make: type, fields: dict, message: str) -> None:
    """Python checks no annotation, so that a config file would fail on a comparison or much later."""
    assert refused(make, **fields).startswith(message)


def test_every_class_checks_its_types() -> None:
    sections = {"model": GPT, "data": Text, "objective": CausalLM, "optim": Optim, "train": Train}
    for section, kind in (sections | {"mesh": Mesh, "compute": Compute}).items():
        needed = {"path": "x"} if kind is Text else {}
        for field in dataclasses.fields(kind):
            message = refused(kind, **needed | {field.name: object()})
            assert message.startswith(f"{section}.{field.name} is <object"), message


# --------------------------------------------------------------------------------------- the mesh


def test_a_free_axis_takes_the_devices_that_are_left() -> None:
    assert Mesh().resolve(8) == {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1}
    assert Mesh(fsdp=2, tensor=2).resolve(8) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
    assert Mesh(data=2, fsdp=-1, tensor=2).resolve(8) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
    assert Mesh(data=2, fsdp=2, tensor=2).resolve(8) == {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}


@given(st.tuples(*[st.integers(1, 6)] * 4), st.integers(0, 4), st.integers(1, 48))
def test_a_mesh_uses_every_device_or_says_why_not(sizes: tuple, free: int, devices: int) -> None:
    names = ("data", "fsdp", "tensor", "expert")
    given_sizes = {n: -1 if i == free else s for i, (n, s) in enumerate(zip(names, sizes, strict=True))}
    try:
        resolved = Mesh(**given_sizes).resolve(devices)
    except UserError as error:
        product = math.prod(size for size in given_sizes.values() if size > 0)
        assert devices % product if free < 4 else devices != product
        assert f"{product} devices but {devices} are here" in str(error)
    else:
        assert math.prod(resolved.values()) == devices
        assert all(resolved[n] == s for n, s in given_sizes.items() if s > 0)


def test_batch_and_model_must_divide_over_the_mesh() -> None:
    run = Run(name="r", model=GPT(kv_heads=6, mlp_width=102), train=Train(batch_size=24, accumulate=2))
    assert run.check_mesh(4) == {"data": 4, "fsdp": 1, "tensor": 1, "expert": 1}

    def on(model: GPT = run.model, **axes: int) -> str:
        mesh = Mesh(**({"data": 1} | axes))
        devices = mesh.data * mesh.fsdp * mesh.tensor
        return refused(replace(run, mesh=mesh, model=model).check_mesh, devices)

    assert on(data=2, fsdp=4) == (
        "train.batch_size 24 over accumulate 2 gives microbatches of 12 rows, not divisible by "
        "data x fsdp x expert = 8 devices; use a batch_size that is a multiple of 16."
    )
    assert on(tensor=5) == (
        "model.heads 12 is not divisible by mesh.tensor 5; use a multiple of 5 or a smaller tensor axis."
    )
    assert on(tensor=4).startswith("model.kv_heads 6 is not divisible by mesh.tensor 4;")
    assert on(replace(run.model, kv_heads=None), tensor=4).startswith("model.mlp_width 102 is not divis")
    odd = GPT(vocab_size=257)
    assert on(odd, tensor=2).startswith("model.vocab_size 257 is not divisible by mesh.tensor 2;")
    sparse = GPT(moe=MoE(experts=4, width=33))
    assert on(sparse, tensor=2).startswith("model.moe.width 33 is not divisible by mesh.tensor 2;")
    narrow = GPT(width=90, heads=1, head_width=64)
    assert on(narrow, fsdp=12).startswith("model.width 90 is not divisible by mesh.fsdp 12;")


# ----------------------------------------------------------------------------------------- files

CONFIG = """
from jaxgpt.config import GPT, Optim, Run


def config():
    return Run(name="r", model=GPT(windows=[4, 0]), optim=Optim(peak_lr=1))
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text.lstrip("\n"))
    return path


def test_a_python_file_and_a_runs_folder_give_the_run(tmp_path: Path) -> None:
    run = load(write(tmp_path / "a.py", CONFIG))
    assert run == Run(name="r", model=GPT(windows=(4, 0)), optim=Optim(peak_lr=1.0))
    assert run.model.windows == (4, 0)  # a list would be no key of a cache
    (tmp_path / "config.json").write_text(json.dumps({"run": to_json(run), "versions": {}}))
    assert load(tmp_path) == load(tmp_path / "config.json") == load(str(tmp_path)) == run
    (tmp_path / "bare.json").write_text(json.dumps(to_json(run)))
    assert load(tmp_path / "bare.json") == run


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name=", "nmae=", ", line 5: Run has no field 'nmae'; did you mean 'name'?"),
        ("peak_lr=", "peak=", ", line 5: Optim has no field 'peak'; did you mean 'peak_lr'?"),
        ("=1)", "='1')", ", line 5: optim.peak_lr is '1'; it must be a value of type float."),
        ("=1)", "=-1)", ", line 5: optim.peak_lr is -1; it must be between 1e-30 and 1e+06."),
        ("name=", "name='r', name=", ", line 5: keyword argument repeated: name."),
        ("def config():", "def config(:", ", line 4: "),
        ("    return", "   \n     return Run(\n return", ", line 6: "),
        ("return", "None.x; return", ", line 5: AttributeError: 'NoneType' object has no attribute 'x'"),
        ("\n\ndef", "\n1 / 0\ndef", ", line 3: ZeroDivisionError: division by zero"),
        ("GPT, Optim", "GTP, Optim", ", line 1: ImportError: cannot import name 'GTP' from 'jaxgpt.config'"),
        ("return", "raise ValueError('a\\n  b') #", ", line 5: ValueError: a b"),
        ("def config", "def configure", " has no function config(); define `def config() -> Run`."),
        ("def config():", "config = Run(name='r')\ndef other():", " has no function config(); define"),
        ("return Run", "return dict", ": config() returned dict; it must return a Run."),
        ("return", "return None #", ": config() returned NoneType; it must return a Run."),
        ("return", "raise SystemExit #", ", line 5: it calls sys.exit(None); a config returns a Run."),
        ("return", "import sys; sys.exit(3) #", ", line 5: it calls sys.exit(3); a config returns a Run."),
        (
            "\n\ndef",
            "\nraise SystemExit('x')\ndef",
            ", line 3: it calls sys.exit('x'); a config returns a Run.",
        ),
        ("return", "raise GeneratorExit('gone') #", ", line 5: GeneratorExit: gone"),
        ("return", "raise BaseException('a') #", ", line 5: BaseException: a"),
        ("return", "return config() #", ", line 5: RecursionError: maximum recursion depth exceeded"),
    ],
    ids=str,
)
def test_a_config_file_that_fails_is_named_with_its_line(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.py", CONFIG.replace(old, new, 1))
    assert refused(load, path).startswith(f"{path}{message}")


def test_an_error_in_another_file_names_the_line_that_led_there(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.py", "\n\nimport ast\ndef config():\n    return ast.parse('x x', 'other.py')\n"
    )
    message = refused(load, path)
    assert message == f"{path}, line 3: SyntaxError: invalid syntax (other.py, line 1)"
    path.write_bytes(b"x = 1\0\n")  # which Python reports without a line
    assert re.fullmatch(rf"{path}: \w+: source code string cannot contain null bytes", refused(load, path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", " is damaged (not JSON: "),
        ("[1]", " is damaged (Expected `object`, got `array`); restore it or start a new run."),
        ('{"run": [1]}', ": config is [1]; it must be an object (Run)."),
        ('{"run": ' + "[" * 900 + "]" * 900 + "}", " is damaged (its values are nested too deeply); "),
        ('{"run": {"name": ' + "9" * 5000 + "}}", " is damaged (not JSON: "),
        ("\udcff", " is damaged (not UTF-8 at byte 0); "),
        ('{"run": {"name": "r", "modle": 1}}', ": config has no field 'modle'; did you mean 'model'?"),
        ('{"name": "r", "optim": {"eps": NaN}}', " is damaged (not JSON: NaN is no JSON value); "),
    ],
    ids=lambda value: value[:40],
)
def test_a_damaged_record_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(load, tmp_path).startswith(f"{path}{message}")


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "nope.py"
    assert refused(load, missing) == (
        f"config {str(missing)!r} does not exist; give a .py file, a config.json or a run folder."
    )
    assert str(tmp_path / "config.json") in refused(load, tmp_path)
    yaml = write(tmp_path / "a.yaml", "name: r")
    assert refused(load, yaml) == f"config {str(yaml)!r} must end in .py or .json."


# ------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        ("", RUN),
        ("--optim.peak-lr 3e-4", replace(RUN, optim=Optim(peak_lr=3e-4))),
        ("--optim.peak_lr=3e-4", replace(RUN, optim=Optim(peak_lr=3e-4))),
        ("--model.windows 4 0", replace(RUN, model=GPT(windows=(4, 0)))),
        ("--model.kv-heads 4 --model.bias False", replace(RUN, model=GPT(kv_heads=4, bias=False))),
        ("--data.path y --data.length 9", replace(RUN, data=Text(path="y", length=9))),
        ("--mesh.fsdp -1 --mesh.data 1", replace(RUN, mesh=Mesh(data=1, fsdp=-1))),
        # Impossible apart.
        ("--train.steps 9 --optim.warmup-steps 3", None),
    ],
)
def test_flags_replace_fields(args: str, changed: Run | None) -> None:
    changed = changed or replace(RUN, train=Train(steps=9), optim=Optim(warmup_steps=3))
    assert override(RUN, args.split()) == changed


def test_flags_follow_the_kind_of_data() -> None:
    run = Run(name="r", data=Chat(train=("a",)))
    assert override(run, ["--data.train", "b", "c"]).data == Chat(train=("b", "c"))
    assert "--data.path" in refused(override, run, ["--data.path", "x"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--optim.peak-lrr 3", "unknown option '--optim.peak-lrr'; did you mean '--optim.peak-lr'?"),
        ("--optim.peak-lrr=3", "unknown option '--optim.peak-lrr=3'; did you mean '--optim.peak-lr'?"),
        ("--peak-lr 3", "unknown option '--peak-lr'; did you mean '--optim.peak-lr'?"),
        ("--zzz", "unknown option '--zzz'; `jaxgpt train CONFIG --help` lists what there is."),
        ("more", "unexpected argument 'more'; options are written as --name value."),
        ("--optim.peak-lr much", "--optim.peak-lr: could not convert string to float: 'much'"),
        ("--optim.peak-lr", "Missing value for argument '--optim.peak-lr'"),
        (
            "--optim.name adam",
            "invalid choice 'adam' for argument '--optim.name'. Expected one of ('adamw', ",
        ),
        ("--train.steps 1.5", "--train.steps: invalid literal for int() with base 10: '1.5'"),
        ("--optim.peak-lr -1", "optim.peak_lr is -1; it must be between 1e-30 and 1e+06."),
        ("--model.width 770", "model.width 770 is not divisible by model.heads 12; "),
        ("--train.steps 9", "optim.warmup_steps 100 is more than train.steps 9; warm up for fewer steps."),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_wrong_flag_is_one_sentence(
    args: str,
    message: str,
    encoding: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # tyro draws its box, out of which the sentence is taken, as the terminal's encoding allows.
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    said = refused(override, RUN, args.split())
    assert said.removeprefix("Error parsing ").startswith(message)
    assert not re.search("[│╭─]|--[ -]", said)
    assert sys.stdout.tell() == 0
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------ derived quantities


def test_derived_sizes() -> None:
    model = GPT(width=768, heads=12)
    assert (model.groups, model.head, model.hidden) == (12, 64, 3072)
    swiglu = GPT(width=160, heads=4, kv_heads=2, head_width=16, mlp="swiglu")
    assert (swiglu.groups, swiglu.head, swiglu.hidden) == (2, 16, 448)  # 8/3 x 160 = 426.7
    assert GPT(width=768, heads=12, mlp="swiglu").hidden == 2048  # is a multiple of 64 already
    windows = GPT(windows=(4, 0, 8), context=32)
    assert [windows.window(i) for i in range(5)] == [4, 32, 8, 4, 32]
    assert (RUN.length, replace(RUN, data=Text(path="x", length=9)).length) == (1024, 9)
    assert replace(RUN, runs="there").folder == Path("there/r")
