"""Sends rows to their experts and back: no row is dropped, memory is bounded.

Each (token, choice) pair is a row. Along the mesh axis `expert`, rows travel by all-to-all in buffers
of a fixed size; rows that do not fit are sent in further rounds of the same buffers. On arrival, rows pass
through their experts in blocks (`layers.blocks`).

The number of rounds depends on the data, and JAX cannot differentiate such a loop. Its residuals (rows of
all rounds, hidden activations, copies of weights) would not fit in memory either. So the backward pass is
explicit: it sends the rows again. The forward pass keeps only tokens and routing.

Shapes: B batch, T length, D hidden size, N tokens per device, K experts per token, P devices along `expert`,
C rows per buffer, R = P C rows per round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.layers.blocks import Blocks, Expert, Rows, run_blocks, run_blocks_back
from jaxgpt.sharding import spec

ROOM = 1.25
"""Rows per buffer relative to even routing: a further round is rare, and empty slots run no blocks."""
SMALLEST, LARGEST = 128, 4096
"""Rows per block: below, reading an expert's matrices takes longer than its products; above gains nothing."""


class Traffic(NamedTuple):
    """How full the buffers were; scalars."""

    rounds: jax.Array
    """Number of rounds until every row was sent."""
    fill: jax.Array
    """Fraction of the slots in all rounds' buffers that held a row."""


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
        """The plan for this many rows per device, experts in all, and devices that share the experts."""
        even = -(-int(ROOM * rows) // devices)
        # Small buffers cost nothing, so they are large enough to avoid a second round.
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
) -> tuple[jax.Array, Traffic]:
    """Run each token through its experts; the weighted sum is in float32.

    Args:
      expert: what one expert computes; under a mesh, on its shard of the MLP's hidden size.
      layout: a `PartitionSpec` for each array of `weights`.
      weights: floating-point arrays [experts, ...], cast to `dtype`; gradients are summed in float32.
      x_BTD: features.
      experts_BTK: ids of each token's experts; `experts` means none, for a token that needs none.
      shares_BTK: the weight of each expert in the sum, float32.
      experts: number of experts.
      dtype: of the products.

    Returns:
      [B, T, D] in the type of x, and how full the buffers were.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = _Device(expert, layout, experts, dtype, dict(mesh.shape))
    forward: Callable[..., Any] = device.forward
    backward: Callable[..., Any] = device.backward
    if not mesh.empty:
        rows = spec(("batch", "length", "features"))
        ins = (layout, rows, rows, rows)
        forward = jax.shard_map(forward, in_specs=ins, out_specs=(rows, P()), check_vma=False)
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
    """The part of `mix` on one device: its rows and its experts."""

    expert: Expert
    layout: Any
    experts: int
    dtype: jnp.dtype
    mesh: dict[str, int]

    def forward(
        self, weights: Any, x_BTD: jax.Array, shares_BTK: jax.Array, experts_BTK: jax.Array
    ) -> tuple[jax.Array, Traffic]:
        route, x_ND, ready = self._route(experts_BTK), x_BTD.reshape(-1, x_BTD.shape[-1]), self._read(weights)

        def turn(number: jax.Array, y_ND: jax.Array) -> jax.Array:
            rows = self._send(route, number, x_ND, shares_BTK)
            y_RD = run_blocks(self.expert, ready, rows, self._blocks(route, rows))
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
        """Return the cotangents of weights, x and shares."""
        D = x_BTD.shape[-1]
        route, x_ND, ready = self._route(experts_BTK), x_BTD.reshape(-1, D), self._read(weights)
        dy_ND = dy_BTD.reshape(-1, D)

        def turn(number: jax.Array, sums: tuple[Any, jax.Array, jax.Array]) -> tuple[Any, ...]:
            dw, dx_ND, dshares_NK = sums
            rows = self._send(route, number, x_ND, shares_BTK)
            dy_RD = self._exchange(route, route.pick(number, dy_ND))
            blocks = self._blocks(route, rows)
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

    def _route(self, experts_BTK: jax.Array) -> Route:
        experts_NK = experts_BTK.reshape(-1, experts_BTK.shape[-1])
        return Route.of(experts_NK, Plan.of(experts_NK.size, self.experts, self.mesh.get("expert", 1)))

    def _blocks(self, route: Route, rows: Rows) -> Blocks:
        return Blocks.of(rows.expert_R, route.plan.experts, route.plan.block)

    # Communication; without a mesh there is none.

    def _read(self, weights: Any) -> Any:
        """The experts on this device in the type of the products, gathered once along `fsdp`."""

        def one(w: jax.Array, at: P) -> jax.Array:
            w = w if w.dtype.itemsize == 1 else w.astype(self.dtype)  # few bits stay as they are
            return jax.lax.all_gather(w, "fsdp", axis=at.index("fsdp"), tiled=True) if self._split(at) else w

        return jax.tree.map(one, weights, self.layout)

    def _reduce(self, dw: jax.Array, at: P) -> jax.Array:
        """A weight's gradient over all rows, in float32, for the shard stored on this device."""
        if not self.mesh:
            return dw
        dw = jax.lax.psum(dw, tuple(axis for axis in self.mesh if axis not in at))
        if not self._split(at):
            return dw
        return jax.lax.psum_scatter(dw, "fsdp", scatter_dimension=at.index("fsdp"), tiled=True)

    def _split(self, at: P) -> bool:
        return bool(self.mesh) and "fsdp" in at

    def _over_tensor(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, "tensor") if self.mesh else x

    def _exchange(self, route: Route, rows_R: jax.Array) -> jax.Array:
        """Send each device its C rows, and receive from each the C rows that it has for this one."""
        return rows_R if route.plan.devices == 1 else jax.lax.all_to_all(rows_R, "expert", 0, 0, tiled=True)

    def _send(self, route: Route, number: jax.Array, x_ND: jax.Array, shares_BTK: jax.Array) -> Rows:
        parts = (route.pick(number, x_ND), route.numbers(number), route.shares(number, shares_BTK))
        return Rows(*(self._exchange(route, part) for part in parts))

    def _rounds(self, route: Route, turn: Callable[[jax.Array, Any], Any], start: Any) -> Any:
        if route.plan.devices == 1:
            return turn(jnp.zeros((), jnp.int32), start)  # a single buffer holds all rows
        return jax.lax.fori_loop(0, self._count(route), turn, start)

    def _count(self, route: Route) -> jax.Array:
        """Number of rounds that the fullest buffer needs; every device takes part in each round."""
        return jax.lax.pmax(route.rounds(), tuple(self.mesh))

    def _traffic(self, route: Route) -> Traffic:
        rows, places = route.count_P.sum().astype(jnp.float32), route.plan.devices * route.plan.room
        rounds = jnp.maximum(route.rounds(), 1) if route.plan.devices == 1 else self._count(route)
        mean = jax.lax.pmean(rows, tuple(self.mesh)) if self.mesh else rows
        return Traffic(rounds.astype(jnp.float32), mean / (jnp.maximum(rounds, 1) * places))


class Route(NamedTuple):
    """The destinations of a device's rows: row i is choice i % K of token i // K."""

    plan: Plan
    order_R: jax.Array
    """The rows sorted by expert [N K], and therefore by device."""
    place_NK: jax.Array
    """Index of each row among the rows sent to its device."""
    device_NK: jax.Array
    inside_NK: jax.Array
    """Whether the row is sent at all."""
    expert_R: jax.Array
    """Expert of each row, in the order of `order_R`."""
    start_P: jax.Array
    """Index in `order_R` at which the rows to each device begin."""
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
        """Number of rounds that this device needs."""
        return -(-self.count_P.max() // self.plan.room)

    def _window(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Indices in `order_R` of this round's rows [R], and which of them are real."""
        at_C = number * self.plan.room + jnp.arange(self.plan.room)
        at_PC = jnp.minimum(self.start_P[:, None] + at_C, self.order_R.size - 1)
        return at_PC.reshape(-1), (at_C < self.count_P[:, None]).reshape(-1)

    def pick(self, number: jax.Array, x_ND: jax.Array) -> jax.Array:
        """The rows of a round, by device; an empty slot holds an arbitrary token."""
        return x_ND[self.order_R[self._window(number)[0]] // self.place_NK.shape[1]]

    def numbers(self, number: jax.Array) -> jax.Array:
        """The rows' experts, numbered as on the receiver; E in an empty slot."""
        at_R, here_R = self._window(number)
        return jnp.where(here_R, self.expert_R[at_R] % self.plan.experts, self.plan.experts)

    def shares(self, number: jax.Array, shares_BTK: jax.Array) -> jax.Array:
        """The rows' weights."""
        return shares_BTK.reshape(-1)[self.order_R[self._window(number)[0]]]

    def spread(self, number: jax.Array, values_R: jax.Array) -> jax.Array:
        """Results for the rows of a round, by token and choice [N, K, ...]; 0 for the other rows."""
        at_NK = self.place_NK - number * self.plan.room
        here_NK = self.inside_NK & (at_NK >= 0) & (at_NK < self.plan.room)
        values = values_R[jnp.where(here_NK, self.device_NK * self.plan.room + at_NK, 0)]
        return jnp.where(here_NK.reshape(*here_NK.shape, *(1,) * (values.ndim - 2)), values, 0)

    def collect(self, number: jax.Array, values_RD: jax.Array) -> jax.Array:
        """`spread`, summed in float32 over each token's choices [N, D]."""
        return jnp.sum(self.spread(number, values_RD), axis=1, dtype=jnp.float32)
