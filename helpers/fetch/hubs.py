"""What a model hub offers: the files of a repository at a revision, with sizes and hashes. No file is read here.

Both hubs are asked through their plain HTTP interfaces; Hugging Face's through huggingface_hub, which knows tokens and
mirrors (HF_TOKEN, HF_ENDPOINT). ModelScope's is that of its own client, modelscope_hub 0.5.1 (MODELSCOPE_ENDPOINT).
"""

import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit
from urllib.request import getproxies

from helpers.errors import UserError
from helpers.files import digest_of
from helpers.machine import log

# Seconds without a byte after which a hub is silent. However slowly an answer comes, it is waited for.
PATIENCE = 60.0
HUGGINGFACE, MODELSCOPE = "Hugging Face", "ModelScope"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. size in bytes; sha256, or git_blob (Git's SHA-1 of a small file), where it is told."""

    path: str
    size: int
    sha256: str | None
    git_blob: str | None
    url: str
    headers: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What names this content whichever hub has it; where no hash is told, this file of this place."""
        return self.sha256 or self.git_blob or digest_of([self.url, self.size])


@dataclass(frozen=True)
class Listing:
    """A repository as a hub lists it. host: for people, "Hugging Face (huggingface.co)". revision: a commit."""

    host: str
    repo: str
    revision: str
    files: list[RemoteFile]


def list_huggingface(repo: str, revision: str) -> Listing:
    """The files of a Hugging Face repository; revision: a commit, a tag or a branch.

    Raises UserError where the hub is silent for PATIENCE or does not have it, and where a variable of the environment
    cannot be used.
    """
    import httpx

    check_huggingface_variables()
    check_client_variables()
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    endpoint, host = _endpoint(HUGGINGFACE, "HF_ENDPOINT", constants.ENDPOINT or "https://huggingface.co")
    headers, token_place = _huggingface_headers()
    log(f"asking {host} for the files of {repo}")
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE)
    except RevisionNotFoundError:
        raise _no_revision(host, repo, revision, "main") from None
    except OfflineModeIsEnabled:
        variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise UserError(
            f"{variable} is set, so {HUGGINGFACE} is not asked: unset it, or give a folder with --source FOLDER."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403) and "authorization" in headers:
            raise UserError(
                f"{host} answers HTTP {status} to the token in {token_place}: it has expired, perhaps, or was revoked. "
                "Take it away, these models need none, or put a new one there."
            ) from None
        raise _refused(host, repo, status) from None
    except (httpx.HTTPError, OSError) as error:
        raise silent(host, error) from None
    files = [
        RemoteFile(
            path=_inside(sibling.rfilename, host),
            size=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            git_blob=None if sibling.lfs else sibling.blob_id,
            url=hf_hub_url(repo, sibling.rfilename, revision=info.sha, endpoint=endpoint),
            headers=headers,
        )
        for sibling in info.siblings
    ]
    return Listing(host, repo, info.sha, files)


def list_modelscope(repo: str, revision: str) -> Listing:
    """The files of a ModelScope repository; revision: a branch, a tag or a commit.

    The listing names each file's own last commit; Listing.revision is the newest of these.
    Raises UserError where the hub is silent for PATIENCE or does not have it, and where a variable of the environment
    cannot be used.
    """
    import httpx

    check_client_variables()
    endpoint, host = _endpoint(MODELSCOPE, "MODELSCOPE_ENDPOINT", "https://modelscope.cn")
    place = f"{endpoint}/api/v1/models/{repo}/repo"
    asked = {"Revision": revision, "Recursive": "True"}
    log(f"asking {host} for the files of {repo}")
    try:
        response = httpx.get(f"{place}/files", params=asked, timeout=PATIENCE, follow_redirects=True)
        if response.status_code != 200:
            raise _refused(host, repo, response.status_code)
        answer = response.json()
        if answer.get("Success") is False:
            raise _no_revision(host, repo, revision, "master")
        entries = [entry for entry in answer["Data"]["Files"] if entry.get("Type") != "tree"]
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        files = [
            RemoteFile(
                path=_inside(entry["Path"], host),
                size=int(entry["Size"]),
                sha256=entry.get("Sha256") or None,
                git_blob=None,
                url=f"{place}?Revision={quote(revision, safe='')}&FilePath={quote(entry['Path'], safe='')}",
            )
            for entry in entries
        ]
    except (httpx.HTTPError, OSError) as error:
        raise silent(host, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{host} answered something that is not a list of files: a proxy's page perhaps. Take the other hub, or "
            "bring the checkpoint yourself and give --source FOLDER."
        ) from None
    return Listing(host, repo, newest.get("Revision") or revision, files)


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
    other = "huggingface" if MODELSCOPE in host else "modelscope"
    proxies = [_variable(f"{scheme}_proxy") for scheme in ("http", "https", "all") if getproxies().get(scheme)]
    proxy = f"look at {' and '.join(proxies)}" if proxies else "set HTTPS_PROXY if there is a proxy"
    return UserError(
        f"{host} gives no answer ({reason}): take --source {other}, or {proxy}, or bring the checkpoint here by other "
        "means and give its folder with --source FOLDER. What was fetched is kept."
    )


# Variables of the environment


def check_huggingface_variables() -> None:
    """Raises UserError, naming the variable, where one keeps huggingface_hub, and so transformers, from its import."""
    for variable in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        try:
            int(os.environ.get(variable, "0"))
        except ValueError:
            raise UserError(
                f"{variable} is {os.environ[variable]!r}, a whole number of seconds was needed: unset it, or set it "
                "to one."
            ) from None
    try:
        urlsplit(os.environ.get("HF_ENDPOINT", ""))
    except ValueError as error:
        raise _no_address("HF_ENDPOINT", os.environ["HF_ENDPOINT"], error) from None


def check_client_variables() -> None:
    """Raises UserError, naming the variable, where httpx cannot use a proxy, an exception or a certificate file."""
    import httpx

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
                "http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, or unset it, or for SOCKS `pip install socksio`."
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
    import httpx

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


def _endpoint(hub: str, variable: str, default: str) -> tuple[str, str]:
    """A hub's address, and hub and host for people. Raises UserError where the variable holds no address."""
    import httpx

    address = os.environ.get(variable) or default
    fault = _fault(address) if address.startswith(("http://", "https://")) else "it does not begin with https://"
    if fault:
        raise _no_address(variable, address, fault)
    return address.rstrip("/"), f"{hub} ({httpx.URL(address).netloc.decode()})"


def _no_address(variable: str, address: str, fault: object) -> UserError:
    return UserError(
        f"{variable} is {address!r}, which is not an address ({fault}): unset it, or set it to https://HOST."
    )


def _huggingface_headers() -> tuple[dict[str, str], str]:
    """What huggingface_hub sends along, and where its token is from. Raises UserError where it cannot be sent."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OIDCError
    from huggingface_hub.utils import build_hf_headers

    variables = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    place = next((v for v in variables if os.environ.get(v, "").strip()), f"the file {constants.HF_TOKEN_PATH}")
    try:
        headers = build_hf_headers()
    except (OSError, ValueError, OIDCError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The token in {place} cannot be read ({reason}): take it away, or put a new one there."
        ) from None
    for name, value in headers.items():
        if odd := next((c for c in value if not c.isascii() or not c.isprintable()), None):
            where = f"The token in {place}" if name == "authorization" else "HF_HUB_USER_AGENT_ORIGIN"
            raise UserError(
                f"{where} holds {odd!r}, which no request can send: take it away, or put the right one there."
            )
    return headers, place


def _refused(host: str, repo: str, status: int) -> UserError:
    if status in (401, 403, 404):
        return UserError(
            f"{host} does not have {repo} for you (HTTP {status}): check the address in HF_ENDPOINT or "
            "MODELSCOPE_ENDPOINT if one is set, or take the other hub with --source."
        )
    return UserError(f"{host} refuses {repo} with HTTP {status}: try again later, or take the other hub with --source.")


def _no_revision(host: str, repo: str, revision: str, branch: str) -> UserError:
    return UserError(f"{host} has no revision {revision!r} of {repo}: give --revision {branch}, its newest.")


def _inside(path: str, host: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise UserError(f"{host} lists a file {path!r}, which lies outside its repository: do not use this source.")
    return path
