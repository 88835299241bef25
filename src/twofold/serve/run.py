"""An app on a socket, until it is told to end: then it takes no more, and what runs may finish."""

from __future__ import annotations

import ipaddress
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from twofold.serve.logs import logger
from twofold.serve.service import Service

_AFTER_DRAIN_S = 5
"""For answers that are given up to reach their clients, and engines to end."""


class Server(uvicorn.Server):
    """uvicorn, which would close its socket at the first signal, here answers on until open requests have ended:
    /ready and new requests get 503. A second signal gives them up at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See uvicorn. Runs between any two instructions of the main thread, so it only notes."""
        is_second = self._service.is_draining
        self._service.drain()
        self._until = time.monotonic() + (0.0 if is_second else self._service.settings.drain_s)

    async def on_tick(self, counter: int) -> bool:
        """See uvicorn: called ten times a second; true ends the server."""
        if await super().on_tick(counter):
            return True
        if self._until is None:
            return False
        if not self._service.n_open:
            return True
        if time.monotonic() < self._until:
            return False
        logger.warning("giving up what is open", extra={"facts": {"requests": self._service.n_open}})
        self._service.give_up_all()
        return True


def open_socket(host: str, port: int, *, stall_timeout_s: float) -> socket.socket:
    """A bound socket. Connections whose other end takes nothing for so long are ended by the system.

    Raises:
        OSError: the address cannot be had; says which.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stall_timeout_s))
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port"
        ) from error
    return listener


def is_loopback(host: str) -> bool:
    """Only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def make_server(app: FastAPI) -> Server:
    """For `Server.run(sockets=[...])`."""
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        limit_concurrency=service.settings.max_connections,
        timeout_graceful_shutdown=_AFTER_DRAIN_S,
    )
    return Server(config, service)
