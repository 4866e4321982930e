"""JAX/Flax code for the whole ChatGPT recipe: tokenizer, pretraining, tuning, sampling, chat.

The Python interface is `jaxgpt.load` and `jaxgpt.fit` (docs/python.md). Importing the package imports no jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgpt.api import Model as Model
    from jaxgpt.api import fit as fit
    from jaxgpt.api import load as load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    if name not in ("Model", "fit", "load"):
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    from jaxgpt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
