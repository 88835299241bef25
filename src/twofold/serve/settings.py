"""What a server allows: keys, sizes, times. From the environment, flags, or Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from twofold.config.base import Config
from twofold.serve.auth import read_keys

PREFIX = "TWOFOLD_SERVE_"
"""`TWOFOLD_SERVE_TIMEOUT_S=60` sets `timeout_s`."""
KEYS_VARIABLE = "TWOFOLD_API_KEYS"
"""Keys, separated by spaces, commas or new lines."""


class ServeSettings(Config):
    """Limits of one server. They hold for each of its models alike."""

    key_hashes: tuple[str, ...] = ()
    """SHA-256 of each API key, in hexadecimal digits. Empty: anybody may call."""
    max_body_bytes: int = Field(default=2 * 1024 * 1024, ge=1)
    """Of one request; a larger one is refused with 413 as soon as that is known."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """The most that one answer may be asked to have. None: what the model has positions for."""
    default_new_tokens: int = Field(default=512, ge=1)
    """Of a chat answer, where the request does not say; never more than there is room for."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """None: what the model has positions for."""
    max_logprobs: int = Field(default=20, ge=0)
    """Most likely tokens that may be asked for at each place."""
    max_waiting: int = Field(default=128, ge=1)
    """Answers that may wait beside those the engine writes together (its batch size), and the most that one request
    may ask for (prompts times samples or beams). Beyond that: 429 with Retry-After."""
    timeout_s: float = Field(default=600.0, gt=0.0)
    """From a request's arrival to its last byte. Then it is given up in the engine: 503 if it was still waiting for
    its turn, 504 if it was being answered."""
    stall_timeout_s: float = Field(default=30.0, gt=0.0)
    """For a client that stops sending its request, or reading its answer."""
    drain_s: float = Field(default=30.0, ge=0.0)
    """After SIGTERM, for requests that run. What is left then is given up with 503."""
    max_connections: int = Field(default=1024, ge=1)
    """Open at the same time; further ones get 503."""
    predict_route: str | None = Field(default=None, pattern="^/")
    """Of Vertex AI, which gives it as AIP_PREDICT_ROUTE. None: there is none."""
    health_route: str | None = Field(default=None, pattern="^/")
    """Likewise AIP_HEALTH_ROUTE, beside /health."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], **flags: Any) -> ServeSettings:
        """Variables `TWOFOLD_SERVE_*` (see `PREFIX`), `TWOFOLD_API_KEYS`, and Vertex AI's `AIP_*_ROUTE`; flags that
        are not None go before them.

        Raises:
            ValueError: a variable or flag that does not exist, or with a value that is not allowed.
        """
        given: dict[str, Any] = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environment.items()
            if name.startswith(PREFIX)
        }
        for name, variable in (("predict_route", "AIP_PREDICT_ROUTE"), ("health_route", "AIP_HEALTH_ROUTE")):
            if environment.get(variable):
                given[name] = environment[variable]
        if keys := environment.get(KEYS_VARIABLE):
            given["key_hashes"] = read_keys(keys.replace(",", "\n").replace(" ", "\n"), KEYS_VARIABLE)
        given |= {name: value for name, value in flags.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise ValueError(
                f"{PREFIX}{name.upper()} (or its flag): {first['msg']}; settings are "
                f"{', '.join(sorted(cls.model_fields))}"
            ) from error
