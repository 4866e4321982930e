"""Does tuning on dialogues, with the loss only on the answers, teach a tiny model to answer?

The tuning stage of `jaxgpt quickstart`, from the best checkpoint of its pretraining:

    jaxgpt quickstart --workdir quickstart
    jaxgpt train configs/quickstart_tune.py     # repeats this stage only

Expected: exact answers to more than half of the held-out word tasks, to none before tuning.
"""

from pathlib import Path

from jaxgpt.config import Run
from jaxgpt.quickstart import tune_run


def config() -> Run:
    return tune_run(Path("quickstart"))
