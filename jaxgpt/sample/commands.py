"""`jaxgpt sample RUN` and `jaxgpt chat RUN`.

Standard output carries the text alone; everything else goes to standard error. jax is imported
only once a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.config import ONE_DEVICE, Knowledge, Mesh, Sampling, code, load_run
from jaxgpt.config.bounds import Rows, Seed, Tokens, bounded
from jaxgpt.config.decoding import Weights, draws
from jaxgpt.data.knowledge import Found
from jaxgpt.errors import UserError, require
from jaxgpt.sample.options import Ruled, library_of, tell, told
from jaxgpt.sample.output import note, noting, require_finite, show, show_best, show_json, write
from jaxgpt.sample.settings import CHAT_DEFAULT, SAMPLE_DEFAULT, Asked, Verify, Way

if TYPE_CHECKING:
    from jaxgpt.sample.generate import Generator
    from jaxgpt.sample.judge import Judge

FLAT = tyro.conf.arg(name="")
"""Gives a group's fields as flags without a prefix."""
Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Known = Annotated[Knowledge, FLAT, tyro.conf.UseAppendAction]
AS_THE_MODEL, ONE_SAMPLE, FREE, NOTHING = Asked(), Way(), Ruled(), Knowledge()


@bounded
def sample(
    run: Folder,
    *,
    prompt: Repeated = (),
    prompt_file: str = "",
    n: Rows = 1,
    max_new_tokens: Tokens = 256,
    sampling: Annotated[Asked, FLAT] = AS_THE_MODEL,
    seed: Seed = 0,
    stop: Repeated = (),
    raw: Switch = False,
    bos: Switch = False,
    no_bos: Switch = False,
    system: str = "",
    json: Switch = False,
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
    weights: Weights = "own",
    batch_size: Rows = 64,
    way: Annotated[Way, FLAT] = ONE_SAMPLE,
    rules: Annotated[Ruled, FLAT] = FREE,
    knowledge: Known = NOTHING,
) -> None:
    """Complete prompts with a trained model, printing the text as it is made.

    A run tuned on dialogues answers the prompt as a user's turn; any other continues it. Several
    completions come in order, with a line `---` between them. By default, the sampling settings are
    those of the model's generation_config.json, else temperature 0.8.

    Args:
      run: folder of the run.
      prompt: text to complete; repeatable; `-` reads standard input, minus the trailing newline.
      prompt_file: file of prompts in UTF-8, one per line.
      n: number of completions per prompt.
      max_new_tokens: maximum number of tokens in a completion.
      sampling: how the next token is chosen.
      seed: completion i of each prompt has seed + i; the same seed gives the same text.
      stop: text that ends a completion and is not shown; repeatable.
      raw: continue the prompt as plain text, also with a run tuned on dialogues.
      bos: begin the text with the beginning-of-text token; by default it begins as in training.
      no_bos: begin it without that token.
      system: system message put before the prompt of a run tuned on dialogues.
      json: print one JSON object per completion (prompt, text, ids, logprobs, finish_reason, seed, score).
      checkpoint: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.
      weights: on one CPU device, by_output lays them out so that few rows are fast, after a longer
        compilation; int8 also rounds them and the rows that they are multiplied by (about 1 % off per
        product).
      batch_size: number of completions generated at a time.
      way: to decode.
      rules: what a completion may be.
      knowledge: what is searched for each prompt and put before it; sources are named after the answers on
        standard error, or in the JSON's `sources` and `facts`.

    Raises:
      UserError: a bad setting, an unreadable prompt, or one longer than the model's context.
      NotFinite: a completion ended where the model's logits were not finite.
    """
    decoding = way.settle(sampling, {}, SAMPLE_DEFAULT)
    plain, most = isinstance(decoding, Sampling), decoding.rows
    require(
        plain or n <= most,
        f"--n is {n} but only {most} completions of a prompt are made; lower it.",
    )
    several = n if plain else draws(decoding)
    require(
        0 <= seed <= 2**32 - several, f"seed is {seed!s:.24}; it must be between 0 and {2**32 - several}."
    )
    require(all(stop), "a --stop string is empty; give at least one character.")
    require(not (bos and no_bos), "--bos and --no-bos exclude each other; drop one.")
    as_chat = load_run(run).templated and not raw
    require(as_chat or not system, "system is given but this run continues plain text; drop it.")
    require(
        not (as_chat and (bos or no_bos)),
        "this run answers dialogues, which begin as its template says; add --raw, or drop the flag.",
    )
    rule, library = rules.rule(), library_of(knowledge, verify)
    texts = [*_prompts(prompt), *_lines(prompt_file)]
    require(bool(texts) or not as_chat, "no prompt is given; add --prompt 'your question'.")
    judge = _judge(way.reward, mesh, verify)
    generator = _load(run, checkpoint, mesh, verify, weights)
    generator.judges |= judge
    texts = texts or [""]
    found = [library.about(text) for text in texts] if library else [Found()] * len(texts)
    whole = [known.text + text for known, text in zip(found, texts, strict=True)]
    if as_chat:
        asked = _dialogues(generator, whole, system)
    else:
        asked = generator.texts(whole, bos or (False if no_bos else None))
    generator.check_prompts(asked["prompts"])  # before any is answered
    settings = {
        "decoding": way.settle(sampling, generator.tokenizer.sampling, SAMPLE_DEFAULT),
        "max_new_tokens": max_new_tokens,
        "stop_strings": stop,
    } | ({"rules": rule} if rule else {})
    each = n if plain else 1
    rows = [(i, (seed + j) % 2**32) for i in range(len(asked["prompts"])) for j in range(each)]
    size = max(1, batch_size // most)
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    calls = [_part(asked, part) | settings for part in parts]
    about = [
        {"prompt": text} | (told(known) if library else {}) for text, known in zip(texts, found, strict=True)
    ]
    if json:
        failed = show_json(generator, calls, [about[i] for i, _ in rows], n)
    else:
        failed = show(generator, calls) if plain else show_best(generator, calls, n)
    if library and not json:
        for known in found:
            tell(known)
    require_finite(failed, f"{failed} of {len(rows) * most} completions")


def _part(asked: dict[str, Any], rows: list[tuple[int, int]]) -> dict[str, Any]:
    """Of what a generator takes, that of some rows: numbers of prompts, and seeds."""
    numbers, seeds = zip(*rows, strict=True)
    return {k: [v[i] for i in numbers] if isinstance(v, list) else v for k, v in asked.items()} | {
        "seeds": seeds
    }


def _judge(reward: str, mesh: Mesh, verify: bool) -> dict[str, Judge]:
    """The reward model of --reward by its folder, if it is one; a function's file is trusted."""
    if code.is_reference(reward) and (path := Path(reward.rpartition(":")[0])).is_file():
        code.trust(path)
    if not Path(reward or "-").is_dir():
        return {}
    from jaxgpt.sample.judge import Judge

    return {reward: Judge.load(reward, mesh=mesh, verify=verify)}


@bounded
def chat(
    run: Folder,
    *,
    system: str = "",
    max_new_tokens: Tokens = 512,
    sampling: Annotated[Asked, FLAT] = AS_THE_MODEL,
    seed: Seed = 0,
    stop: Repeated = (),
    checkpoint: str = "best",
    verify: Verify = True,
    mesh: Mesh = ONE_DEVICE,
    weights: Weights = "own",
    knowledge: Known = NOTHING,
) -> None:
    """Talk with a trained model, one line per turn; standard input may be a pipe.

    /reset forgets the dialogue, /quit or end of input ends it, Ctrl-C stops an answer. When the
    dialogue outgrows the model's context its oldest turns are forgotten. By default, the sampling
    settings are those of the model's generation_config.json, else temperature 0.6.

    Args:
      run: folder of the run.
      system: system message that opens the dialogue.
      max_new_tokens: maximum number of tokens in an answer.
      sampling: how the next token is chosen.
      seed: random seed; the same seed and turns give the same dialogue.
      stop: text that ends an answer and is not shown; repeatable.
      checkpoint: `best` on validation data, `newest`, or a step number.
      mesh: devices to spread the model over.
      weights: on one CPU device, by_output lays them out so that few rows are fast, after a longer
        compilation; int8 also rounds them and the rows that they are multiplied by (about 1 % off per
        product).
      knowledge: what is searched for each turn and put before it, for that turn alone; sources are named
        after the answer on standard error.
    """
    import jax

    require(
        jax.process_count() == 1,
        f"`jaxgpt chat` talks to one process, but {jax.process_count()} were started; start it once, "
        "without the launcher of the cluster.",
    )
    if not load_run(run).templated:
        note("this run was not tuned on dialogues, so its answers may make no sense")
    require(0 <= seed < 2**32, f"seed is {seed!s:.24}; it must be between 0 and {2**32 - 1}.")
    require(all(stop), "a --stop string is empty; give at least one character.")
    library = library_of(knowledge, verify)
    generator = _load(run, checkpoint, mesh, verify, weights)
    note("/reset forgets the dialogue, /quit ends it, Ctrl-C stops an answer")
    settings = {
        "decoding": sampling.settle(generator.tokenizer.sampling, CHAT_DEFAULT),
        "stop_strings": stop,
    }
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, str]] = []
    for count, line in enumerate(_read_turns()):
        if line == "/reset":
            turns = []
            note("the dialogue is forgotten")
            continue
        found = library.about(line) if library else Found()
        try:
            turns, asked = _fit(
                generator, opening, [*turns, {"role": "user", "content": found.text + line}], max_new_tokens
            )
        except UserError as error:
            note(str(error))
            continue
        call = asked | settings | {"seeds": [(seed + count) % 2**32]}
        answer = _answer(generator, call, max_new_tokens)
        turns[-1:] = [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]
        if library:
            tell(found)


def _answer(generator: Generator, call: dict[str, Any], max_new_tokens: int) -> str:
    """Stream one answer; an interrupt ends it with what was made so far."""
    answer, most = "", min(max_new_tokens, generator.context - len(call["prompts"][0]))
    failed: list[int] = []
    try:
        for token in noting(generator.stream(**call, max_new_tokens=most), failed):
            answer += token.text
            write(token.text)
    except KeyboardInterrupt:
        note("stopped")
    write("\n")
    require_finite(len(failed), "the answer")
    return answer


def _fit(
    generator: Generator,
    opening: list[dict[str, str]],
    turns: list[dict[str, str]],
    max_new_tokens: int,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The newest turns that leave room for an answer, and what the generator takes to give it.

    Room is `max_new_tokens`, but no more than a quarter of the context, so that a long limit does
    not wipe out the dialogue.

    Raises:
      UserError: the newest turn alone is longer than the context.
    """
    context = generator.context
    room = min(max_new_tokens, context // 4)
    cut = 0
    while True:
        asked = generator.dialogues([[*opening, *turns[cut:]]])
        ids = asked["prompts"][0]
        if len(ids) + room <= context or cut == len(turns) - 1:
            break
        cut += 2  # a user's turn and its answer
    require(
        len(ids) < context,
        f"this turn makes a prompt of {len(ids)} tokens but the model's context is {context}; shorten it.",
    )
    if cut:
        note(f"the dialogue is longer than the context: the oldest {cut} turns are forgotten")
    return turns[cut:], asked


def _read_turns() -> Iterator[str]:
    """Lines of standard input until its end or /quit; empty ones are skipped."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and editing)
    while True:
        try:
            if terminal:
                line = input("> ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            note("/quit or Ctrl-D ends the dialogue")
            continue
        line = line.strip()
        if line == "/quit":
            return
        if line:
            yield line


def _load(run: str, checkpoint: str, mesh: Mesh, verify: bool, weights: Weights) -> Generator:
    from jaxgpt.sample.generate import Generator

    return Generator.load(run, which=checkpoint, mesh=mesh, verify=verify, weights=weights)


def _dialogues(generator: Generator, texts: Iterable[str], system: str) -> dict[str, Any]:
    """What the generator takes to answer texts as a user's turns."""
    return generator.dialogues([_turns(text, system) for text in texts])


def _turns(text: str, system: str) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def _prompts(prompts: Iterable[str]) -> list[str]:
    return [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in prompts]


def _lines(path: str) -> list[str]:
    if not path:
        return []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompt file {path!r} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path!r} is not UTF-8 (byte {error.start}).") from None
    kept = [line for line in lines if line.strip()]
    require(bool(kept), f"prompt file {path!r} holds no prompt; write one per line.")
    return kept
