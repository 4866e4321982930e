"""A service on a Ray cluster: replicas by the length of the queue, behind Ray Serve's own balancer.

    pip install 'jaxgpt[serve,ray]'
    serve run launch.serve_ray:application run=runs/mine flags="--keys keys.json" max_replicas=8

`flags` are those of `jaxgpt serve` but for its address. Each replica loads the run, so its folder and the
files that the flags name must be there on every node. Replicas count the quotas of keys together where
`--redis` names a Redis.
"""

# No `from __future__ import annotations`: Ray reads the class of an application's options as an object.
import contextlib
import shlex
from collections.abc import AsyncIterator

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.applications import Starlette

from jaxgpt import runtime
from jaxgpt.config import parse_args
from jaxgpt.errors import require
from jaxgpt.serve.opening import Options, open_service


class Asked(BaseModel):
    """What `serve run` takes as NAME=VALUE."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """Folder of a run, or of a Hugging Face model."""
    flags: str = ""
    """Of `jaxgpt serve`."""
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(4, ge=1)
    cpus: float = Field(2, gt=0)
    """Cores that Ray keeps for a replica."""
    gpus: float = Field(0, ge=0)
    calm_seconds: float = Field(600, ge=0)
    """With few requests, after which a replica ends."""


def application(asked: Asked) -> serve.Application:
    """The application; a replica more starts once all have more requests than slots.

    Raises:
      UserError: the flags say what there is not, or name no keys: a cluster's address is open to others.
    """
    options = parse_args(Options, shlex.split(asked.flags), "jaxgpt serve")
    require(bool(options.keys), "a Ray cluster answers others too; add --keys FILE to flags.")
    slots = options.batching.slots
    replica = serve.deployment(
        serve.ingress(lambda: make_app(asked.run, options))(),
        name="jaxgpt",
        max_ongoing_requests=2 * slots,
        max_queued_requests=options.batching.queue,
        autoscaling_config={
            "min_replicas": asked.min_replicas,
            "max_replicas": asked.max_replicas,
            "target_ongoing_requests": slots,
            "upscale_delay_s": min(10, asked.calm_seconds),
            "downscale_delay_s": asked.calm_seconds,
        },
        ray_actor_options={"num_cpus": asked.cpus, "num_gpus": asked.gpus},
        graceful_shutdown_timeout_s=options.limits.drain_seconds,
    )
    return replica.bind()


def make_app(run: str, options: Options) -> Starlette:
    """The app of one replica; it loads the model as it starts, and lets go of it as it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        from jaxgpt.serve.app import make_app

        runtime.set_up()
        with open_service(run, options) as service:
            app.mount("/", make_app(service))
            yield

    return Starlette(lifespan=lifespan)
