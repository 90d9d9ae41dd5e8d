"""Who may ask the service: under which names it is reached, from the pages of which sites, behind which proxies."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address


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

    def check(self, headers: Mapping[str, str], client: str | None) -> None:
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
