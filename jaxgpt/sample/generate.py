"""A model ready to generate: prompts in, completions out, whole or token by token.

`Generator.generate` is one jitted program, prefill and the whole loop. `Generator.stream` runs the
same two functions apart: prefill, then a few steps at a time on a state that is donated from call
to call; its output is the same.

Shapes: B rows, T prompt length (rounded up), S slots per row, N stop tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import GPT, ONE_DEVICE, Compute, Decoding, Mesh, Model, load_run
from jaxgpt.config.decoding import OWN
from jaxgpt.errors import UserError, require
from jaxgpt.models import context_of
from jaxgpt.sample.adapters import Adapters, Names
from jaxgpt.sample.load import load_trained
from jaxgpt.sample.program import Made, Program, Rows, bucket, decode, generate, prefill, prepare
from jaxgpt.sample.settings import Sampling
from jaxgpt.sample.strategies import controls_of, features_of, host
from jaxgpt.sample.writer import Reason, Writer
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target
from jaxgpt.text.chat import Dialogue, prefix_length, prompt_ids
from jaxgpt.text.tokenizer import Tokenizer, before_text, text_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """What one row produced."""

    ids: list[int]
    """Every token made; where `finish_reason` is "stop" the last is the stop token, or completes the stop
    string."""
    logprobs: list[float]
    """Log-probability of each id under the model itself (see `strategies.choose`)."""
    finish_reason: Reason
    text: str
    """What the ids add to the prompt's text, without the stop token and up to a stop string."""
    seed: int

    def __repr__(self) -> str:
        return f"Completion({self.text!r}, {len(self.ids)} tokens, {self.finish_reason!r}, seed {self.seed})"


class Token(NamedTuple):
    """One token of a stream."""

    row: int
    id: int
    """-1 where `finish_reason` is "error": none was made."""
    logprob: float
    finish_reason: Reason | None
    """None until the row's last token."""
    text: str
    """Characters this token completes: joined over a row, they are `Completion.text`."""


class Generator:
    """A model ready to generate.

    Args:
      model: the architecture.
      compute: gives the type of weights and cache.
      params: in the training form (layers stacked), on any mesh.
      tokenizer: reads and writes text; ids outside it are never generated.
      mesh: where params live; rows are then spread over its `data` and `fsdp` axes.
      bos: whether a text begins with `<|bos|>`, as in training; None means as the tokenizer does.

    Raises:
      UserError: the tokenizer has more ids than the model.
    """

    def __init__(
        self,
        model: Model,
        compute: Compute,
        params: dict,
        tokenizer: Tokenizer,
        *,
        mesh: jax.sharding.Mesh | None = None,
        bos: bool | None = None,
    ) -> None:
        require(
            tokenizer.vocab_size <= model.vocab_size,
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.vocab_size}; "
            "use the tokenizer that the model was trained with.",
        )
        # Remat plays no part here; the kernel of training is prefill's.
        self.model, self.compute = model, Compute(dtype=compute.dtype, attention=compute.attention)
        self.target = Target.of(mesh)
        self.tokenizer, self.mesh = tokenizer, mesh
        self.stop = tokenizer.stop_ids
        """Ids that end a row unless a call says otherwise."""
        self.bos = tokenizer.adds_bos if bos is None else bos
        self._told = False
        self.context = context_of(model, params)
        """Most tokens of a row."""
        self.update(params)

    def update(self, params: dict) -> None:
        """Use other parameters (of the training form) from now on; adapters loaded over them are dropped."""
        self.adapters: Adapters | None = None
        with self._on_mesh():
            self.params = prepare(self.model, self.compute, self.target, params)

    def make_slots(self, slots: int = 8, rank: int = 16) -> None:
        """Make room for `slots` LoRA adapters of at most this rank, which rows choose from by name."""
        require(self.adapters is None, "there are slots already; load adapters into them.")
        self.adapters = Adapters(self.model, self.compute, self.target, slots, rank)
        with self._on_mesh():
            self.params = self.adapters.make(self.params)

    def load_adapter(self, name: str, folder: str | Path, *, which: str = "best") -> None:
        """Put a LoRA that was tuned from these parameters into a slot; an adapter of that name is replaced.

        Once one was loaded, the next compile nothing.

        Args:
          name: what rows choose it by.
          folder: of the run that tuned it.
          which: its checkpoint: `best`, `newest` or a step number.

        Raises:
          UserError: it is no LoRA, has too high a rank or targets experts, or all slots are taken.
        """
        if self.adapters is None:
            self.make_slots()
        assert self.adapters is not None
        with self._on_mesh():
            self.params = self.adapters.load(self.params, name, folder, which, self.mesh)

    @classmethod
    def load(
        cls, folder: str | Path, *, which: str = "best", mesh: Mesh = ONE_DEVICE, verify: bool = True
    ) -> Generator:
        """The generator of a run's folder.

        Args:
          folder: of the run.
          which: checkpoint: `best` on validation data, `newest`, or a step number.
          mesh: devices to spread the model over.
          verify: see `load_trained`.
        """
        run = load_run(folder)
        require(
            run.writes,
            f"{folder} holds a {type(run.model).__name__} trained on {type(run.objective).__name__}(), which "
            "writes no text; `jaxgpt eval` measures it, and sampling needs a run of CausalLM().",
        )
        trained = load_trained(folder, which=which, mesh=mesh, verify=verify)
        parts = (run.model, run.compute, trained.params, trained.tokenizer)
        return cls(*parts, mesh=trained.mesh, bos=trained.bos)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _call(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling],
        max_new_tokens: int,
        seeds: Sequence[int],
        stop: Sequence[int] | None,
        prefix: Sequence[int] | None = None,
        adapters: Names = None,
    ) -> tuple[Program, Rows]:
        """Check a call and turn it into arrays, with empty rows up to what the mesh divides."""
        context, vocab = self.context, self.tokenizer.vocab_size
        require(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        self.check_prompts(prompts)
        if not self._told and max(map(len, prompts)) + max_new_tokens > context:
            self._told = True
            log.warning("max_new_tokens is cut to what the context of %s leaves", context)
        ends = [min(len(p) + max_new_tokens, context) for p in prompts]
        if not isinstance(decoding, Sampling | Sequence):
            raise UserError(f"decoding is {type(decoding).__name__}, which is not made yet; use Sampling.")
        settings = [decoding] * len(prompts) if isinstance(decoding, Sampling) else list(decoding)
        prefix = [*map(len, prompts)] if prefix is None else prefix
        for name, given in (("decoding", settings), ("seeds", seeds), ("prefix", prefix)):
            require(
                len(given) == len(prompts),
                f"{name} has {len(given)} entries for {len(prompts)} prompts; give one per prompt.",
            )
        for i, (size, prompt) in enumerate(zip(prefix, prompts, strict=True)):
            require(
                0 <= size <= len(prompt),
                f"prefix {i} is {size}; it must be between 0 and the {len(prompt)} tokens of prompt {i}.",
            )
        program = Program(
            *(self.model, self.compute, self.target),
            *(bucket(max(ends), context), vocab, features_of(settings)),
        )
        stops = self.stop if stop is None else tuple(stop)
        extra = 0 if self.mesh is None else -len(prompts) % row_shards(self.mesh)
        T = bucket(max(map(len, prompts)), context)
        tokens_BT = np.zeros((len(prompts) + extra, T), np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)] = prompt
        stop_N = np.full(8 * -(-len(stops) // 8), -1, np.int32)
        stop_N[: len(stops)] = stops
        rows = Rows(
            host(tokens_BT, np.int32),
            host([*map(len, prompts), *[1] * extra], np.int32),
            host([*prefix, *[1] * extra], np.int32),
            host([*ends, *[1] * extra], np.int32),
            host([stop_N] * len(tokens_BT), np.int32),
            controls_of(settings + [Sampling()] * extra, [*seeds, *[0] * extra]),
        )
        require(
            adapters is None or self.adapters is not None,
            f"adapters is {adapters!r} but none is loaded; load one with load_adapter(name, folder).",
        )
        if self.adapters is not None:
            slots = self.adapters.of_rows(adapters, len(prompts))
            rows = rows._replace(adapter_B=host([*slots, *[0] * extra], np.int32))
        return program, self._place(rows)

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Refuse a prompt that is empty, leaves no room for an answer, or holds ids of no token."""
        context, vocab = self.context, self.tokenizer.vocab_size
        for i, prompt in enumerate(prompts):
            require(len(prompt) > 0, f"prompt {i} is empty; give at least one token.")
            require(
                len(prompt) < context,
                f"prompt {i} has {len(prompt)} tokens but the model's context is {context}, "
                "new tokens included; shorten it.",
            )
            for token in prompt:
                if not 0 <= token < vocab:
                    raise UserError(f"prompt {i} holds the id {token}; the tokenizer's are 0 to {vocab - 1}.")

    def dialogues(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """What `generate` and `stream` take to answer dialogues: `prompts`, `apart`, and `prefix` of a
        prefix LM.
        """
        prompts = [prompt_ids(turns, self.tokenizer) for turns in dialogues]
        call: dict[str, Any] = {"prompts": prompts, "apart": True}
        if isinstance(self.model, GPT) and self.model.prefix:
            call["prefix"] = [prefix_length(turns, self.tokenizer) for turns in dialogues]
        return call

    def texts(self, texts: Sequence[str], bos: bool | None = None) -> dict[str, Any]:
        """What `generate` and `stream` take to go on with texts.

        Args:
          texts: where one is empty and no `<|bos|>` is asked for, the token that ends a text stands there.
          bos: whether each begins with `<|bos|>`; None means as in training.

        Raises:
          UserError: an empty text that must not begin with `<|bos|>`.
        """
        require(
            bos is not False or all(texts),
            "a prompt is empty and begins with no token, so there is nothing to go on from; write a prompt, "
            "or drop --no-bos.",
        )
        adds = self.bos if bos is None else bos
        nothing = [before_text(self.tokenizer, adds)]
        return {"prompts": [text_ids(self.tokenizer, text, adds) or nothing for text in texts]}

    def _place(self, rows: Rows) -> Rows:
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, rows)
        return jax.device_put(rows, NamedSharding(self.mesh, spec(("batch",))))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        *,
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        stop_strings: Sequence[str] | Sequence[Sequence[str]] = (),
        prefix: Sequence[int] | None = None,
        apart: bool = False,
        adapters: Names = None,
    ) -> list[Completion]:
        """Complete every prompt, in one call of one program.

        Args:
          prompts: token ids, of any lengths below the context.
          decoding: for all rows; of samplings also one each.
          max_new_tokens: most tokens per row makes; cut to what the context leaves (said once).
          seeds: one per row; None numbers them. A row's output is a function of its prompt,
            sampling and seed: not of the other rows, nor of padding.
          stop: ids that end a row; None means `self.stop`.
          stop_strings: texts that end a row where they are completed, for all rows or a list each. They
            are found on the host, so that the rows are made as by `stream`.
          prefix: first tokens of each prompt, which see each other under `GPT.prefix`: those before
            the first answer of a dialogue; None means all.
          apart: whether what is made is a text of its own, as an answer is, and no more of the prompt's: the
            space that SentencePiece puts before a text is then dropped.
          adapters: name of a loaded adapter, for all rows or one each; None means the base alone.

        Raises:
          UserError: an empty prompt or stop string, a prompt that fills the context, or lists of
            different lengths.
        """
        if not prompts:
            return []
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        if stop_strings:
            tokens = self.stream(
                prompts, decoding, max_new_tokens=max_new_tokens, seeds=seeds, stop=stop,
                stop_strings=stop_strings, prefix=prefix, apart=apart, adapters=adapters, chunk=16,
            )  # fmt: skip
            return _completions(tokens, seeds)
        return self.begin(
            prompts, decoding, max_new_tokens=max_new_tokens, seeds=seeds, stop=stop, prefix=prefix,
            apart=apart, adapters=adapters,
        )()  # fmt: skip

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        *,
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        prefix: Sequence[int] | None = None,
        apart: bool = False,
        adapters: Names = None,
    ) -> Callable[[], list[Completion]]:
        """Dispatch what `generate` does and return before it is done; what is returned waits for the result.

        So the next call can be dispatched before this one's result is read.
        """
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        with self._on_mesh():
            program, rows = self._call(prompts, decoding, max_new_tokens, seeds, stop, prefix, adapters)
            running = generate(program, self.params, rows)
        stops = set(self.stop if stop is None else stop)
        heads = [() if apart else prompt for prompt in prompts]

        def result() -> list[Completion]:
            made, starts = jax.device_get(running), map(len, prompts)
            parts = zip(count(), starts, heads, seeds, strict=False)
            return [self._completion(made, *row, stops) for row in parts]

        return result

    def _completion(
        self, made: Made, i: int, start: int, after: Sequence[int], seed: int, stops: set[int]
    ) -> Completion:
        span = slice(start, int(made.length_B[i]))
        ids, logprobs = made.tokens_BS[i, span].tolist(), made.logprobs_BS[i, span].tolist()
        stopped = bool(ids) and ids[-1] in stops
        text = self.tokenizer.decode(ids[: len(ids) - stopped], after)
        reason: Reason = "error" if made.failed_B[i] else "stop" if stopped else "length"
        return Completion(ids, logprobs, reason, text, seed)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        *,
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        stop_strings: Sequence[str] | Sequence[Sequence[str]] = (),
        prefix: Sequence[int] | None = None,
        apart: bool = False,
        adapters: Names = None,
        chunk: int = 4,
    ) -> Iterator[Token]:
        """As `generate`, yielding tokens as they are made: the first alone, then `chunk` at a time.

        Tokens of one row come in order; rows alternate. The device works on the next chunk while
        the caller handles this one.
        """
        if not prompts:
            return
        seeds = list(range(len(prompts)) if seeds is None else seeds)
        stops = set(self.stop if stop is None else stop)
        shown = [len(prompt) for prompt in prompts]
        strings = _each(stop_strings, len(prompts))
        heads = [() if apart else prompt for prompt in prompts]
        writers = [Writer(self.tokenizer, h, s) for h, s in zip(heads, strings, strict=True)]
        with self._on_mesh():
            program, rows = self._call(prompts, decoding, max_new_tokens, seeds, stop, prefix, adapters)
            state, made = prefill(program, self.params, rows)
        open_rows = set(range(len(prompts)))
        while open_rows:
            now: Made = jax.tree.map(np.array, made)
            if not now.done_B.all():
                with self._on_mesh():
                    state, made = decode(program, self.params, rows, state, np.int32(chunk))
            for slot in range(min(shown), int(now.length_B.max())):
                for row in sorted(open_rows):
                    if shown[row] <= slot < now.length_B[row]:
                        yield (token := _token(now, row, slot, stops, writers[row]))
                        open_rows -= {row} if token.finish_reason else set()
            for row in sorted(open_rows):
                if now.failed_B[row]:
                    yield Token(row, -1, 0.0, "error", writers[row].flush())
            open_rows -= set(np.flatnonzero(now.failed_B).tolist())
            shown = [max(s, int(n)) for s, n in zip(shown, now.length_B, strict=False)]


def _token(made: Made, row: int, slot: int, stops: set[int], writer: Writer) -> Token:
    token = int(made.tokens_BS[row, slot])
    reason: Reason | None = None
    if made.done_B[row] and not made.failed_B[row] and slot == made.length_B[row] - 1:
        reason = "stop" if token in stops else "length"
    text = "" if token in stops else writer.feed(token)
    text += writer.flush() if reason else ""
    return Token(row, token, float(made.logprobs_BS[row, slot]), "stop" if writer.stopped else reason, text)


def _completions(tokens: Iterable[Token], seeds: Sequence[int]) -> list[Completion]:
    """What the tokens of a stream amount to, a completion for each row."""
    mine: list[list[Token]] = [[] for _ in seeds]
    for token in tokens:
        mine[token.row].append(token)
    return [
        Completion(
            [t.id for t in row if t.id >= 0],
            [t.logprob for t in row if t.id >= 0],
            row[-1].finish_reason or "length",
            "".join(t.text for t in row),
            seed,
        )
        for row, seed in zip(mine, seeds, strict=True)
    ]


def _each(strings: Sequence[str] | Sequence[Sequence[str]], rows: int) -> list[list[str]]:
    """Stop strings of every row."""
    alike = [s for s in strings if isinstance(s, str)]
    if isinstance(strings, str) or len(alike) == len(strings):
        return [[strings] if isinstance(strings, str) else alike] * rows
    require(
        not alike and len(strings) == rows,
        f"stop_strings has {len(strings)} entries for {rows} prompts; give strings, or lists of them.",
    )
    return [list(s) for s in strings]
