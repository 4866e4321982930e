"""The temperature that a run's probabilities are divided by, stored with it.

Shapes: N predictions, C classes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import msgspec
import numpy as np

from jaxgpt.checkpoint.whole import params_digest
from jaxgpt.files import Count, read_json, write_json
from jaxgpt.sample.load import Trained

log = logging.getLogger(__name__)

FILE = "calibration.json"
"""In a run's folder: the temperature that was fitted for one of its checkpoints."""


def sharpened(p_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities as the logits divided by a temperature give them; their order stays."""
    with np.errstate(divide="ignore"):
        scaled = np.log(p_NC) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    made = np.exp(scaled)
    return made / made.sum(-1, keepdims=True)


class Fitted(TypedDict):
    """What `FILE` holds."""

    temperature: Annotated[float, msgspec.Meta(gt=0)]
    step: Count
    split: str
    of: str
    parameters: NotRequired[str]


def save_temperature(trained: Trained, temperature: float, of: str) -> Path:
    """Store the temperature of a checkpoint, fitted on validation data, with its run."""
    path = trained.folder / FILE
    about = {"step": trained.step, "split": "validation", "of": of}
    write_json(path, {"temperature": temperature, **about, "parameters": params_digest(trained.params)})
    return path


def temperature_of(trained: Trained, of: str = "labels") -> float:
    """The temperature that was fitted for this checkpoint; 1 where none was, said where it was another's."""
    path = trained.folder / FILE
    if not path.is_file():
        return 1.0
    found = read_json(path, Fitted, "remove it, and fit the temperature again")
    if found["of"] != of:
        return 1.0
    if found["step"] != trained.step:
        log.warning(
            "%s is of step %d, not %d: probabilities are not calibrated", path, found["step"], trained.step
        )
        return 1.0
    if found.get("parameters") != params_digest(trained.params):  # a run may be trained again in its folder
        log.warning("%s is of other parameters: probabilities are not calibrated; fit it again", path)
        return 1.0
    log.info("%s: probabilities at temperature %.3f", path, found["temperature"])
    return found["temperature"]
