"""The way to a host as the environment describes it: addresses, proxies, certificates; what to say of a silent one.

Checked before anybody is asked: what a client says of a broken variable names neither the variable nor a remedy.
"""

import os
import re
import ssl
from pathlib import Path
from urllib.request import getproxies

import httpx

from helpers.checkpoint.modeling import not_an_address
from helpers.errors import UserError


def silent(host: str, error: Exception) -> UserError:
    """The one sentence for a host that gives no answer."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        variable = next(filter(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")), None)
        return UserError(
            f"{host} shows a certificate that "
            + (f"{variable} ({os.environ[variable]}) does not vouch for" if variable else "this Python does not trust")
            + f" ({reason}): name your network's certificates in SSL_CERT_FILE, the one variable that is read for this."
        )
    other = "huggingface" if host.startswith("ModelScope") else "modelscope"
    proxies = [_variable(f"{scheme}_proxy") for scheme in ("http", "https", "all") if getproxies().get(scheme)]
    proxy = f"look at {' and '.join(proxies)}" if proxies else "set HTTPS_PROXY if there is a proxy"
    return UserError(
        f"{host} gives no answer ({reason}): take --source {other}, or {proxy}, or bring the checkpoint here by other "
        "means and give its folder with --source FOLDER. What was fetched is kept."
    )


def endpoint(hub: str, variable: str, default: str) -> tuple[str, str]:
    """A hub's address, and hub and host for people. Raises UserError where the variable holds no address."""
    address = os.environ.get(variable) or default
    fault = _fault(address) if address.startswith(("http://", "https://")) else "it does not begin with https://"
    if fault:
        raise not_an_address(variable, address, fault)
    return address.rstrip("/"), f"{hub} ({httpx.URL(address).netloc.decode()})"


def check_client_variables() -> None:
    """Raises UserError, naming the variable, where httpx cannot use a proxy, an exception or a certificate file."""
    _check_certificates()
    proxies = getproxies()
    exceptions = [entry.strip() for entry in proxies.get("no", "").split(",")]
    if "*" in exceptions:
        # No proxy is used, and none is looked at.
        return
    for entry in filter(None, exceptions):
        try:
            # As httpx makes an address of it.
            httpx.URL(entry if "://" in entry else f"all://[{entry}]" if entry.count(":") > 1 else f"all://*{entry}")
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(
                f"{_variable('no_proxy')} holds {entry!r}, which cannot be used here ({error}): leave this entry out. "
                "Ranges of IPv6 addresses and brackets are not understood, single addresses are."
            ) from None
    for scheme in ("http", "https", "all"):
        if not (value := proxies.get(scheme)):
            continue
        address = value if "://" in value else f"http://{value}"
        fault = _fault(address)
        if not fault:
            try:
                httpx.Client(proxy=address, trust_env=False).close()
            except (ImportError, ValueError) as error:
                fault = str(error).splitlines()[0]
        if fault:
            raise UserError(
                f"The proxy that is set cannot be used ({_variable(f'{scheme}_proxy')}: {fault}): set this variable to "
                "http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, or unset it, or for SOCKS `pip install socksio "
                "pysocks`."
            )


def _check_certificates() -> None:
    file, folders = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    variable, what = "SSLKEYLOGFILE", "a file that can be written"
    try:
        ssl.create_default_context()
        variable, what = "SSL_CERT_FILE", "a file of certificates (PEM)"
        if file:
            ssl.create_default_context(cafile=file)
        elif folders and not any(Path(folder).is_dir() for folder in folders.split(os.pathsep)):
            variable, what = "SSL_CERT_DIR", "a folder of certificates"
            raise FileNotFoundError(None, "there is none")
    except OSError as error:
        raise UserError(
            f"{variable} is {os.environ.get(variable)!r}, {what} was needed ({error.strerror or error}): unset it, or "
            "name one."
        ) from None


def _variable(name: str) -> str:
    """The variable's name as it is written where it counts: in small letters, or else as it stands."""
    return name if os.environ.get(name) else next((v for v in os.environ if v.lower() == name), name)


def _fault(address: str) -> str | None:
    """What keeps httpx from using an address, or None."""
    rest = address.partition("://")[2]
    beyond = rest[len(re.match(r"[^/?#]*", rest)[0]) :]
    if "@" in beyond:
        return f"a {beyond[0]!r} in a user name or password is written %{ord(beyond[0]):02X}"
    try:
        url = httpx.URL(address)
        url.host.encode("idna")
    except (httpx.InvalidURL, ValueError) as error:
        return str(error).splitlines()[0]
    if not url.host or "%" in url.host:
        return "it names no host"
    if url.port is not None and not 0 < url.port < 65536:
        return f"{url.port} is no port"
    return None
