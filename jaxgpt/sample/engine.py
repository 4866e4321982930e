"""Continuous batching: requests join and leave a batch of fixed size between its steps (Orca; Yu et al.
2022).

A turn of the engine computes at most one chunk of one prompt and one step of all rows that run, and
dispatches both before it reads what the turn before made, so that the device does not wait for the host.

**What a request gets does not depend on the others.** Programs have the same shapes whoever runs; a prompt is
cut at fixed places counted from its start; a row that had to make room (preemption) is computed again through
the same programs, with the tokens it had as known ones. So a row's numbers are the same, bit for bit on a
CPU.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config import GPT, Batching
from jaxgpt.errors import UserError, require
from jaxgpt.layers.paged import init_pools
from jaxgpt.models import caches_keys
from jaxgpt.sample.constrained import Guide
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.lanes import (
    LONGEST_NGRAM,
    MOST_BIASES,
    MOST_STOPS,
    Lane,
    Out,
    chunk,
    empty_lanes,
    level_of,
    place,
    row_of,
    step,
)
from jaxgpt.sample.pages import Node, Pages
from jaxgpt.sample.request import MOST_ALTERNATIVES, Alternative, Emit, End, Full, Load, Piece, Request
from jaxgpt.sample.writer import Writer
from jaxgpt.sharding import spec

log = logging.getLogger(__name__)

MOST_MEMORY = 4 * 2**30
"""Bytes of the cache if `Batching.pages` leaves it to the engine; a full context has room in any case."""
DEFAULT = Batching()


@dataclass(eq=False)
class Handle:
    """A request that an engine has taken.

    Attributes:
      request: what is asked.
      error: why it ended with "error".
    """

    request: Request
    emit: Emit
    engine: Engine
    error: str = ""
    cancelled: bool = False

    def cancel(self) -> None:
        """End the request at the next turn; its last piece says "cancelled"."""
        self.cancelled = True
        self.engine.wake()


@dataclass(eq=False)
class _Row:
    """A request that waits or runs."""

    handle: Handle
    stop: Sequence[int]
    adapter: int
    writer: Writer
    guide: Guide | None
    end: int
    ids: list[int] = field(default_factory=list)
    slot: int = -1
    order: int = -1
    """Of admission; -1 while it waits."""
    filled: int = 0
    """Tokens of the prompt in the cache, or dispatched."""
    path: list[Node] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    """Pages behind those of the path."""
    allowed_V: np.ndarray | None = None
    """What its rule allows next."""
    replay: int = 0
    """Tokens that are made again and were given before."""
    length: int = 0
    """Tokens in the slot as far as the host has read."""
    flying: int = 0
    """Dispatched steps whose results are not read."""
    ended: bool = False

    @property
    def request(self) -> Request:
        return self.handle.request

    @property
    def prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def runs(self) -> bool:
        """Whether its prompt is computed, or will be before the next step."""
        return self.filled == self.prompt


class Engine:
    """Serves requests from one model.

    Leaving it as a context manager waits for what runs. Without the context, `step` does one turn at a time.

    Args:
      generator: the model.
      batching: slots, pages and chunks.
      draft: a model that proposes tokens, with the same tokenizer; `Batching.draft` is its folder.

    Raises:
      UserError: the model has no cache of keys and values, or the draft another tokenizer.
    """

    def __init__(
        self, generator: Generator, batching: Batching = DEFAULT, draft: Generator | None = None
    ) -> None:
        model = generator.model
        require(
            caches_keys(model) and isinstance(model, GPT) and not model.prefix and model.causal,
            f"an engine serves causal decoders (GPT) without model.prefix, and this is a "
            f"{type(model).__name__}; use `jaxgpt sample` for it.",
        )
        self.generator, self.batching, self._draft = generator, batching, draft
        chunk_size, page = batching.chunk, batching.page
        sizes = {max(page, chunk_size >> i) for i in range(3)}
        self._sizes = sorted(size for size in sizes if size % page == 0)
        self._table_width = -(-generator.context // chunk_size) * (chunk_size // page)
        self.pages = Pages(self._page_count() + 1)
        proposals, about = batching.lookup, None
        if draft is not None:
            proposals, about = batching.proposals, (draft.model, draft.compute)
            self._check_draft(draft)
        self.lane = Lane(
            *(model, generator.compute, generator.target, generator.tokenizer.vocab_size), proposals, about
        )
        self._tokens = 1 + proposals
        with generator.on_mesh():
            self._reset()
        self._table_BM = np.zeros((batching.slots, self._table_width), np.int32)
        self._slots: list[_Row | None] = [None] * batching.slots
        self._owners: OrderedDict[str, deque[_Row]] = OrderedDict()
        self._flights: deque[list[tuple[Out, list[tuple[int, _Row]]]]] = deque()
        self._arriving: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._free_rows: dict[int, jax.Array] = {}
        self._thread: threading.Thread | None = None
        self._admitted = 0
        self._numbers = dict.fromkeys(
            ("steps", "prompt_tokens", "shared_tokens", "new_tokens", "preemptions", "proposed", "accepted"),
            0,
        )

    def _page_count(self) -> int:
        """Pages that rows can have."""
        model, generator, asked = self.generator.model, self.generator, self.batching
        one = -(-generator.context // asked.page)
        if asked.pages:
            return asked.pages
        size = 1 if asked.cache == "int8" else jnp.dtype(generator.compute.dtype).itemsize
        page_bytes = 2 * model.layers * model.groups * model.head * size * asked.page
        most = max(one, MOST_MEMORY // page_bytes)
        if most < one * asked.slots:
            log.info("the cache has %s pages of %s tokens; batching.pages changes that", most, asked.page)
        return min(one * asked.slots, most)

    def _check_draft(self, draft: Generator) -> None:
        require(
            isinstance(draft.model, GPT) and not draft.model.prefix and draft.model.causal,
            f"the draft is a {type(draft.model).__name__}; it must be a causal decoder (GPT).",
        )
        ours, theirs = self.generator.tokenizer, draft.tokenizer
        same = ours.vocab_size == theirs.vocab_size and all(
            ours.piece_bytes(i) == theirs.piece_bytes(i) for i in range(ours.vocab_size)
        )
        require(
            same, "the draft has another tokenizer than the model; take a draft trained with the same one."
        )

    def _reset(self) -> None:
        """Empty lanes."""
        asked, g = self.batching, self.generator
        how = {"int8": asked.cache == "int8"}
        pools = init_pools(g.model, g.compute, g.target, self.pages.count, asked.page, **how)
        second = None
        if (d := self._draft) is not None:
            second = init_pools(d.model, d.compute, g.target, self.pages.count, asked.page, **how)
        width = self._table_width * asked.page
        self._lanes = empty_lanes(self.lane, asked.slots, width, pools, second)

    def warm_up(self) -> None:
        """Compile every program, so that no request waits for one; call it before the engine starts."""
        one = self._table_BM[:1].copy()
        with self.generator.on_mesh():
            for size in self._sizes:
                nothing = np.array([0, 0, 1, 0, 0], np.int32)  # no last part, so that no token is made
                args = (self._params(), self._lanes, one, self._anything(1), nothing)
                self._lanes, _ = chunk(self.lane, size, *args)
            counts = {len(self._slots_of_step([*range(n + 1)])) for n in range(len(self._slots))}
            for count in sorted(counts):
                slots = np.arange(count, dtype=np.int32)
                what = (self._table_BM[slots], np.zeros(count, bool), self._anything(count), np.int32(0))
                self._lanes, _ = step(self.lane, self._params(), self._lanes, slots, *what)
            jax.block_until_ready(self._lanes)

    # --------------------------------------------------------------------------------- from outside

    def __enter__(self) -> Engine:
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more requests, and wait until those taken have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wake(self) -> None:
        """Let the thread look at what changed."""
        with self._changed:
            self._changed.notify_all()

    def submit(self, request: Request, emit: Emit) -> Handle:
        """Queue a request.

        Args:
          request: what is asked.
          emit: takes its pieces, in the engine's thread.

        Raises:
          UserError: it can never run.
          Full: the queue is full.
        """
        handle = Handle(request, emit, self)
        row = self._checked(handle)
        with self._changed:
            require(not self._closing, "the engine is closing and takes no more requests.")
            waiting = len(self._arriving) + sum(map(len, self._owners.values()))
            if waiting >= self.batching.queue:
                raise Full(f"{waiting} requests wait, and no more may; try again later.")
            self._arriving.append(row)
            self._changed.notify_all()
        return handle

    def _checked(self, handle: Handle) -> _Row:
        request, generator = handle.request, self.generator
        generator.check_prompts([request.prompt])
        require(
            request.max_new_tokens >= 1,
            f"max_new_tokens is {request.max_new_tokens}; it must be at least 1.",
        )
        require(0 <= request.seed < 2**32, f"seed is {request.seed}; it must be between 0 and {2**32 - 1}.")
        require(
            0 <= request.alternatives <= MOST_ALTERNATIVES,
            f"alternatives is {request.alternatives}; it must be between 0 and {MOST_ALTERNATIVES}.",
        )
        require(
            request.sampling.no_repeat_ngram <= LONGEST_NGRAM,
            f"no_repeat_ngram is {request.sampling.no_repeat_ngram}; an engine allows 0 to {LONGEST_NGRAM}.",
        )
        biases = len(request.sampling.logit_bias)
        require(biases <= MOST_BIASES, f"logit_bias has {biases} ids; an engine allows {MOST_BIASES}.")
        generator.check_bias([request.sampling])
        stop = list(dict.fromkeys(generator.stop if request.stop is None else request.stop))
        require(len(stop) <= MOST_STOPS, f"stop has {len(stop)} ids; an engine allows {MOST_STOPS}.")
        adapter = 0
        if request.adapter is not None:
            numbers = {} if generator.adapters is None else generator.adapters.numbers
            names = ", ".join(numbers) or "none"
            require(
                request.adapter in numbers,
                f"there is no adapter {request.adapter!r}; loaded are {names}.",
            )
            adapter = numbers[request.adapter]
        end = min(len(request.prompt) + request.max_new_tokens, generator.context)
        need = -(-(end - 1 + self._tokens) // self.batching.page)
        require(
            min(need, self._table_width) < self.pages.count,
            f"the prompt and its answer may have {end} tokens but the cache holds "
            f"{(self.pages.count - 1) * self.batching.page}; lower max_new_tokens, or raise batching.pages.",
        )
        tokenizer, head = generator.tokenizer, () if request.apart else request.prompt
        writer, guide = Writer(tokenizer, head, request.stop_strings), None
        if request.rule is not None:
            leads = tokenizer.strips_space and not tokenizer.decode(list(head))
            guide = Guide(request.rule, tokenizer, stop, generator.model.vocab_size, leads)
        return _Row(handle, stop, adapter, writer, guide, end)

    def load(self) -> Load:
        """What the engine is busy with."""
        with self._changed:
            queued = len(self._arriving) + sum(map(len, self._owners.values()))
            running = sum(row is not None for row in self._slots)
        return Load(
            queued=queued,
            running=running,
            slots=self.batching.slots,
            pages_used=self.pages.used,
            pages=self.pages.count - 1,
            **self._numbers,
        )

    # --------------------------------------------------------------------------------- one turn

    def _work(self) -> None:
        while True:
            try:
                busy = self.step()
            except Exception:  # of the device or of this program: nobody waits for ever
                log.exception("a turn of the engine failed; what ran is ended")
                self._fail()
                busy = True
            if busy:
                continue
            with self._changed:
                if self._closing and not self._arriving:
                    return
                if not self._arriving and not any(row.handle.cancelled for row in self._waiting()):
                    self._changed.wait(timeout=1.0)

    def step(self) -> bool:
        """One turn; returns whether there was anything to do."""
        with self._changed:
            while self._arriving:
                row = self._arriving.popleft()
                self._owners.setdefault(row.request.owner, deque()).append(row)
        self._drop_cancelled()
        self._admit()
        flight = list[tuple[Out, list[tuple[int, _Row]]]]()
        with self.generator.on_mesh():
            self._prefill(flight)
            self._decode(flight)
        if flight:
            self._flights.append(flight)
        elif not self._flights:
            return any(row is not None for row in self._slots)
        while len(self._flights) > (1 if flight else 0):
            self._collect()
        return True

    def _waiting(self) -> list[_Row]:
        return [row for queue in self._owners.values() for row in queue]

    def _drop_cancelled(self) -> None:
        for row in self._slots:
            if row is not None and row.handle.cancelled:
                self._end(row, "cancelled")
        if any(row.handle.cancelled for row in self._waiting()):
            for owner, queue in [*self._owners.items()]:
                gone = [row for row in queue if row.handle.cancelled]
                with self._changed:
                    self._owners[owner] = deque(row for row in queue if not row.handle.cancelled)
                    if not self._owners[owner]:
                        del self._owners[owner]
                for row in gone:
                    self._end(row, "cancelled")

    def _admit(self) -> None:
        """Give free slots to those that wait, the owners in turn, while there are pages for their prompts."""
        while (
            None in self._slots
            and (owner := next((o for o, q in self._owners.items() if q), None)) is not None
        ):
            row, page = self._owners[owner][0], self.batching.page
            self._share(row)
            need = -(-(row.prompt + 1) // page) - sum(len(node.pages) for node in row.path)
            running = sum(other is not None for other in self._slots)
            if need + running > self.pages.available:  # each of those may soon need one more
                self.pages.leave(row.path)
                row.path, row.filled = [], 0
                return
            with self._changed:
                self._owners[owner].popleft()
                if self._owners[owner]:
                    self._owners.move_to_end(owner)
                else:
                    del self._owners[owner]
                row.slot = self._slots.index(None)
                self._slots[row.slot] = row
            row.order = self._admitted
            self._admitted += 1
            row.length, row.replay = row.prompt, len(row.ids)
            request = row.request
            tokens = [*request.prompt, *row.ids]
            about = (request.sampling, request.seed, row.adapter, request.alternatives, row.guide is not None)
            held = row_of(tokens, row.prompt, row.end, row.stop, *about, self._table_width * page)
            with self.generator.on_mesh():
                self._lanes = place(self._lanes, np.int32(row.slot), held)
            self._numbers["prompt_tokens"] += row.prompt
            self._numbers["shared_tokens"] += row.filled
            self._set_table(row)

    def _share(self, row: _Row) -> None:
        """Go as far along the tree as the prompt is there; its last token is computed in any case."""
        size, prompt = self.batching.chunk, row.request.prompt
        node = row.path[-1] if row.path else self.pages.root(row.adapter)
        while row.filled + size < row.prompt and not row.own:
            found = self.pages.follow(node, prompt[row.filled : row.filled + size])
            if found is None:
                return
            row.path.append(node := found)
            row.filled += size

    def _prefill(self, flight: list[Any]) -> None:
        """Dispatch one chunk of the prompt that was admitted first and is not computed."""
        rows = [row for row in self._slots if row is not None and not row.runs]
        if not rows:
            return
        row, page = min(rows, key=lambda row: row.order), self.batching.page
        before = row.filled
        self._share(row)
        self._numbers["shared_tokens"] += row.filled - before
        count = min(self.batching.chunk, row.prompt - row.filled)
        size = next(size for size in self._sizes if size >= count)
        last = row.filled + count == row.prompt
        if not self._grow(row, row.filled + count):
            return
        allowed_1V, level = self._anything(1), level_of([row.request.sampling], ruled=row.guide is not None)
        if last and row.guide is not None and not row.ids:
            found = self._allowed(row)
            if found is None:
                return
            allowed_1V = self._laid_out(found[None])
        where = np.array([row.slot, row.filled, count, last, level], np.int32)
        table_1M = self._table_BM[row.slot : row.slot + 1].copy()
        args = (self._params(), self._lanes, table_1M, allowed_1V, where)
        self._lanes, out = chunk(self.lane, size, *args)
        if not last:
            node = row.path[-1] if row.path else self.pages.root(row.adapter)
            tokens = tuple(row.request.prompt[row.filled : row.filled + count])
            held = self.batching.chunk // page
            row.path.append(self.pages.keep(node, tokens, row.own[:held]))
            row.own = row.own[held:]
        row.filled += count
        if last:
            row.flying += 1
            flight.append((out, [(0, row)]))

    def _decode(self, flight: list[Any]) -> None:
        """Dispatch a step of all rows that run."""
        if any(row is not None and row.guide is not None and row.runs for row in self._slots):
            self._land(flight)  # what may come next depends on what came
        rows = [row for row in self._slots if row is not None and self._may_step(row)]
        for row in sorted(rows, key=lambda row: row.order):
            if row.slot >= 0 and not row.ended:
                self._grow(
                    row, min(row.length + self._tokens * (row.flying + 1), row.end + self._tokens) - 1, flight
                )
        rows = [row for row in rows if row.slot >= 0 and self._may_step(row)]
        for row in [row for row in rows if row.guide is not None and not row.replay]:
            if (found := self._allowed(row)) is None:
                rows.remove(row)
            else:
                row.allowed_V = found
        if not rows:
            return
        slots = self._slots_of_step([row.slot for row in rows])
        runs_B = np.isin(slots, [row.slot for row in rows])
        ruled = [row for row in rows if row.guide is not None]
        allowed_BV = self._anything(len(slots))
        if ruled:
            host_BV = np.ones(allowed_BV.shape, bool)
            for row in ruled:
                if row.allowed_V is not None:
                    host_BV[slots.tolist().index(row.slot)] = row.allowed_V
            allowed_BV = self._laid_out(host_BV)
        level = np.int32(level_of([row.request.sampling for row in rows], ruled=bool(ruled)))
        args = (self._params(), self._lanes, slots, self._table_BM[slots], runs_B, allowed_BV, level)
        self._lanes, out = step(self.lane, *args)
        self._numbers["steps"] += 1
        for row in rows:
            row.flying += 1
        flight.append((out, [(slots.tolist().index(row.slot), row) for row in rows]))

    def _anything(self, rows: int) -> jax.Array:
        """What rows without a rule may choose."""
        if rows not in self._free_rows:
            shape = (rows, self.generator.model.vocab_size)
            self._free_rows[rows] = self._laid_out(np.ones(shape, bool))
        return self._free_rows[rows]

    def _laid_out(self, allowed_BV: np.ndarray) -> jax.Array:
        """Whole on every device, always in the same way: another layout would compile another program."""
        mesh = self.generator.mesh
        return jax.device_put(allowed_BV, None if mesh is None else NamedSharding(mesh, spec(())))

    def _slots_of_step(self, running: list[int]) -> np.ndarray:
        """The slots that a step computes: all, or the next power of two of those that run."""
        count = len(self._slots)
        if not self.batching.exact:
            count = min(count, 1 << (len(running) - 1).bit_length())
        rest = [slot for slot in range(len(self._slots)) if slot not in running]
        return np.sort(np.array([*running, *rest[: count - len(running)]], np.int32))

    def _may_step(self, row: _Row) -> bool:
        """Whether the row surely is not at its end, as far as the host knows."""
        return row.runs and not row.ended and row.length + row.flying < row.end

    def _land(self, flight: list[Any]) -> None:
        """Read everything that was dispatched."""
        if flight:
            self._flights.append([*flight])
            flight.clear()
        while self._flights:
            self._collect()

    def _params(self) -> tuple[Any, Any]:
        return self.generator.params, None if self._draft is None else self._draft.params

    # --------------------------------------------------------------------------------- pages

    def _grow(self, row: _Row, tokens: int, flight: list[Any] | None = None) -> bool:
        """Give a row pages for so many tokens. Where there are none, the row that came last makes room."""
        page, held = self.batching.page, sum(len(node.pages) for node in row.path) + len(row.own)
        need = min(-(-tokens // page), self._table_width) - held
        if need <= 0:
            return True
        while (found := self.pages.take(need)) is None:
            if self._flights or flight:
                self._land(flight if flight is not None else [])
                if row.ended:
                    return False
                continue
            running = [other for other in self._slots if other is not None]
            victim = max(running, key=lambda other: other.order)
            self._preempt(victim)
            if victim is row:
                return False
        row.own += found
        self._set_table(row)
        return True

    def _set_table(self, row: _Row) -> None:
        pages = [page for node in row.path for page in node.pages] + row.own
        self._table_BM[row.slot] = 0
        self._table_BM[row.slot, : len(pages)] = pages

    def _preempt(self, row: _Row) -> None:
        """Take a row's pages and let it wait again, before others of its owner."""
        self._leave(row)
        self._numbers["preemptions"] += 1
        with self._changed:
            self._owners.setdefault(row.request.owner, deque()).appendleft(row)

    def _leave(self, row: _Row) -> None:
        if row.slot < 0:
            return
        self.pages.leave(row.path)
        self.pages.give_back(row.own)
        self._table_BM[row.slot] = 0
        with self._changed:
            self._slots[row.slot] = None
        row.path, row.own, row.slot, row.filled, row.flying = [], [], -1, 0, 0

    # --------------------------------------------------------------------------------- results

    def _collect(self) -> None:
        """Read the oldest results and pass them on."""
        for out, rows in self._flights.popleft():
            made: Out = jax.device_get(out)
            for place_, row in rows:
                if not row.ended:
                    row.flying -= 1
                    self._take(row, made, place_)

    def _take(self, row: _Row, made: Out, at: int) -> None:
        """What a step made for a row."""
        count, request = int(made.count_B[at]), row.request
        if self._tokens > 1 and made.ids_BT.shape[1] > 1 and not row.replay:
            self._numbers["proposed"] += self._tokens - 1
            self._numbers["accepted"] += max(count - 1, 0)
        for t in range(count):
            row.length += 1
            if row.replay:
                row.replay -= 1
                continue
            token = int(made.ids_BT[at, t])
            row.ids.append(token)
            self._numbers["new_tokens"] += 1
            stopped = token in row.stop
            text = "" if stopped else row.writer.feed(token)
            reason: End | None = None
            if stopped or row.writer.stopped:
                reason = "stop"
            elif row.length >= row.end:
                reason = "length"
            text += row.writer.flush() if reason else ""
            if row.writer.stopped:
                reason = "stop"
            try:
                if row.guide is not None and not reason:
                    row.guide.feed(token)
            except UserError as error:
                row.handle.error = str(error)
                reason, text = "error", text + row.writer.flush()
            likely = tuple(
                Alternative(int(made.likely_BTA[at, t, a]), float(made.likely_logprobs_BTA[at, t, a]))
                for a in range(min(request.alternatives, made.likely_BTA.shape[2]))
            )
            self._emit(row, Piece(token, float(made.logprobs_BT[at, t]), text, reason, likely))
            if reason:
                self._finish(row)
                return
        if made.failed_B[at]:
            row.handle.error = "the model's logits were not finite."
            self._end(row, "error")
        elif not count:
            self._end(row, "length")

    def _allowed(self, row: _Row) -> np.ndarray | None:
        """What may come next in a row with a rule; None where the rule ended it."""
        assert row.guide is not None
        try:
            return row.guide.allowed()
        except UserError as error:
            row.handle.error = str(error)
            self._end(row, "error")
            return None

    def _emit(self, row: _Row, piece: Piece) -> None:
        try:
            row.handle.emit(piece)
        except Exception:
            log.exception("a request's receiver failed; the request is cancelled")
            row.handle.cancelled = True

    def _end(self, row: _Row, reason: End) -> None:
        """End a row without another token."""
        if not row.ended:
            self._finish(row)
            self._emit(row, Piece(-1, 0.0, row.writer.flush(), reason))

    def _finish(self, row: _Row) -> None:
        row.ended = True
        self._leave(row)

    def _fail(self) -> None:
        """After a failed turn: end what ran, begin with empty lanes."""
        self._flights.clear()
        for row in [*self._slots]:
            if row is not None:
                row.handle.error = "the server failed while it computed this request."
                self._end(row, "error")
        self.pages = Pages(self.pages.count)
        with self.generator.on_mesh():
            self._reset()
