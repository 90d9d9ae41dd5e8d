"""The way to a host as the environment describes it; what to say where that is wrong, or leads to nobody."""

import os
from collections.abc import Callable

import httpx

from helpers.errors import UserError

# What the client reads of the environment; proxies in small letters too.
VARIABLES = (
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"),
    *("MODELSCOPE_ENDPOINT", "HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"),
    *("HF_HUB_USER_AGENT_ORIGIN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
)


def open_way(hub: str, address: str, make_headers: Callable[[], dict] = dict) -> tuple[str, dict[str, str]]:
    """Have huggingface_hub's HTTP client built anew, for the environment of now.

    Returns hub and host for people, "ModelScope (modelscope.cn)", and the headers.
    Raises UserError, naming the variables, where one of them keeps httpx from it.
    """
    from huggingface_hub import constants, get_session, set_client_factory

    try:
        if hub == "Hugging Face" and constants.is_offline_mode():
            raise ValueError("it is switched off")
        # Its own factory knows one hub: HF_HUB_OFFLINE would keep it from ModelScope.
        set_client_factory(lambda: httpx.Client(base_url=address, follow_redirects=True, timeout=None))
        url = get_session().base_url
        if url.scheme not in ("http", "https") or not url.host or "%" in url.host:
            raise ValueError(f"{address!r} is not an address")
        httpx.Headers(headers := make_headers())
    except Exception as error:
        raise UserError(
            f"The way to {hub} cannot be used as it is set in {_set_variables(hub) or 'the token file'} "
            f"({_reason(error)}): unset what is wrong, or set an address to https://HOST, a proxy to "
            "http://USER:PASSWORD@HOST:PORT with %23 for # and %2F for /, a certificate file to one in PEM (a token is "
            "not needed); or bring the checkpoint here by other means and give its folder with --source FOLDER."
        ) from None
    return f"{hub} ({url.netloc.decode()})", headers


def silent(host: str, error: Exception) -> UserError:
    """The one sentence for a host that gives no answer."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        variable = next(filter(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR")), None)
        return UserError(
            f"{host} shows a certificate that {f'{variable} ({os.environ[variable]})' if variable else 'this Python'} "
            f"does not vouch for ({_reason(error)}): name your network's certificates in SSL_CERT_FILE, the one "
            "variable that is read for this."
        )
    other = "huggingface" if host.startswith("ModelScope") else "modelscope"
    return UserError(
        f"{host} gives no answer ({_reason(error)}): take --source {other}, or look at "
        f"{_set_variables(host) or 'your network'} (a proxy is named in HTTPS_PROXY), or bring the checkpoint here by "
        "other means and give its folder with --source FOLDER. What was fetched is kept."
    )


def _set_variables(host: str) -> str:
    others = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_") if host.startswith("ModelScope") else "MODELSCOPE_"
    names = (written for name in VARIABLES if not name.startswith(others) for written in (name, name.lower()))
    return ", ".join(filter(os.environ.get, names))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
