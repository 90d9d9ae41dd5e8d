"""The service's socket, its connections and their ends: uvicorn's, and what it leaves open."""

import asyncio
import ipaddress
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from helpers.errors import UserError
from helpers.serve.queue import ChipQueue

# A connection on which the headers of a request are not whole after this long is closed; so is one that has been idle
# for so long: whoever keeps connections open, a proxy for instance, usually does it for a minute.
HEADERS_WITHIN_S = 120
# A connection whose client takes nothing for this long is cut: sending and closing would wait for it for ever.
STALLED_S = 600
# At the end every client is told; a connection that then still has something to send after this long is cut.
FAREWELL_S = 60


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: clients that come before the model is open wait. Raises UserError where it cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port is {port}, it must be 0 (a free one) to 65535.")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise UserError(f"Cannot listen on {host} port {port} ({error}): take another --host or --port.") from None
    # Those it accepts inherit both. For a client that does not read, Linux by itself would hold up to 4 MB.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * STALLED_S)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    return bound


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


class Server(uvicorn.Server):
    """uvicorn's server, which at its end tells those who wait for answers that none will come."""

    def __init__(self, app: ASGIApp, queue: ChipQueue):
        # Nothing is left to what happens to be installed, or to stand in the environment.
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            workers=1,
            proxy_headers=False,
            log_level="error",
            timeout_keep_alive=HEADERS_WITHIN_S,
            timeout_graceful_shutdown=FAREWELL_S + 5,
        )
        super().__init__(config)
        self.queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.queue.refuse()
        await super().shutdown(sockets)


class Connection(H11Protocol):
    """uvicorn's connection, rather than what happens to be installed; closed where the headers stay half sent."""

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def _watch_headers(self) -> None:
        asked = self.cycle is not None and not self.cycle.response_complete
        if asked and self._headers_timer:
            self._headers_timer.cancel()
            self._headers_timer = None
        elif not asked and not self._headers_timer:
            self._headers_timer = self.loop.call_later(HEADERS_WITHIN_S, self.transport.close)
