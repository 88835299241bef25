"""The server as a Ray Serve application: replicas on the machines of a cluster, behind Ray's own proxies.

    serve run twofold.serve.ray_serve:application model=pair num_replicas=2

or `serve.run(application({"model": "pair"}))`, or `import_path` and `args` in a Serve config file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from twofold.config.base import Config
from twofold.infer.backends import BackendName, Precision
from twofold.serve.app import create_app
from twofold.serve.opening import EngineOptions
from twofold.serve.settings import ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

_HEALTH_S = 10.0
_STOP_S = 10.0
"""For an engine to end, after the requests."""


class RayOptions(Config):
    """What is deployed. Limits and keys come from the environment, as those of `twofold serve`: see `ServeSettings`."""

    model: str
    """A folder that every machine can reach, or a hub name."""
    name: str | None = None
    """By which clients call it. None: its folder's."""
    skip_vision: bool = False
    backend: BackendName = "auto"
    precision: Precision | None = None
    threads: int = Field(default=1, ge=1)
    """Of a replica, which takes so many CPUs of the cluster."""
    batch_size: int = Field(default=8, ge=1)
    """Answers that a replica writes together."""
    num_replicas: int = Field(default=2, ge=1)
    num_gpus: float = Field(default=0.0, ge=0.0)
    """For each replica."""

    @property
    def engine_options(self) -> EngineOptions:
        """Of a replica."""
        return EngineOptions(
            model=self.model,
            skip_vision=self.skip_vision,
            backend=self.backend,
            precision=self.precision,
            threads=self.threads,
            batch_size=self.batch_size,
        )


def application(arguments: Mapping[str, Any]) -> Any:
    """For `ray.serve.run`: the app of `create_app` in every replica, each with a model of its own.

    A replica takes as many requests as its own limits allow, so that these refuse what is too much. One whose engine
    has stopped is replaced. One that is to go finishes what it has, as long as `drain_s` says.

    Args:
        arguments: fields of `RayOptions`; texts, as `serve run` gives them, are read as what they mean.

    Raises:
        ImportError: the extra `ray` is missing.
        ValueError: an argument that does not exist, or with a value that is not allowed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError('Ray Serve is missing: pip install "twofold[ray]"') from error
    options = _options(arguments)
    # Read here: replicas on other machines have another environment. Of keys only the hashes go there.
    settings = ServeSettings.from_environment(os.environ)

    def build() -> FastAPI:
        name = options.name or Path(options.model).name or options.model
        return create_app({name: options.engine_options.engine()}, settings)

    class Replica:
        """Ray Serve adds `app`, and calls it."""

        app: FastAPI

        def check_health(self) -> None:
            """Raises where the engine has stopped."""
            if not self.app.state.service.is_alive:
                raise RuntimeError("the engine has stopped")

    deploy = serve.deployment(
        name="twofold",
        num_replicas=options.num_replicas,
        max_ongoing_requests=settings.max_waiting + options.batch_size + 1,
        ray_actor_options={"num_cpus": options.threads, "num_gpus": options.num_gpus},
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=settings.drain_s + _STOP_S,
    )
    return deploy(serve.ingress(build)(Replica)).bind()


def _options(arguments: Mapping[str, Any]) -> RayOptions:
    try:
        return RayOptions(**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; arguments are "
            f"{', '.join(RayOptions.model_fields)}"
        ) from error
