"""To come."""

from typing import Any


class Recurrent:
    """To come."""


def init_memory(*args: Any) -> Any:
    """To come."""
