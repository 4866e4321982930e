"""The tasks that come with jaxgpt, one file each; docs/tasks.md lists them. Nothing here imports jax."""

from jaxgpt.tasks.translation import Translation

__all__ = ["Translation"]
