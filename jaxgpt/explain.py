"""`jaxgpt explain RUN`: why a model predicts what it predicts, as one page.

jax is imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxgpt.alive import alive
from jaxgpt.config import ONE_DEVICE, Labelled, Mesh, Tagged, load_run
from jaxgpt.config.bounds import Bounds, Limit, Tokens, TokensOr0, bounded
from jaxgpt.errors import UserError, require
from jaxgpt.files import require_writable, to_json, write_text
from jaxgpt.sample.settings import Verify

if TYPE_CHECKING:
    from jaxgpt.evals.explain.ask import Asked
    from jaxgpt.sample.load import Trained

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Baseline = Literal["zero", "pad", "mask"]


@bounded
def explain(
    run: Folder,
    *,
    prompt: str,
    answer: str = "",
    pair: str = "",
    system: str = "",
    raw: Switch = False,
    token: TokensOr0 | None = None,
    labels: Annotated[int, Bounds(1, 64)] = 3,
    max_new_tokens: Tokens = 32,
    baseline: Baseline = "zero",
    error: Annotated[float, Bounds(1e-6, 1)] = 0.01,
    examples: Limit = 200,
    out: str = "",
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Explain one prediction: a token of an answer, a hidden token, a word's tag or a text's label.

    One page, which loads nothing: probability, rank and entropy of every token; what each token of the text
    does for the prediction by gradient x input, integrated gradients and leave-one-out, and how far these
    agree; attention maps and their rollout; the logit lens; training examples that speak for it. The numbers
    are written beside it as JSON. All is computed in float32.

    Args:
      run: folder of the run.
      prompt: the text; of a run tuned on dialogues, what the user says.
      answer: what follows it, as it is or is to be explained; by default what the model writes, greedily.
      pair: the second text, of a classifier of pairs.
      system: system message before the prompt of a run tuned on dialogues.
      raw: go on with the prompt as plain text, also with a run tuned on dialogues.
      token: which token of the answer, hidden token of the text, or word of a tagger's is explained, from 0;
        by default the first (of a tagger the first that is not outside).
      labels: how many of the likeliest labels are explained, of a tagger or classifier.
      max_new_tokens: of an answer that the model writes.
      baseline: what embeddings are compared with: zeros, or those of the token for padding or the mask.
      error: integrated gradients are refined until they sum to the difference up to this share of it.
      examples: how many of the first training examples are compared; 0 for none.
      out: file of the page; by default RUN/explain/NAME.html, named after what is asked.
      checkpoint: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.

    Raises:
      UserError: a run that predicts nothing of tokens, or an option that it has no use for.
      NotFinite: the model gives NaN.
    """
    config = load_run(run)
    _check_options(run, config, answer=answer, pair=pair, system=system, raw=raw)
    require(bool(prompt), "--prompt is empty; write at least one character.")
    require(not out or out.endswith(".html"), f"--out is {out!r}; name a file that ends in .html.")
    require_writable(Path(out).parent if out else Path(run))
    import jax

    from jaxgpt.evals.explain.question import in_float32
    from jaxgpt.evals.explain.record import explained
    from jaxgpt.report.explained import write_explained
    from jaxgpt.sample.load import load_trained

    trained = in_float32(load_trained(run, which=checkpoint, mesh=mesh, verify=verify))
    start = _baseline(trained, baseline)
    with alive("explaining"), jax.default_matmul_precision("float32"):
        if config.task:
            asked = _ask_labels(trained, prompt, pair, token, labels)
        elif config.model.causal:
            asked = _ask_answer(trained, prompt, answer, system, raw, token, max_new_tokens)
        else:
            asked = _ask_masked(trained, prompt, token)
        record = explained(trained, asked, baseline=start, bound=error, examples=examples)
    if jax.process_index() > 0:
        return
    given = {"prompt": prompt, "answer": answer, "pair": pair, "system": system, "raw": raw, "token": token}
    settings = {
        "baseline": "zeros" if start is None else f"<|{baseline}|>",
        "left_out": "deleted" if asked.question.mask is None else "masked",
        "error": error,
        "labels": labels,
        "max_new_tokens": max_new_tokens,
        "examples": examples,
    }
    path = Path(out) if out else Path(run) / "explain" / f"{_slug(given | settings, trained.step)}.html"
    options = given | {
        name: value for name, value in settings.items() if name not in ("baseline", "left_out")
    }
    command = _command(run, options | {"baseline": baseline, "out": out, "checkpoint": trained.step})
    record["audit"] = _audit(trained, record, settings, command, path)
    write_text(path.with_suffix(".json"), to_json(given | record) + "\n")
    write_explained(path, record)
    _print(record, path)


def _check_options(run: str, config: Any, *, answer: str, pair: str, system: str, raw: bool) -> None:
    """Refuse what a run has no use for."""
    require(
        config.headed is None or config.task is not None,
        f"{run} gives a reward, not probabilities of tokens or labels; explain the run that it judges.",
    )
    chats = config.writes and config.templated
    for name, value, able in (
        ("answer", answer, config.writes),
        ("pair", pair, isinstance(config.data, Labelled) and config.task),
        ("system", system, chats and not raw),
        ("raw", raw, chats),
    ):
        require(not value or bool(able), f"--{name} is given, but {run} has no use for it; drop it.")


def _baseline(trained: Trained, name: Baseline) -> int | None:
    if name == "zero":
        return None
    control = trained.tokenizer.control
    if f"<|{name}|>" not in control:
        raise UserError(f"--baseline is {name!r} but this tokenizer has no <|{name}|>; use zero.")
    return control[f"<|{name}|>"]


def _ask_labels(trained: Trained, prompt: str, pair: str, token: int | None, labels: int) -> Asked:
    from jaxgpt.evals.explain.ask import ask_label, ask_tag

    if isinstance(trained.run.data, Tagged):
        return ask_tag(trained, prompt, token, labels)
    require(token is None, f"--token is {token}, but a classifier predicts one label of a text; drop it.")
    return ask_label(trained, prompt, pair, labels)


def _ask_masked(trained: Trained, prompt: str, token: int | None) -> Asked:
    from jaxgpt.evals.explain.ask import ask_masked

    return ask_masked(trained, prompt, token)


def _ask_answer(
    trained: Trained, prompt: str, answer: str, system: str, raw: bool, token: int | None, most: int
) -> Asked:
    """The ids of a prompt and its answer, as training had them or as the model writes them."""
    from jaxgpt.api import Model
    from jaxgpt.evals.explain.ask import ask_answer
    from jaxgpt.evals.scoring import Scorer
    from jaxgpt.text.chat import prompt_ids, render

    model, as_chat = Model(trained), trained.run.templated and not raw
    turns = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": prompt}]
    given = prompt_ids(turns, trained.tokenizer) if as_chat else model.encode(prompt)
    if answer and as_chat:
        whole = render([*turns, {"role": "assistant", "content": answer}], trained.tokenizer).tokens
        said = whole[len(given) :]
    elif answer:
        given, said = Scorer.of(trained).pair(prompt, answer)
    elif as_chat:
        said = model.chat(turns, max_new_tokens=most, temperature=0).ids
    else:
        said = model.generate(prompt, max_new_tokens=most, temperature=0).ids
    return ask_answer(trained, given, said, token)


def _slug(given: dict[str, Any], step: int) -> str:
    """A file's name that tells what is asked, the same for the same question."""
    words = re.sub(r"\W+", "-", given["prompt"].lower()).strip("-")[:32].strip("-") or "text"
    return f"{words}-{hashlib.sha256(to_json([given, step]).encode()).hexdigest()[:8]}"


def _command(run: str, options: dict[str, Any]) -> str:
    """The command that makes the page again; options with their default values are left out."""
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(explain).parameters.items()}
    words = ["jaxgpt", "explain", run]
    for name, value in options.items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def _audit(
    trained: Trained, record: dict[str, Any], settings: dict[str, Any], command: str, path: Path
) -> dict[str, Any]:
    """What must be the same for the page to be the same."""
    from jaxgpt.checkpoint.whole import params_digest
    from jaxgpt.train.provenance import environment

    return {
        "run": str(trained.folder),
        "model": type(trained.run.model).__name__,
        "step": trained.step,
        "parameters": params_digest(trained.params),
        "tokenizer": trained.tokenizer.digest,
        "data": record["examples"].get("digest"),
        "settings": settings,
        "environment": environment(),
        "command": command,
        "json": path.with_suffix(".json").name,
    }


def _print(record: dict[str, Any], path: Path) -> None:
    first = record["attributions"][0]
    scores = first["integrated_gradients"]
    strongest = sorted(range(len(scores)), key=lambda i: -abs(scores[i]))[:3]
    words = ", ".join(f"{record['tokens'][i]['text'].strip()!r} {scores[i]:+.2f}" for i in strongest)
    print(
        f"{first['output']!r}: probability {first['probability']:.3g}; integrated gradients "
        f"({first['steps']} steps, error {first['error']:.2%}) give most to {words} nats"
    )
    print(path)
