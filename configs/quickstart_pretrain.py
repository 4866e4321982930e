"""Can a model of 1.6 million parameters learn English from the documentation on this machine?

The pretraining stage of `jaxgpt quickstart`, which makes its data:

    jaxgpt quickstart --workdir quickstart
    jaxgpt train configs/quickstart_pretrain.py     # repeats this stage only

Expected: about 1.8 bits per byte of held-out documentation after 0.5 million tokens.
"""

from pathlib import Path

from jaxgpt.config import Run
from jaxgpt.quickstart import pretrain_run


def config() -> Run:
    return pretrain_run(Path("quickstart"))
