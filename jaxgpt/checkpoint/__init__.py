"""Orbax checkpoints of a run: written whole or not at all, checked when read, restored on any mesh.

A checkpoint has four items: `params`, which sampling loads alone; `rest`, the optimizer and counters;
`host`, the data position and the loop's memory as JSON; `sums`, what the others are checked by.
"""

from jaxgpt.checkpoint.checksum import measure
from jaxgpt.checkpoint.damage import not_finite
from jaxgpt.checkpoint.store import Checkpoints, SaveError, State, steps_on_disk
from jaxgpt.checkpoint.whole import load_params

__all__ = ["Checkpoints", "SaveError", "State", "load_params", "measure", "not_finite", "steps_on_disk"]
