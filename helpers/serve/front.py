"""The service's front door: which names and pages are served, and how connections begin and end.

Imported by `helpers.serve.server` only when a service starts, so uvicorn and starlette may be imported at the top.
"""

import asyncio
import select
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from starlette.datastructures import Headers
from uvicorn.protocols.http.h11_impl import H11Protocol

# A connection on which the headers of a request are not whole after this long is closed; so is one that has been idle
# for so long: whoever keeps connections open, a proxy for instance, usually does it for a minute.
HEADERS_WITHIN_S = 120


class Refused(Exception):
    """One sentence with the remedy; code: for programs."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


def short(text: str) -> str:
    """What a client sent, as an error quotes it: what is long is cut."""
    return text if len(text) <= 100 else f"{text[:100]}…"


def host_name(host: str) -> str:
    """A Host header or an address as it is compared: without its port, in small letters, IPv6 in brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return f"[{host}]" if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    hosts: names that a request may be for (None: any). A page of another site can have its name resolve to this
    machine (DNS rebinding), but its browser still sends that name.
    origins: pages of other origins that may ask, as browsers name them; "*" is all.
    proxies: networks whose X-Forwarded-Host, -Proto and -Port are believed.
    """

    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    proxies: tuple[IPv4Network | IPv6Network, ...] = ()

    def check(self, headers: Headers, client: str | None) -> None:
        """Raise Refused where a request is for a name, or from a page, that is not served. client: its address."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        named, own = [host], {f"http://{host}", f"https://{host}"} if host else set()
        address = ip_address(client) if client else None
        address = getattr(address, "ipv4_mapped", None) or address
        if address and any(address in network for network in self.proxies):

            def forwarded(name: str) -> str:
                # What a proxy adds to what it was sent stands last.
                return headers.get(f"x-forwarded-{name}", "").rpartition(",")[2].strip()

            public, port = forwarded("host") or host, forwarded("port")
            named.append(public)
            bare = host_name(public)
            port = public[len(bare) + 1 :] or port
            for scheme in [forwarded("proto")] if forwarded("proto") else ["http", "https"]:
                usual = port in ("", {"http": "80", "https": "443"}.get(scheme))
                own.add(f"{scheme}://{bare}" if usual else f"{scheme}://{bare}:{port}")
        for name in filter(None, named):
            if self.hosts is not None and host_name(name) not in self.hosts:
                raise Refused(
                    f"Requests for the host {short(name)} are not served: `serve --allow-host {short(host_name(name))}`"
                    " allows them.",
                    "foreign_host",
                )
        if origin and not {origin, "*"} & set(self.origins) and origin.lower() not in {page.lower() for page in own}:
            raise Refused(
                f"Requests from the pages of {short(origin)} are not served: `serve --allow-origin {short(origin)}` "
                "allows them.",
                "foreign_origin",
            )


class Connection(H11Protocol):
    """uvicorn's connection, chosen rather than what happens to be installed; what it leaves open is closed.

    A client may close its half once it has asked (`nc -N`), which looks like a client that is gone. Every answer
    begins with an H: it is sent at once, and the system of a client that is gone says so.
    """

    _headers_timer: asyncio.TimerHandle | None = None
    _hangup: select.epoll | None = None

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

    def eof_received(self) -> bool:
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if not cycle.response_started:
            self.transport.write(b"H")

            def rest(event) -> bytes:
                del self.conn.send
                return self.conn.send(event)[1:]

            self.conn.send = rest
        # Nothing is read any more, so nothing but this notices that the client is gone.
        self._hangup = select.epoll()
        self._hangup.register(self.transport.get_extra_info("socket").fileno(), 0)
        self.loop.add_reader(self._hangup.fileno(), self.transport.abort)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._hangup and (self.cycle.response_complete or self.cycle.more_body):
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._headers_timer:
            self._headers_timer.cancel()
        if self._hangup:
            self.loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
        super().connection_lost(exc)
