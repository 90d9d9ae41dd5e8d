"""Who may ask the service: under which names it is reached, from the pages of which sites, behind which proxies."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address


def host_name(host: str) -> str:
    """A Host header or an address as it is compared: without its port, in small letters, IPv6 in brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return f"[{host}]" if host.count(":") > 1 else host.partition(":")[0].rstrip(".")


def origin_of(scheme: str, host: str) -> str:
    """The origin of a page, as browsers name it: without the scheme's usual port."""
    return f"{scheme}://{host.lower().removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ''))}"


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

    def refusal(self, headers: Mapping[str, str], client: str | None) -> tuple[str, str] | None:
        """Why a request from this address is not served, with the remedy, and the code for programs; else None."""
        host, origin = headers.get("host", ""), headers.get("origin", "")
        named, own = [host], {origin_of(scheme, host) for scheme in ("http", "https")}
        address = ip_address(client) if client else None
        address = getattr(address, "ipv4_mapped", None) or address
        if address and any(address in network for network in self.proxies):
            # What a proxy adds to what it was sent stands last.
            public, scheme, port = (
                headers.get(f"x-forwarded-{name}", "").rpartition(",")[2].strip().lower()
                for name in ("host", "proto", "port")
            )
            named.append(public := public or host)
            if port and not re.search(r":\d+$", public):
                public = f"{public}:{port}"
            own |= {origin_of(scheme, public) for scheme in ([scheme] if scheme else ["http", "https"])}
        for name in map(host_name, filter(None, named)):
            if self.hosts is not None and name not in self.hosts:
                remedy = f"`serve --allow-host {name:.100}` allows them."
                return f"Requests for the host {name:.100} are not served: {remedy}", "foreign_host"
        if origin and not {origin, "*"} & set(self.origins) and origin.lower() not in own:
            remedy = f"`serve --allow-origin {origin:.100}` allows them."
            return f"Requests from the pages of {origin:.100} are not served: {remedy}", "foreign_origin"
        return None
