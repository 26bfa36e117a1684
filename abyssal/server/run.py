"""The server process: listen, serve, and end in good order."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Sequence
from types import FrameType

import uvicorn

from abyssal.server.app import Server

EXTRA_S = 10  # for clients to read what was handed back
log = logging.getLogger("abyssal.server")


class _Uvicorn(uvicorn.Server):
    """Takes no more requests when asked to end, and hands back what is not finished in time."""

    def __init__(self, server: Server):
        grace = server.settings.grace_s
        config = uvicorn.Config(
            server.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(grace + EXTRA_S),
            server_header=False,
        )
        super().__init__(config)
        self._server = server

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal comes."""
        super().run([_tcp(listening) for listening in sockets or ()])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at once if that was asked before.

        uvicorn would raise the signal again when all is over. SIGTERM is how a server is asked to end, so having
        obeyed it is success; SIGINT stays what it is for every command.
        """
        self.force_exit = self.should_exit
        self.should_exit = True
        if sig == signal.SIGINT:
            self._captured_signals.append(sig)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: what runs gets its grace, then its answers are cut with the reason `interrupted`."""
        self._server.service.limits.draining = True
        running = self._server.service.limits.running
        log.info("ending", extra={"running": running, "grace_s": self._server.settings.grace_s})
        asyncio.get_running_loop().call_later(self._server.settings.grace_s, self._server.completer.interrupt)
        await super().shutdown(sockets)


def keep_what_is_loaded() -> None:
    """Spare the collector a walk through all modules and the model, which takes longer than many steps together."""
    gc.collect()
    gc.freeze()


def _tcp(listening: socket.socket) -> socket.socket:
    """The same socket, said to be TCP.

    On others asyncio leaves TCP_NODELAY off, and on some systems a body then waits 40 ms for its head's
    acknowledgement; `socket.create_server` leaves the protocol open.
    """
    return socket.socket(listening.family, listening.type, socket.IPPROTO_TCP, listening.detach())


def run(server: Server, sockets: Sequence[socket.socket]) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends at once."""
    keep_what_is_loaded()
    _Uvicorn(server).run(sockets=list(sockets))
