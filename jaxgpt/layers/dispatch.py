"""Rows to their experts and back: sparse on every platform, nothing dropped, bounded memory.

Each (token, choice) pair is a row. Along the mesh axis `expert` rows travel by all-to-all in buffers
of a fixed size; what does not fit goes in further rounds of the same buffers. Where they arrive, rows
are grouped into blocks of one expert each, and a loop runs as many blocks as there are: no product of
a row with an expert it did not choose, whose work would be E / K times the model's (as XLA's own
`ragged_dot` has it on CPUs, GPUs and most TPUs).

Both loops end where the data say, which JAX does not differentiate; and what it would keep (hidden
values of all rows, copies of weights) is what there is no room for. So the backward pass is written
out here: it sends the rows again, computes each block's hidden values again and differentiates the
block. Kept are tokens and routing alone; hidden values exist for one block at a time.

Shapes: B batch, T length, D width, N tokens of a device, K experts a token, P devices along `expert`,
C rows of one buffer, R = P C rows of a round, E experts of a device, S rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.sharding import spec

ROOM = 1.25
"""Rows of a buffer over those of even routing: a round more is rare, and blocks are not run for room."""
SMALLEST, LARGEST = 128, 4096
"""Rows of a block. Below, reading the expert's matrices takes longer than the products; above nothing is won."""

Expert = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""Of one expert: (its weights, rows [S, D], their weights in the sum [S]) to weighted outputs [S, D]."""


class Traffic(NamedTuple):
    """How full the buffers were; scalars."""

    rounds: jax.Array
    """Rounds until every row had been sent."""
    fill: jax.Array
    """Share of the places in all rounds' buffers that held a row."""


@dataclass(frozen=True)
class Plan:
    """The static sizes of one device's exchange.

    Attributes:
      devices: P.
      room: C.
      experts: E.
      block: S.
    """

    devices: int
    room: int
    experts: int
    block: int

    @classmethod
    def of(cls, rows: int, experts: int, devices: int) -> Plan:
        """For a device with this many rows, of all experts and the devices they are spread over."""
        even = -(-int(ROOM * rows) // devices)
        # Small buffers cost nothing: there no second round is risked.
        room = min(rows, max(even, SMALLEST))
        here = experts // devices
        padded = 1 << max(0, (devices * room // (8 * here)).bit_length() - 1)  # at most an eighth is padding
        return cls(devices, room, here, min(devices * room, LARGEST, max(SMALLEST, padded)))


def mix(
    expert: Expert,
    layout: Any,
    weights: Any,
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    shares_BTK: jax.Array,
    *,
    experts: int,
    dtype: jnp.dtype,
    plan: Callable[[int, int, int], Plan] = Plan.of,
) -> tuple[jax.Array, Traffic]:
    """Each token's experts, weighted and summed in float32.

    Args:
      expert: what one expert computes; under a mesh on its part of the hidden width.
      layout: a `PartitionSpec` for each array of `weights`.
      weights: floating-point arrays [experts, ...], read in `dtype`; gradients are summed in float32.
      x_BTD: features.
      experts_BTK: numbers of each token's experts; `experts` (none) where a token needs none.
      shares_BTK: the weight of each in the sum, float32.
      experts: how many there are.
      dtype: of the products.
      plan: the buffers' and blocks' sizes.

    Returns:
      [B, T, D] in the type of x, and how full the buffers were.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = _Device(expert, layout, experts, dtype, plan, dict(mesh.shape))
    forward, backward = device.forward, device.backward
    if not mesh.empty:
        rows, whole = spec(("batch", "length", "features")), Traffic(P(), P())
        ins = (layout, rows, rows, rows)
        forward = jax.shard_map(forward, in_specs=ins, out_specs=(rows, whole), check_vma=False)
        backward = jax.shard_map(
            backward, in_specs=(*ins, rows), out_specs=(layout, rows, rows), check_vma=False
        )

    @jax.custom_vjp
    def run(weights: Any, x_BTD: jax.Array, shares_BTK: jax.Array, experts_BTK: jax.Array) -> Any:
        return forward(weights, x_BTD, shares_BTK, experts_BTK)

    def back(saved: tuple[Any, ...], cotangents: tuple[jax.Array, Traffic]) -> tuple[Any, ...]:
        return (*backward(*saved, cotangents[0]), None)

    run.defvjp(lambda *args: (forward(*args), args), back)
    return run(weights, x_BTD, shares_BTK, experts_BTK)


@dataclass(frozen=True)
class _Device:
    """What one device does in `mix`, on its rows and its experts."""

    expert: Expert
    layout: Any
    experts: int
    dtype: jnp.dtype
    plan: Callable[[int, int, int], Plan]
    mesh: dict[str, int]

    def forward(
        self, weights: Any, x_BTD: jax.Array, shares_BTK: jax.Array, experts_BTK: jax.Array
    ) -> tuple[jax.Array, Traffic]:
        route, x_ND, ready = self._route(experts_BTK), x_BTD.reshape(-1, x_BTD.shape[-1]), self._read(weights)

        def turn(number: jax.Array, y_ND: jax.Array) -> jax.Array:
            rows = self._send(route, number, x_ND, shares_BTK)
            y_RD = run_blocks(self.expert, ready, rows, Blocks.of(rows.expert_R, route.plan))
            return y_ND + route.collect(number, self._exchange(route, y_RD))

        y_ND = self._rounds(route, turn, jnp.zeros(x_ND.shape, jnp.float32))
        return self._over_tensor(y_ND).astype(x_BTD.dtype).reshape(x_BTD.shape), self._traffic(route)

    def backward(
        self,
        weights: Any,
        x_BTD: jax.Array,
        shares_BTK: jax.Array,
        experts_BTK: jax.Array,
        dy_BTD: jax.Array,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Cotangents of weights, x and shares."""
        D = x_BTD.shape[-1]
        route, x_ND, ready = self._route(experts_BTK), x_BTD.reshape(-1, D), self._read(weights)
        dy_ND = dy_BTD.reshape(-1, D)

        def turn(number: jax.Array, sums: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, ...]:
            dw, dx_ND, dshares_NK = sums
            rows = self._send(route, number, x_ND, shares_BTK)
            dy_RD = self._exchange(route, route.pick(number, dy_ND))
            blocks = Blocks.of(rows.expert_R, route.plan)
            dw, dx_RD, dshare_R = run_blocks_back(self.expert, ready, rows, blocks, dy_RD, dw)
            dx_ND += route.collect(number, self._exchange(route, dx_RD))
            dshares_NK += route.spread(number, self._exchange(route, dshare_R))
            return dw, dx_ND, dshares_NK

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), ready)
        start = (zeros, jnp.zeros(x_ND.shape, jnp.float32), jnp.zeros(route.inside_NK.shape, jnp.float32))
        dw, dx_ND, dshares_NK = self._rounds(route, turn, start)
        dw = jax.tree.map(lambda w, d, at: self._reduce(d, at).astype(w.dtype), weights, dw, self.layout)
        dx_BTD = self._over_tensor(dx_ND).astype(x_BTD.dtype).reshape(x_BTD.shape)
        return dw, dx_BTD, self._over_tensor(dshares_NK).astype(shares_BTK.dtype).reshape(shares_BTK.shape)

    # Communication: nothing without a mesh.

    def _read(self, weights: Any) -> Any:
        """This device's experts in the type of the products, whole along `fsdp`: gathered once."""

        def one(w: jax.Array, at: P) -> jax.Array:
            w = w.astype(self.dtype)
            return jax.lax.all_gather(w, "fsdp", axis=at.index("fsdp"), tiled=True) if self._split(at) else w

        return jax.tree.map(one, weights, self.layout)

    def _reduce(self, dw: jax.Array, at: P) -> jax.Array:
        """A weight's gradient over all rows, in float32, of the part that is stored here."""
        if not self.mesh:
            return dw
        dw = jax.lax.psum(dw, "data")
        if not self._split(at):
            return jax.lax.psum(dw, "fsdp")
        return jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=at.index("fsdp"), tiled=True)

    def _split(self, at: P) -> bool:
        return bool(self.mesh) and "fsdp" in at

    def _over_tensor(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "tensor") if self.mesh else x

    def _route(self, experts_BTK: jax.Array) -> Route:
        experts_NK = experts_BTK.reshape(-1, experts_BTK.shape[-1])
        return Route.of(experts_NK, self.plan(experts_NK.size, self.experts, self.mesh.get("expert", 1)))

    def _exchange(self, route: Route, rows_R: jax.Array) -> jax.Array:
        """To each device its C rows; from each, the C that it has for this one."""
        return rows_R if route.plan.devices == 1 else jax.lax.all_to_all(rows_R, "expert", 0, 0, tiled=True)

    def _send(self, route: Route, number: jax.Array, x_ND: jax.Array, shares_BTK: jax.Array) -> Rows:
        parts = (route.pick(number, x_ND), route.numbers(number), route.shares(number, shares_BTK))
        return Rows(*(self._exchange(route, part) for part in parts))

    def _rounds(self, route: Route, turn: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        if route.plan.devices == 1:
            return turn(jnp.zeros((), jnp.int32), start)  # the one buffer holds all rows
        return jax.lax.fori_loop(0, self._count(route), turn, start)

    def _count(self, route: Route) -> jax.Array:
        """Rounds that the fullest buffer of all needs: every device takes part in each."""
        return jax.lax.pmax(route.rounds(), tuple(self.mesh))

    def _traffic(self, route: Route) -> Traffic:
        rows, places = route.count_P.sum().astype(jnp.float32), route.plan.devices * route.plan.room
        rounds = jnp.maximum(route.rounds(), 1) if route.plan.devices == 1 else self._count(route)
        mean = jax.lax.pmean(rows, tuple(self.mesh)) if self.mesh else rows
        return Traffic(rounds.astype(jnp.float32), mean / (jnp.maximum(rounds, 1) * places))


class Rows(NamedTuple):
    """What a device received in one round."""

    x_RD: jax.Array
    expert_R: jax.Array
    """Which of this device's experts; E where the place is empty."""
    share_R: jax.Array


class Route(NamedTuple):
    """Where a device's rows go: row i is choice i % K of token i // K."""

    plan: Plan
    order_R: jax.Array
    """The rows sorted by expert [N K], so by device."""
    place_NK: jax.Array
    """Where in the line to its device each row stands."""
    device_NK: jax.Array
    inside_NK: jax.Array
    """Whether the row goes anywhere."""
    expert_R: jax.Array
    """Of each row in order."""
    start_P: jax.Array
    """Where in the order the rows to each device begin."""
    count_P: jax.Array

    @classmethod
    def of(cls, experts_NK: jax.Array, plan: Plan) -> Route:
        expert_R = experts_NK.reshape(-1)
        order_R = jnp.argsort(expert_R, stable=True)
        device_NK = experts_NK // plan.experts
        count_P = jnp.bincount(device_NK.reshape(-1), length=plan.devices + 1)[: plan.devices]
        start_P = jnp.cumsum(count_P) - count_P
        inside_NK = device_NK < plan.devices
        device_NK = jnp.minimum(device_NK, plan.devices - 1)
        place_NK = jnp.argsort(order_R).reshape(experts_NK.shape) - start_P[device_NK]
        return cls(plan, order_R, place_NK, device_NK, inside_NK, expert_R[order_R], start_P, count_P)

    def rounds(self) -> jax.Array:
        """Rounds that this device needs."""
        return -(-self.count_P.max() // self.plan.room)

    def _window(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Places in the order of this round's rows [R], and which of them are."""
        at_C = number * self.plan.room + jnp.arange(self.plan.room)
        at_PC = jnp.minimum(self.start_P[:, None] + at_C, self.order_R.size - 1)
        return at_PC.reshape(-1), (at_C < self.count_P[:, None]).reshape(-1)

    def pick(self, number: jax.Array, x_ND: jax.Array) -> jax.Array:
        """The rows of a round, by device; an empty place holds any token."""
        return x_ND[self.order_R[self._window(number)[0]] // self.place_NK.shape[1]]

    def numbers(self, number: jax.Array) -> jax.Array:
        """The rows' experts as the receiver counts them; E in an empty place."""
        at_R, here_R = self._window(number)
        return jnp.where(here_R, self.expert_R[at_R] % self.plan.experts, self.plan.experts)

    def shares(self, number: jax.Array, shares_BTK: jax.Array) -> jax.Array:
        """The rows' weights."""
        return shares_BTK.reshape(-1)[self.order_R[self._window(number)[0]]]

    def spread(self, number: jax.Array, values_R: jax.Array) -> jax.Array:
        """What came back for the rows of a round, by token and choice; 0 for the others [N, K, ...]."""
        at_NK = self.place_NK - number * self.plan.room
        here_NK = self.inside_NK & (at_NK >= 0) & (at_NK < self.plan.room)
        values = values_R[jnp.where(here_NK, self.device_NK * self.plan.room + at_NK, 0)]
        return jnp.where(here_NK.reshape(*here_NK.shape, *(1,) * (values.ndim - 2)), values, 0)

    def collect(self, number: jax.Array, values_RD: jax.Array) -> jax.Array:
        """`spread`, summed over a token's choices in float32 [N, D]."""
        return jnp.sum(self.spread(number, values_RD), axis=1, dtype=jnp.float32)


class Blocks(NamedTuple):
    """A round's rows as blocks of one expert each; an expert's last is filled up."""

    plan: Plan
    order_R: jax.Array
    """The rows sorted by expert."""
    slot_R: jax.Array
    """Of each row, its place among those of all blocks."""
    first_E: jax.Array
    """Each expert's first block."""
    last_E: jax.Array
    """The block behind each expert's last."""
    start_E: jax.Array
    """Where in the order each expert's rows begin."""
    count_E: jax.Array

    @classmethod
    def of(cls, expert_R: jax.Array, plan: Plan) -> Blocks:
        order_R = jnp.argsort(expert_R, stable=True)
        count_E = jnp.bincount(expert_R, length=plan.experts + 1)[: plan.experts]
        last_E, start_E = jnp.cumsum(-(-count_E // plan.block)), jnp.cumsum(count_E) - count_E
        first_E = last_E - -(-count_E // plan.block)
        here_R = jnp.minimum(expert_R, plan.experts - 1)
        slot_R = first_E[here_R] * plan.block + jnp.argsort(order_R) - start_E[here_R]
        return cls(
            plan, order_R, jnp.where(expert_R < plan.experts, slot_R, 0), first_E, last_E, start_E, count_E
        )

    @property
    def most(self) -> int:
        """Blocks that there can be."""
        rows, block = self.order_R.size, self.plan.block
        return (rows + min(self.plan.experts, rows) * (block - 1)) // block

    def block(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A block's expert, its rows [S] and which of them are."""
        expert = jnp.searchsorted(self.last_E, number, side="right")
        at_S = (number - self.first_E[expert]) * self.plan.block + jnp.arange(self.plan.block)
        place_S = jnp.minimum(self.start_E[expert] + at_S, self.order_R.size - 1)
        return expert, self.order_R[place_S], at_S < self.count_E[expert]

    def loop(self, turn: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        """`turn` for every block that has a row; the bound is for who reads the compiled program."""
        bound = jnp.asarray(self.most, self.last_E.dtype)

        def more(state: tuple[jax.Array, Any]) -> jax.Array:
            return state[0] < jnp.minimum(self.last_E[-1], bound)

        def body(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            return state[0] + 1, turn(*state)

        return jax.lax.while_loop(more, body, (jnp.zeros_like(bound), start))[1]


def run_blocks(expert: Expert, weights: Any, rows: Rows, blocks: Blocks) -> jax.Array:
    """Every row through its expert [R, D]; an empty place comes out as rubbish."""
    S = blocks.plan.block

    def turn(number: jax.Array, y: jax.Array) -> jax.Array:
        number_E, row_S, here_S = blocks.block(number)
        share_S = jnp.where(here_S, rows.share_R[row_S], 0)
        y_SD = expert(_one(weights, number_E), rows.x_RD[row_S], share_S)
        return jax.lax.dynamic_update_slice_in_dim(y, y_SD, number * S, 0)

    shape = (blocks.most * S, rows.x_RD.shape[-1])
    return blocks.loop(turn, jnp.zeros(shape, rows.x_RD.dtype))[blocks.slot_R]


def run_blocks_back(
    expert: Expert, weights: Any, rows: Rows, blocks: Blocks, dy_RD: jax.Array, dw: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """The backward pass of `run_blocks`.

    Args:
      expert, weights, rows, blocks: as in the forward pass.
      dy_RD: cotangent of the outputs.
      dw: float32 sums of the weights' gradients so far.

    Returns:
      The new sums, and the cotangents of the rows' features and weights.
    """
    S = blocks.plan.block

    def turn(number: jax.Array, sums: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, ...]:
        dw, dx, dshare = sums
        number_E, row_S, here_S = blocks.block(number)
        # As float32, though rounded, so that their gradient is; the casts cancel out.
        wide = jax.tree.map(lambda w: w.astype(jnp.float32), _one(weights, number_E))
        share_S = jnp.where(here_S, rows.share_R[row_S], 0)
        _, pull = jax.vjp(expert, wide, rows.x_RD[row_S], share_S)
        one, dx_SD, dshare_S = pull(jnp.where(here_S[:, None], dy_RD[row_S], 0))
        dw = jax.tree.map(lambda total, part: total.at[number_E].add(part), dw, one)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_SD, number * S, 0)
        return dw, dx, jax.lax.dynamic_update_slice_in_dim(dshare, dshare_S, number * S, 0)

    places = blocks.most * S
    start = (dw, jnp.zeros((places, rows.x_RD.shape[-1]), rows.x_RD.dtype), jnp.zeros(places, jnp.float32))
    dw, dx, dshare = blocks.loop(turn, start)
    return dw, dx[blocks.slot_R], dshare[blocks.slot_R]


def _one(weights: Any, number: jax.Array) -> Any:
    """The weights of one expert."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), weights)
