"""A model ready to generate: prompts in, completions out, whole or token by token.

`Generator.generate` is one jitted program, prefill and the whole loop. `Generator.stream` runs the
same two functions apart: prefill, then a few steps at a time on a state that is donated from call
to call; its output is the same.

Shapes: B rows, T prompt length (rounded up), S slots per row, N stop tokens.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import (
    GPT,
    MBR,
    ONE_DEVICE,
    Beam,
    BestOf,
    Compute,
    Contrastive,
    Decoding,
    Mesh,
    Model,
    Sampling,
    load_run,
)
from jaxgpt.config.decoding import OWN, Weights, draws
from jaxgpt.errors import UserError, require
from jaxgpt.layers.by_output import rounding
from jaxgpt.models import context_of
from jaxgpt.sample import beam, contrastive, select
from jaxgpt.sample.adapters import Adapters
from jaxgpt.sample.completion import (
    Asking,
    Call,
    Completion,
    Maker,
    Token,
    Waiting,
    completions,
    each_row,
    token_of,
)
from jaxgpt.sample.constrained import Guide, Guides, each_rule
from jaxgpt.sample.judge import Judge
from jaxgpt.sample.load import load_trained
from jaxgpt.sample.program import (
    Made,
    Program,
    Rows,
    bucket,
    decode,
    generate,
    prefill,
    prepare,
    require_by_output,
)
from jaxgpt.sample.strategies import controls_of, features_of, host
from jaxgpt.sample.writer import Writer
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target
from jaxgpt.text.chat import Dialogue, prefix_length, prompt_ids
from jaxgpt.text.tokenizer import Tokenizer, before_text, text_ids

__all__ = ["Completion", "Generator", "Token"]

log = logging.getLogger(__name__)


class Generator:
    """A model ready to generate.

    Args:
      model: the architecture.
      compute: gives the type of weights and cache.
      params: in the training form (layers stacked), on any mesh.
      tokenizer: reads and writes text; ids outside it are never generated.
      mesh: where params live; rows are then spread over its `data` and `fsdp` axes.
      bos: whether a text begins with `<|bos|>`, as in training; None means as the tokenizer does.
      weights: for a GPT on one CPU, `by_output` lays them out so that few rows are fast, and `int8` moreover
        rounds them, and each row that they are multiplied by, to 8 bits: about 1 % off per product.

    Raises:
      UserError: the tokenizer has more ids than the model, or weights cannot be rounded here.
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
        weights: Weights = "own",
    ) -> None:
        require(
            tokenizer.vocab_size <= model.vocab_size,
            f"the tokenizer has {tokenizer.vocab_size} ids but the model only {model.vocab_size}; "
            "use the tokenizer that the model was trained with.",
        )
        # Remat plays no part here; the kernel of training is prefill's.
        kept = {name: getattr(compute, name) for name in ("dtype", "attention", "cache")}
        self.model, self.compute = model, Compute(**kept)
        self.target = Target.of(mesh)
        self.tokenizer, self.mesh = tokenizer, mesh
        self.stop = tokenizer.stop_ids
        """Ids that end a row unless a call says otherwise."""
        self.bos = tokenizer.adds_bos if bos is None else bos
        self.weights: Weights = weights
        self._told = False
        self.judges: dict[str, Judge] = {}
        """Reward models of `BestOf` by their folders, once they are loaded."""
        self.context = context_of(model, params)
        """Most tokens of a row."""
        self.update(params)

    def update(self, params: dict) -> None:
        """Use other parameters (of the training form) from now on; adapters loaded over them are dropped."""
        self.adapters: Adapters | None = None
        with self.on_mesh():
            if self.weights != "own":
                require_by_output(self.model, self.target)
            self.params = prepare(self.model, self.compute, self.target, params, self.weights)
        if moved := rounding(self.params):
            log.info("int8: rounding moved the weights by %.2f %% (root mean square)", 100 * moved)

    def make_slots(self, slots: int = 8, rank: int = 16) -> None:
        """Make room for `slots` LoRA adapters of at most this rank, which rows choose from by name."""
        require(self.adapters is None, "there are slots already; load adapters into them.")
        self.adapters = Adapters(self.model, self.compute, self.target, slots, rank)
        with self.on_mesh():
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
        with self.on_mesh():
            self.params = self.adapters.load(self.params, name, folder, which, self.mesh)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        which: str = "best",
        mesh: Mesh = ONE_DEVICE,
        verify: bool = True,
        weights: Weights = "own",
    ) -> Generator:
        """The generator of a run's folder.

        Args:
          folder: of the run.
          which: checkpoint: `best` on validation data, `newest`, or a step number.
          mesh: devices to spread the model over.
          verify: see `load_trained`.
          weights: as the class takes it.
        """
        run = load_run(folder)
        require(
            run.writes,
            f"{folder} holds a {type(run.model).__name__} trained on {type(run.objective).__name__}(), which "
            "writes no text; `jaxgpt eval` measures it, and sampling needs a run of CausalLM().",
        )
        trained = load_trained(folder, which=which, mesh=mesh, verify=verify)
        parts = (run.model, run.compute, trained.params, trained.tokenizer)
        return cls(*parts, mesh=trained.mesh, bos=trained.bos, weights=weights)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, programs run on the generator's devices."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def program(self, call: Call, settings: Sequence[Sampling], group: int = 1) -> tuple[Program, Rows]:
        """Check a call and turn it into arrays, with empty rows up to what the mesh divides.

        Args:
          call: what is asked.
          settings: of each row.
          group: rows in turn that have the same prompt.
        """
        prompts, context, most = call.prompts, self.context, call.max_new_tokens
        require(most >= 1, f"max_new_tokens is {most}; it must be at least 1.")
        self.check_prompts(prompts)
        if not self._told and max(map(len, prompts)) + most > context:
            self._told = True
            log.warning("max_new_tokens is cut to what the context of %s leaves", context)
        self.check_bias(settings)
        ends = [min(len(p) + most, context) for p in prompts]
        prefix = [*map(len, prompts)] if call.prefix is None else call.prefix
        require(
            len(settings) == len(prompts),
            f"decoding has {len(settings)} entries for {len(prompts)} prompts; give one per prompt.",
        )
        for i, (size, prompt) in enumerate(zip(prefix, prompts, strict=True)):
            require(
                0 <= size <= len(prompt),
                f"prefix {i} is {size}; it must be between 0 and the {len(prompt)} tokens of prompt {i}.",
            )
        program = Program(
            *(self.model, self.compute, self.target),
            *(bucket(max(ends), context), self.tokenizer.vocab_size, features_of(settings), group),
        )
        extra = 0 if self.mesh is None else -len(prompts) % (group * row_shards(self.mesh))
        T = bucket(max(map(len, prompts)), context)
        tokens_BT = np.zeros((len(prompts) + extra, T), np.int32)
        for i, prompt in enumerate(prompts):
            tokens_BT[i, : len(prompt)] = prompt
        stops = [*dict.fromkeys(call.stop)]
        stop_N = np.full(8 * -(-len(stops) // 8), -1, np.int32)
        stop_N[: len(stops)] = stops
        rows = Rows(
            host(tokens_BT, np.int32),
            host([*map(len, prompts), *[1] * extra], np.int32),
            host([*prefix, *[1] * extra], np.int32),
            host([*ends, *[1] * extra], np.int32),
            host([stop_N] * len(tokens_BT), np.int32),
            controls_of([*settings, *[Sampling()] * extra], [*call.seeds, *[0] * extra]),
        )
        require(
            call.adapters is None or self.adapters is not None,
            f"adapters is {call.adapters!r} but none is loaded; load one with load_adapter(name, folder).",
        )
        if self.adapters is not None:
            slots = self.adapters.of_rows(call.adapters, len(prompts))
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

    def check_bias(self, settings: Sequence[Sampling]) -> None:
        """Refuse a bias of what is no token."""
        vocab = self.tokenizer.vocab_size
        for token, _ in (pair for row in settings for pair in row.logit_bias):
            require(token < vocab, f"logit_bias names the id {token}; the tokenizer's are 0 to {vocab - 1}.")

    def dialogues(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """What `generate` and `stream` take to answer dialogues: `prompts`, `apart`, `turns`, and `prefix` of
        a prefix LM.
        """
        prompts = [prompt_ids(turns, self.tokenizer) for turns in dialogues]
        call: dict[str, Any] = {"prompts": prompts, "apart": True, "turns": [*dialogues]}
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

    def _place(self, rows: Any) -> Any:
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, rows)
        return jax.device_put(rows, NamedSharding(self.mesh, spec(("batch",))))

    def asked(self, prompts: Sequence[Sequence[int]], decoding: Any, given: Asking) -> Call:
        """A call with what it leaves out."""
        seeds, stop, rows = given.get("seeds"), given.get("stop"), len(prompts)
        return Call(
            prompts=prompts,
            max_new_tokens=given.get("max_new_tokens", 256),
            seeds=[i * draws(decoding) for i in range(rows)] if seeds is None else [*seeds],
            stop=self.stop if stop is None else stop,
            stop_strings=each_row(given.get("stop_strings", ()), rows),
            prefix=given.get("prefix"),
            apart=given.get("apart", False),
            adapters=given.get("adapters"),
            turns=given.get("turns", ()),
            rules=each_rule(given.get("rules"), rows),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        **call: Unpack[Asking],
    ) -> list[Completion]:
        """Complete every prompt, in one call of one program.

        Args:
          prompts: token ids, of any lengths below the context.
          decoding: for all rows; of samplings also one each.
          **call: as follows.
          max_new_tokens: most tokens per row makes (256); cut to what the context leaves (said once).
          seeds: one per row; None numbers them. A row's output is a function of its prompt,
            sampling and seed: not of the other rows, nor of padding. Where several samples of a prompt are
            drawn, these have the seed and those that follow it.
          stop: ids that end a row; None means `self.stop`.
          stop_strings: texts that end a row where they are completed, for all rows or a list each. They
            are found on the host, so that the rows are made as by `stream`.
          prefix: first tokens of each prompt, which see each other under `GPT.prefix`: those before
            the first answer of a dialogue; None means all.
          apart: whether what is made is a text of its own, as an answer is, and no more of the prompt's: the
            space that SentencePiece puts before a text is then dropped.
          adapters: name of a loaded adapter, for all rows or one each; None means the base alone.
          turns: the dialogues that the prompts were made of, which a reward model judges by (`BestOf`).
          rules: what a completion may be (`constrained`), for all rows or one each; None means anything. Rows
            are then made as by `stream`, a token at a time; one that `max_new_tokens` cuts is unfinished.

        Raises:
          UserError: an empty prompt or stop string, a prompt that fills the context, or lists of
            different lengths.
        """
        return self.begin(prompts, decoding, **call)()

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        **call: Unpack[Asking],
    ) -> Waiting:
        """Dispatch what `generate` does and return before it is done; what is returned waits for the result.

        So the next call can be dispatched before this one's result is read.
        """
        if not prompts:
            return list
        asked = self.asked(prompts, decoding, call)
        way = WAYS.get(type(decoding))
        require(
            not any(asked.rules) or not isinstance(decoding, Beam | Contrastive),
            f"{type(decoding).__name__} follows no rules; use Sampling, BestOf or MBR.",
        )
        return way(self, decoding, asked) if way else self.draw(asked, self._samplings(decoding, asked))

    def _samplings(self, decoding: Any, call: Call) -> list[Sampling]:
        """The sampling of each row."""
        name = type(decoding).__name__
        require(type(decoding) not in WAYS, f"{name} shows no token before its text is found; use generate.")
        return [decoding] * len(call.prompts) if isinstance(decoding, Sampling) else [*decoding]

    def draw(self, call: Call, settings: Sequence[Sampling], group: int = 1) -> Waiting:
        """Dispatch the sampling of every row; each `group` rows in turn have one prompt, run once."""
        if any(call.stop_strings) or any(call.rules):
            return lambda: completions(self._stream(call, settings, 16, group), call.seeds)
        with self.on_mesh():
            program, rows = self.program(call, settings, group)
            running = generate(program, self.params, rows)

        def result() -> list[Completion]:
            made = jax.device_get(running)
            return [call.completion(self.tokenizer, made, row) for row in range(len(call.prompts))]

        return result

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding | Sequence[Sampling] = OWN,
        *,
        chunk: int = 4,
        **call: Unpack[Asking],
    ) -> Iterator[Token]:
        """As `generate`, yielding tokens as they are made: the first alone, then `chunk` at a time.

        Tokens of one row come in order; rows alternate. The device works on the next chunk while
        the caller handles this one.

        Raises:
          UserError: as `generate`; or the decoding is not by `Sampling`.
        """
        if prompts:
            asked = self.asked(prompts, decoding, call)
            yield from self._stream(asked, self._samplings(decoding, asked), chunk)

    def _stream(
        self, call: Call, settings: Sequence[Sampling], chunk: int, group: int = 1
    ) -> Iterator[Token]:
        shown = [len(prompt) for prompt in call.prompts]
        writers = [Writer(self.tokenizer, h, s) for h, s in zip(call.heads, call.stop_strings, strict=True)]
        with self.on_mesh():
            program, rows = self.program(call, settings, group)
            guides = self._guides(call, len(rows.length_B)) if any(call.rules) else None
            if guides:
                rows, chunk = rows._replace(allowed_BV=self._place(guides.first())), 1
            state, made = prefill(program, self.params, rows)
        open_rows = set(range(len(shown)))
        while open_rows:
            now: Made = jax.tree.map(np.array, made)
            if not now.done_B.all():
                with self.on_mesh():
                    if guides:
                        rows = rows._replace(allowed_BV=self._place(guides.next(now)))
                    state, made = decode(program, self.params, rows, state, np.int32(chunk))
            for slot in range(min(shown), int(now.length_B.max())):
                for row in sorted(open_rows):
                    if shown[row] <= slot < now.length_B[row]:
                        yield (token := token_of(now, row, slot, call.stop, writers[row]))
                        open_rows -= {row} if token.finish_reason else set()
            for row in sorted(open_rows):
                if now.done_B[row]:  # with no more token: logits were not finite, or nothing could follow
                    yield Token(
                        row, -1, 0.0, "error" if now.failed_B[row] else "length", writers[row].flush()
                    )
            open_rows -= set(np.flatnonzero(now.done_B).tolist())
            shown = [max(s, int(n)) for s, n in zip(shown, now.length_B, strict=False)]

    def _guides(self, call: Call, rows: int) -> Guides:
        tokenizer, size = self.tokenizer, self.model.vocab_size
        guides = list[Guide | None]()
        for rule, head in zip(call.rules, call.heads, strict=True):
            leads = tokenizer.strips_space and not tokenizer.decode(head)
            guides.append(None if rule is None else Guide(rule, tokenizer, call.stop, size, leads))
        return Guides(guides, (rows, size))


WAYS: dict[Any, Callable[[Maker, Any, Call], Waiting]] = {
    Beam: beam.find,
    Contrastive: contrastive.find,
    BestOf: select.best,
    MBR: select.consensus,
}
"""From a config's class to what it does; `Sampling` is the generator's own."""
