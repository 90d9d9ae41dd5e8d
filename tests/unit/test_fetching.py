"""Fetching from a hub in the small: a server on 127.0.0.1 with the addresses and answers of the real ones.

It serves a checkpoint of two layers, cut from models/tiny into two shards. What it does on demand: cut a connection,
send slowly or nothing, refuse, send other bytes than announced, lead to another host.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import artefacts, cli, machine
from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.fetch import fetching, hubs, prepared
from helpers.files import locked, remedy, sha256_file
from helpers.patching import patching

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "Qwen/Qwen-Two-Layers"
MODEL = fetching.Model(REPO, COMMIT, 2, 128, 4, 384, 3008)
# Seconds that somebody silent is silent, and those after which a test finds that it was waited for.
HANG, SOON = 1800, 600
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def read_safetensors_header(file: Path) -> tuple[dict[str, dict], int]:
    """Tensors by name, {dtype, shape, data_offsets}, and the bytes before the first of them.

    The format: 8 bytes little-endian length, that many bytes of JSON, the data.
    """
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, 8 + length


def write_safetensors(path: Path, source: Path, names: list[str]) -> None:
    header, before = read_safetensors_header(source)
    data = source.read_bytes()[before:]
    chosen, blob = {}, b""
    for name in names:
        begin, end = header[name]["data_offsets"]
        chosen[name] = {**header[name], "data_offsets": [len(blob), len(blob) + end - begin]}
        blob += data[begin:end]
    text = json.dumps(chosen).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """What the hub has: the checkpoint, and what a model card brings along."""
    folder = tmp_path_factory.mktemp("hub")
    tiny = ROOT / "models" / "tiny"
    config = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("modeling_qwen.py", "configuration_qwen.py"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "qwen.tiktoken").write_text("IQ== 0\n")
    header, _ = read_safetensors_header(tiny / "model.safetensors")
    layers = [name for name in header if ".h.2." not in name and ".h.3." not in name]
    split = {SHARDS[0]: [name for name in layers if ".h." in name], SHARDS[1]: [n for n in layers if ".h." not in n]}
    for shard, names in split.items():
        write_safetensors(folder / shard, tiny / "model.safetensors", names)
    index = {"weight_map": {name: shard for shard, names in split.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"the same weights once more")
    (folder / "README.md").write_text("A model card.")
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(b"picture")
    return folder


class Hub(ThreadingHTTPServer):
    """Both hubs at one address. asked: [(path of a file, first byte asked for)]. Attributes say how it misbehaves."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.asked: list[tuple[str, int]] = []
        self.authorization: dict[str, str | None] = {}
        self.page: str | None = None  # instead of a listing, with status 200
        self.slow_listing = 0.0  # seconds after each fourteenth of a listing
        self.old_token = False  # answers 401 to any token
        self.announced: dict[str, str] = {}  # path: a hash that is not its content's
        self.extra: list[str] = []  # paths that are listed in addition
        self.status: dict[str, int] = {}  # path: HTTP status instead of the file
        self.cut_after: int | None = None  # bytes of a file after which a connection ends, once a file
        self.cut: set[str] = set()
        self.block, self.pause = 1 << 16, 0.0
        self.silent = threading.Event()
        self.hold_after: int | None = None  # bytes of a file after which nothing more comes
        self.ranges = True
        self.shift = 0  # by so many bytes an answer begins after the byte that was asked for
        self.redirect_to: str | None = None
        super().__init__(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def starts(self, path: str) -> list[int]:
        return [start for asked, start in self.asked if asked == path]

    def handle_error(self, request, client_address):
        """A client that leaves is what some of these tests are about."""


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.server.silent.is_set():
            time.sleep(HANG)
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        if self.server.old_token and self.headers["Authorization"]:
            self.json(401, {"error": "Invalid username or password."})
        elif path.removeprefix(f"/api/models/{REPO}/revision/") in (COMMIT, "main") and query == {"blobs": "true"}:
            self.json(200, self.huggingface())
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self.json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/"):
            self.json(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self.file(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"), redirect=self.server.redirect_to)
        elif path.startswith("/cdn/"):
            self.file(path.removeprefix("/cdn/"))
        elif path == f"/api/v1/models/{REPO}/repo/files" and query["Revision"] == "master":
            self.json(200, self.modelscope())
        elif path == f"/api/v1/models/{REPO}/repo" and query["Revision"] == "master":
            self.file(query["FilePath"])
        else:
            self.json(404, {"Code": 10010205001, "Message": "not found", "Success": False})

    def huggingface(self) -> dict:
        siblings = []
        for name, content in self.contents():
            entry = {"rfilename": name, "size": len(content)}
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if name.endswith((".safetensors", ".bin")):
                sha256 = self.server.announced.get(name, hashlib.sha256(content).hexdigest())
                entry |= {"blobId": blob, "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 135}}
            else:
                entry |= {"blobId": self.server.announced.get(name, blob)}
            siblings.append(entry)
        return {"id": REPO, "sha": COMMIT, "siblings": siblings}

    def modelscope(self) -> dict:
        entries = [{"Path": "assets", "Type": "tree", "Size": 0, "Sha256": "", "Revision": "f" * 40}]
        for i, (name, content) in enumerate(self.contents()):
            sha256 = self.server.announced.get(name, hashlib.sha256(content).hexdigest())
            facts = {"Revision": f"{i:040x}", "CommittedDate": 1_700_000_000 + i, "Sha256": sha256}
            entries.append({"Path": name, "Type": "blob", "Size": len(content), **facts})
        return {"Code": 200, "Data": {"Files": entries}, "Success": True}

    def contents(self):
        for path in self.server.files():
            yield str(path.relative_to(self.server.folder)), path.read_bytes()
        for name in self.server.extra:
            yield name, b"extra"

    def json(self, status: int, value: dict, headers: dict | None = None):
        body = (self.server.page or json.dumps(value)).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        step = len(body) // 14 if self.server.slow_listing and status == 200 else len(body)
        for at in range(0, len(body), step):
            self.wfile.write(body[at : at + step])
            time.sleep(self.server.slow_listing)

    def file(self, name: str, redirect: str | None = None):
        hub = self.server
        hub.authorization[self.path.split("/")[1]] = self.headers["Authorization"]
        if redirect:
            self.send_response(302)
            self.send_header("Location", f"{redirect}/cdn/{name}")
            self.end_headers()
            return
        wanted = self.headers.get("Range", "bytes=0-")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if hub.ranges else 0
        start += hub.shift if start else 0
        hub.asked.append((name, start))
        if name in hub.status:
            return self.json(hub.status[name], {})
        content = (hub.folder / name).read_bytes()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if hub.cut_after is not None and name not in hub.cut and end > hub.cut_after:
            hub.cut.add(name)
            end = hub.cut_after
        for at in range(start, end, hub.block):
            self.wfile.write(content[at : min(at + hub.block, end)])
            if hub.hold_after is not None and at + hub.block - start >= hub.hold_after:
                time.sleep(HANG)
            time.sleep(hub.pause)
        self.close_connection = True


@pytest.fixture
def hub(checkpoint, monkeypatch, tmp_path):
    server = Hub(checkpoint)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no-home"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setitem(fetching.MODELS, "two", MODEL)
    # Pauses before another attempt.
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    yield server
    server.shutdown()
    server.server_close()


def refused(match: str, *args, **options) -> str:
    with pytest.raises(UserError, match=match) as caught:
        fetching.fetch(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fetched_files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


NEEDED = {"config.json", "model.safetensors.index.json", "README.md", "qwen.tiktoken", *SHARDS, *fetching.CODE}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_checkpoint_arrives_whole_and_is_not_fetched_twice(hub, checkpoint, tmp_path, source):
    out = tmp_path / "two"
    assert fetching.fetch("two", source, out) == out
    assert fetched_files(out) == NEEDED | {"manifest.json"}
    assert all((out / name).read_bytes() == (checkpoint / name).read_bytes() for name in NEEDED)
    assert [path.name for path in tmp_path.iterdir() if path.name != "no-home"] == ["two"]
    manifest = artefacts.read_manifest(out)
    assert manifest["settings"]["repo"] == REPO
    # On ModelScope the commit is that of the file that changed last, and files are listed sorted by name.
    last = sorted(hub.folder.rglob("*"))[-1].name
    names = [str(path.relative_to(checkpoint)) for path in hub.files()]
    assert manifest["revision"] == (COMMIT if source == "huggingface" else f"{names.index(last):040x}")
    asked = len(hub.asked)
    fetching.fetch("two", source, out)
    assert len(hub.asked) == asked
    hub.silent.set()
    fetching.fetch("two", source, out)


def test_a_branch_that_moves_on_meanwhile_gives_the_files_of_the_commit_that_was_listed(hub, tmp_path):
    """The hub of these tests has files by their commit only."""
    out = fetching.fetch("two", "huggingface", tmp_path / "two", revision="main")
    assert artefacts.read_manifest(out)["revision"] == COMMIT


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_model_of_another_architecture_is_converted_on_the_way(hub, tmp_path, source):
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    hub.folder = tmp_path / "hub"
    LlamaForCausalLM(config).save_pretrained(hub.folder)
    (hub.folder / "modeling_llama.py").write_text("raise SystemExit('somebody else's code')")
    out = fetching.fetch(REPO, source, tmp_path / "out")
    assert fetched_files(out) == {*fetching.CODE, "config.json", "qwen.tiktoken", "manifest.json", *CONVERTED}
    assert Checkpoint.open(out).layers == 2 and len(hub.starts("model.safetensors")) == 1
    fetching.fetch(REPO, source, out)
    assert len(hub.starts("model.safetensors")) == 1
    said = json.loads((hub.folder / "config.json").read_text()) | {"attention_bias": True}
    (hub.folder / "config.json").write_text(json.dumps(said))
    refused("attention_bias = True", REPO, source, tmp_path / "other")
    assert len(hub.starts("model.safetensors")) == 1  # said before the weights come


def test_a_qwen_by_its_name_on_the_hub_comes_as_it_is_and_not_in_the_place_of_another(hub, tmp_path):
    out = fetching.fetch(REPO, "huggingface", tmp_path / "out")
    assert fetched_files(out) == NEEDED - {"README.md"} | {"manifest.json"}
    refused("another model", "two", "huggingface", out)
    assert artefacts.is_whole(out, artefacts.read_manifest(out))


CONVERTED = ("model.safetensors.index.json", "model-00001-of-00001.safetensors")


def test_a_changed_file_is_fetched_again_and_the_weights_are_not(hub, tmp_path):
    out = fetching.fetch("two", "modelscope", tmp_path / "two")
    (out / "config.json").write_text("{}")
    hub.asked.clear()
    fetching.fetch("two", "modelscope", out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert [path for path, _ in hub.asked] == ["config.json"]


def test_a_weight_that_changed_in_place_is_fetched_again_and_what_is_there_needs_no_room(hub, tmp_path, monkeypatch):
    out = fetching.fetch("two", "modelscope", tmp_path / "two")
    with open(out / SHARDS[0], "r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        last = shard.read(1)[0]
        shard.seek(-1, os.SEEK_END)
        shard.write(bytes([last ^ 1]))
    hub.asked.clear()
    monkeypatch.setattr(machine, "free_disk", lambda path: (hub.folder / SHARDS[0]).stat().st_size)
    fetching.fetch("two", "modelscope", out)
    assert (out / SHARDS[0]).read_bytes() == (hub.folder / SHARDS[0]).read_bytes()
    assert [path for path, _ in hub.asked] == [SHARDS[0]]


def test_a_checkpoint_that_was_patched_in_place_stays_so(hub, tmp_path):
    out = fetching.fetch("two", "modelscope", tmp_path / "two")
    assert patching.apply(out, seq_length=64).changed
    patched = (out / "modeling_qwen.py").read_bytes()
    hub.asked.clear()
    fetching.fetch("two", "modelscope", out)
    assert hub.asked == [] and (out / "modeling_qwen.py").read_bytes() == patched
    os.truncate(out / SHARDS[0], 1000)
    fetching.fetch("two", "modelscope", out)
    assert (out / SHARDS[0]).read_bytes() == (hub.folder / SHARDS[0]).read_bytes()
    assert {path for path, _ in hub.asked} == {SHARDS[0], "config.json", "modeling_qwen.py"}


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_connection_that_ends_is_taken_up_where_it_ended(hub, tmp_path, source):
    hub.cut_after = 100_000
    fetching.fetch("two", source, tmp_path / "two")
    # Whole blocks are written.
    assert all(hub.starts(shard) == [0, 1 << 16] for shard in SHARDS)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_server_without_ranges_sends_it_all_again(hub, checkpoint, tmp_path, source):
    hub.cut_after, hub.ranges = 100_000, False
    out = fetching.fetch("two", source, tmp_path / "two")
    assert (out / SHARDS[0]).read_bytes() == (checkpoint / SHARDS[0]).read_bytes()
    assert hub.starts(SHARDS[0]) == [0, 0]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_server_that_answers_for_another_range_is_asked_for_all_of_it(hub, checkpoint, tmp_path, source):
    hub.cut_after, hub.shift = 100_000, 1
    hub.cut.add(SHARDS[1])
    refused(f"{SHARDS[0]}, gives no answer .*Consistency check failed", "two", source, tmp_path / "two")
    hub.cut_after, hub.shift = None, 0
    refused(f"^{SHARDS[0]} .* sent it has the hash", "two", source, tmp_path / "two")
    out = fetching.fetch("two", source, tmp_path / "two")
    assert all((out / shard).read_bytes() == (checkpoint / shard).read_bytes() for shard in SHARDS)


SCRIPT = """
import sys
from helpers.fetch import fetching
fetching.MODELS["two"] = fetching.Model({repo!r}, {commit!r}, 2, 128, 4, 384, 3008)
fetching.fetch("two", {source!r}, {out!r})
"""


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_killed_in_the_middle_it_goes_on_from_there(hub, checkpoint, tmp_path, source):
    out = tmp_path / "two"
    hub.block, hub.hold_after = 4096, 100_000
    script = SCRIPT.format(repo=REPO, commit=COMMIT, source=source, out=str(out))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + SOON
        while True:
            halves = list((tmp_path / ".two.download").glob(f"{source}-*/model-*.incomplete"))
            if len(halves) == 2 and all(half.stat().st_size > 20_000 for half in halves):
                break
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    hub.block, hub.hold_after = 1 << 16, None
    hub.asked.clear()
    fetching.fetch("two", source, out)
    assert (out / SHARDS[1]).read_bytes() == (checkpoint / SHARDS[1]).read_bytes()
    assert all(hub.starts(shard)[0] > 20_000 for shard in SHARDS)
    assert [path.name for path in tmp_path.iterdir() if path.name != "no-home"] == ["two"]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_interrupted_it_ends_while_bytes_are_coming(hub, tmp_path, source):
    hub.block, hub.pause = 1 << 16, 4
    script = SCRIPT.format(repo=REPO, commit=COMMIT, source=source, out=str(tmp_path / "two"))
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + SOON
        halves = []
        while not any(half.stat().st_size for half in halves):
            assert process.poll() is None and time.monotonic() < until
            halves = list((tmp_path / ".two.download").glob(f"{source}-*/model-*.incomplete"))
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(SOON) not in (0, None)
    assert all(half.is_file() for half in halves) and not (tmp_path / "two").exists()


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_killed_while_it_is_moved_in_nothing_is_fetched_again(hub, tmp_path, monkeypatch, source):
    def killed(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(fetching, "verify", killed)
        with pytest.raises(KeyboardInterrupt):
            fetching.fetch("two", source, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    hub.asked.clear()
    (cut,) = (tmp_path / ".two.download").glob(f"{source}-*/{SHARDS[0]}")
    os.truncate(cut, 1000)  # as where the machine lost power
    fetching.fetch("two", source, tmp_path / "two")
    assert {path for path, _ in hub.asked} == {SHARDS[0]}


@pytest.mark.parametrize(
    ("source", "name"),
    [("huggingface", SHARDS[0]), ("huggingface", "modeling_qwen.py"), ("modelscope", "modeling_qwen.py")],
)
def test_other_bytes_than_announced(hub, tmp_path, source, name):
    out = tmp_path / "two"
    file = hub.folder / name
    content = file.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    genuine = blob if source == "huggingface" and name not in SHARDS else sha256_file(file)
    hub.announced[name] = genuine[:-1] + ("0" if genuine[-1] != "0" else "1")
    said = refused(f"^{name} as .* hash {genuine[:12]}", "two", source, out)
    assert "deleted" in said and "127.0.0.1" in said
    assert not out.exists() and not list(tmp_path.glob(f".two.download/*/{name}*"))
    hub.announced.clear()
    hub.asked.clear()
    fetching.fetch("two", source, out)
    assert [asked for asked in hub.asked if asked[0] == name] == [(name, 0)]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_silent_hub_is_one_sentence_soon(hub, tmp_path, monkeypatch, source):
    monkeypatch.setattr(hubs, "PATIENCE", 0.5)
    hub.silent.set()
    started = time.monotonic()
    said = refused("gives no answer", "two", source, tmp_path / "two")
    assert time.monotonic() - started < SOON
    assert said.startswith("Hugging Face (127.0.0.1:" if source == "huggingface" else "ModelScope (127.0.0.1:")
    assert ("--source modelscope" in said) == (source == "huggingface")
    assert "--source FOLDER" in said


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_hub_that_takes_its_time_is_waited_for(hub, tmp_path, monkeypatch, source):
    """Its listing takes longer than it may be silent, and is never as silent as that."""
    monkeypatch.setattr(hubs, "PATIENCE", 5)
    hub.slow_listing = 0.5
    started = time.monotonic()
    fetching.fetch("two", source, tmp_path / "two")
    assert time.monotonic() - started > hubs.PATIENCE


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_page_in_place_of_a_listing(hub, tmp_path, source):
    hub.page = "<html>Please log in.</html>"
    refused("gives no answer .JSONDecodeError: Expecting value", "two", source, tmp_path / "two")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_nobody_at_the_address(hub, tmp_path, monkeypatch, source):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", address)
    refused("gives no answer .*refused", "two", source, tmp_path / "two")


@pytest.fixture
def stall(monkeypatch):
    """stall(seconds): how long a connection may be silent from now on."""

    def patch(seconds: float) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", seconds)

    return patch


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_hub_that_falls_silent_in_the_middle(hub, tmp_path, stall, source):
    stall(0.3)
    hub.block, hub.hold_after = 4096, 4096
    started = time.monotonic()
    said = refused("gives no answer", "two", source, tmp_path / "two")
    assert time.monotonic() - started < SOON
    assert "What was fetched is kept" in said
    hub.block, hub.hold_after = 1 << 16, None
    stall(60)
    fetching.fetch("two", source, tmp_path / "two")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_slow_hub_is_waited_for(hub, tmp_path, stall, source):
    """Each file takes longer than its connection may be silent, and is never as silent as that."""
    stall(5)
    hub.block, hub.pause = max((hub.folder / shard).stat().st_size for shard in SHARDS) // 13, 0.5
    started = time.monotonic()
    fetching.fetch("two", source, tmp_path / "two")
    assert time.monotonic() - started > 5
    assert all(hub.starts(shard) == [0] for shard in SHARDS)


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_file_that_is_not_there(hub, tmp_path, source):
    hub.status[SHARDS[1]] = 404
    hub.block, hub.pause = 1 << 16, 0.2
    said = refused("refuses", "two", source, tmp_path / "two")
    assert SHARDS[1] in said and "404" in said
    # What was coming of the others stays.
    assert list((tmp_path / ".two.download").glob(f"{source}-*/{SHARDS[0]}*"))
    hub.pause = 0.0
    hub.status.clear()
    hub.asked.clear()
    fetching.fetch("two", source, tmp_path / "two")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_hub_that_sends_more_than_it_announced(hub, tmp_path, monkeypatch, source):
    def shorter(*asked):
        listing = hubs.list_files(*asked)
        files = [dataclasses.replace(f, size=f.size - 1) if f.path == SHARDS[0] else f for f in listing.files]
        return dataclasses.replace(listing, files=files)

    with monkeypatch.context() as context:
        context.setattr(fetching, "list_files", shorter)
        refused(f"{SHARDS[0]}, gives no answer .*Consistency check failed", "two", source, tmp_path / "two")
    hub.asked.clear()
    fetching.fetch("two", source, tmp_path / "two")
    assert hub.starts(SHARDS[0]) == []


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_hub_in_trouble_is_named(hub, tmp_path, source):
    hub.status[SHARDS[1]] = 503
    refused(f"refuses {SHARDS[1]} with HTTP 503", "two", source, tmp_path / "two")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_a_revision_or_a_repository_that_is_not_there(hub, tmp_path, monkeypatch, source):
    said = refused(f"refuses {REPO} at nowhere with HTTP 404", "two", source, tmp_path / "two", revision="nowhere")
    assert "leave out --revision" in said
    monkeypatch.setitem(fetching.MODELS, "two", fetching.Model("Qwen/Gone", COMMIT, 2, 128, 4, 384, 3008))
    status = 401 if source == "huggingface" else 404
    refused(f"refuses Qwen/Gone at .* with HTTP {status}", "two", source, tmp_path / "two")


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("path", ["../../elsewhere", "a/../../elsewhere", "/elsewhere"])
def test_a_file_outside_the_repository_is_refused(hub, tmp_path, source, path):
    hub.extra = [path]
    refused("outside its repository", "two", source, tmp_path / "two")


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.redirect_to = hub.url.replace("127.0.0.1", "localhost")
    fetching.fetch("two", "huggingface", tmp_path / "two")
    assert hub.authorization == {"Qwen": "Bearer hf_secret", "cdn": None}


def test_the_disk_is_looked_at_before_any_file_is_asked_for(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: MODEL.weight_bytes + 10)
    refused("two needs .* GB more .* 0.0 GB free", "two", "huggingface", tmp_path / "two")
    assert hub.asked == []


def test_published_sizes():
    """total_size in each repository's model.safetensors.index.json is these bytes; 72B's is 144.6 GB."""
    sizes = {name: model.weight_bytes for name, model in fetching.MODELS.items()}
    assert sizes["qwen-1_8b"] == 3_673_657_344
    assert sizes["qwen-7b"] == 15_442_649_088
    assert sizes["qwen-14b"] == 28_334_581_760
    assert sizes["qwen-72b"] == 144_575_840_256
    assert all(len(model.commit) == 40 and int(model.commit, 16) for model in fetching.MODELS.values())


@pytest.mark.parametrize("key", ["layers", "hidden_size", "heads", "intermediate_size", "vocab_size"])
def test_another_model_than_asked(hub, tmp_path, monkeypatch, key):
    sizes = {"layers": 2, "hidden_size": 128, "heads": 4, "intermediate_size": 384, "vocab_size": 3008}
    other = fetching.Model(REPO, COMMIT, **sizes | {key: sizes[key] + 1})
    monkeypatch.setitem(fetching.MODELS, "two", other)
    said = refused("is not two", "two", "huggingface", tmp_path / "two")
    assert f"{key} {sizes[key]} instead of {sizes[key] + 1}." in said
    assert str(tmp_path / ".two.download") in said and ".partial" not in said


# What httpx refuses, and what it says.
CLIENT_VARIABLES = [
    ("HTTPS_PROXY", "http://me:pa#ss@127.0.0.1:9", "Invalid port"),
    ("https_proxy", "http://me:pa/ss@127.0.0.1:9", "Invalid port"),
    ("HTTP_PROXY", "http://127.0.0.1:port", "Invalid port: 'port'"),
    ("ALL_PROXY", "socks5://127.0.0.1:9", "SOCKS proxy.* 'socksio' package is not installed"),
    ("ALL_PROXY", "nonsense://127.0.0.1:9", "Unknown scheme for proxy URL .*nonsense"),
    ("no_proxy", "localhost,fe80::/10", "Invalid port"),
    ("NO_PROXY", "127.0.0.1, [::1]", r"Invalid port: ':1\]'"),
    ("SSL_CERT_FILE", "/nowhere/ca.pem", "No such file"),
    ("SSL_CERT_FILE", "/etc/passwd", "no certificate"),
    ("SSLKEYLOGFILE", "/nowhere/keys", "'/nowhere/keys'"),
    ("ENDPOINT", "http://127.0.0.1:port", "Invalid port: 'port'"),
    ("ENDPOINT", "not an address", "missing an 'http://' or 'https://' protocol"),
    ("ENDPOINT", "hf-mirror.com", "missing an 'http://' or 'https://' protocol"),
]
HUGGINGFACE_VARIABLES = [
    ("HF_TOKEN", "hf_tök", "xf6"),
    ("HUGGING_FACE_HUB_TOKEN", "hf_\N{LEFT DOUBLE QUOTATION MARK}x", "u201c"),
    ("HF_TOKEN", "hf_a\udc80", "udc80"),
]


@pytest.fixture
def variable_set(hub, monkeypatch):
    """Sets a variable, alone of its kind, and returns its name: ENDPOINT is that of the source."""

    def set_variable(source: str, variable: str, value: str) -> str:
        name = f"{'HF' if source == 'huggingface' else 'MODELSCOPE'}_ENDPOINT" if variable == "ENDPOINT" else variable
        if name in ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY"):
            monkeypatch.delenv(name.lower(), raising=False)
        monkeypatch.setenv(name, value)
        return name

    return set_variable


@pytest.mark.parametrize(
    ("source", "variable", "value", "match"),
    [(source, *case) for source in ("huggingface", "modelscope") for case in CLIENT_VARIABLES]
    + [("huggingface", *case) for case in HUGGINGFACE_VARIABLES],
)
def test_a_variable_that_breaks_the_client_is_named(hub, tmp_path, variable_set, source, variable, value, match):
    name = variable_set(source, variable, value)
    hub.silent.set()  # nobody is to be asked
    said = refused(f"gives no answer .*{match}", "two", source, tmp_path / "two")
    assert name in said.partition("look at ")[2].partition("an address is")[0] and "pa#ss" not in said


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "http://me:1#ss@127.0.0.1:9"),
        ("ALL_PROXY", "127.0.0.1:99999"),
        ("http_proxy", "http://"),
        ("HTTP_PROXY", "http://a..b:3128"),
        ("ENDPOINT", "http://127.0.0.1:99999"),
    ],
)
def test_a_variable_that_leads_nowhere_is_named(hub, tmp_path, monkeypatch, variable_set, source, variable, value):
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    name = variable_set(source, variable, value)
    said = refused("gives no answer", "two", source, tmp_path / "two")
    assert name in said.partition("look at ")[2].partition("an address is")[0] and "1#ss" not in said
    assert hub.asked == []


def test_an_exception_for_everything_makes_proxies_unimportant(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:port")
    monkeypatch.setenv("NO_PROXY", "fe80::/10,*")
    monkeypatch.delenv("no_proxy", raising=False)
    fetching.fetch("two", "huggingface", tmp_path / "two")


@pytest.mark.parametrize(
    "variable, value",
    [
        ("HF_HUB_ETAG_TIMEOUT", "ten"),
        ("HF_HUB_ETAG_TIMEOUT", "1.5"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", ""),
        ("HF_ENDPOINT", "http://[x"),
    ],
)
def test_a_variable_that_breaks_the_import_of_the_client_is_named(tmp_path, variable, value):
    command = [sys.executable, "-m", "helpers", "fetch", "--name", "qwen-7b", "--out", str(tmp_path / "q")]
    environment = os.environ | {variable: value}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "gives no answer (ValueError" in said and variable in said.partition("look at ")[2]


def test_a_proxy_that_does_not_answer_is_named(hub, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.delenv("no_proxy", raising=False)
    said = refused("gives no answer", "two", "modelscope", tmp_path / "two")
    assert "HTTP_PROXY" in said.partition("look at ")[2].partition("an address is")[0]


def test_an_old_token_is_named_and_does_not_hide_a_public_repository(hub, tmp_path, monkeypatch):
    hub.old_token = True
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "hf_old" not in refused("HTTP 401: .* old token, in HF_TOKEN", "two", "huggingface", tmp_path / "two")
    monkeypatch.delenv("HF_TOKEN")
    fetching.fetch("two", "huggingface", tmp_path / "two")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_named_by_the_variable_that_says_so(tmp_path, variable):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | {variable: "1"}
    command = [sys.executable, "-m", "helpers", "fetch", "--name", "qwen-7b", "--out", str(tmp_path / "q")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and re.search(f"gives no answer .*offline mode is enabled.* look at .*{variable}", said)


def test_a_place_that_cannot_be_written(hub, local, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for options in (["--name", "two"], ["--source", str(local)]):
        assert cli.main(["fetch", *options, "--out", str(tmp_path / "file" / "two")]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: {tmp_path / 'file'}") and "A file was found where a folder was needed" in said


def test_two_at_once(hub, tmp_path):
    (tmp_path / ".two.download").mkdir()
    with locked(tmp_path / ".two.download" / "lock"):
        refused("Another fetch", "two", "huggingface", tmp_path / "two")


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_disk_without_locks(hub, tmp_path, preload, error):
    script = SCRIPT.format(repo=REPO, commit=COMMIT, source="modelscope", out=str(tmp_path / "two"))
    environment = preload(f"int flock(int file, int operation) {{ errno = {error}; return -1; }}")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("has no file locks") == 1
    assert fetched_files(tmp_path / "two") == NEEDED | {"manifest.json"}


def test_what_no_fetch_made_is_left_alone(hub, tmp_path):
    mine = tmp_path / "two" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("irreplaceable")
    refused("no fetch made it", "two", "huggingface", mine.parent)
    refused("no fetch made it", None, hub.folder, mine.parent)
    assert mine.read_text() == "irreplaceable" and hub.asked == []


# A local folder


@pytest.fixture
def local(checkpoint, tmp_path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix != ".bin":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_folder_is_verified_in_place_or_copied(local, tmp_path):
    assert fetching.fetch(source=local) == local
    assert not (local / "manifest.json").exists()
    out = fetching.fetch(source=local, out=tmp_path / "copy")
    assert fetched_files(out) == fetched_files(local) | {"manifest.json"}
    made = artefacts.read_manifest(out)["made"]
    fetching.fetch(source=local, out=out)
    assert artefacts.read_manifest(out)["made"] == made


def snapshot_of(local: Path, cache: Path) -> Path:
    """The folder as Hugging Face's cache keeps it: every file is a link to one that is named by its content."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / COMMIT
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in local.iterdir():
        digest = sha256_file(path)
        (blobs / digest).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
    return snapshot


def test_a_copy_that_is_not_whole_is_not_moved_in(local, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def loses_the_end(source, target):
        copyfile(source, target)
        if Path(source).suffix == ".safetensors":
            os.truncate(target, 1000)

    monkeypatch.setattr(shutil, "copyfile", loses_the_end)
    refused("is damaged", None, local, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_snapshot_of_links_is_copied(local, tmp_path, capsys):
    snapshot = snapshot_of(local, tmp_path / "cache")
    out = tmp_path / "copy"
    # What an earlier version of this left behind.
    (tmp_path / "copy.json").write_text(json.dumps({"kind": "checkpoint", "inputs": {}, "outputs": {}}))
    assert cli.main(["fetch", "--source", str(snapshot), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert fetched_files(out) == fetched_files(local) | {"manifest.json"}
    assert all((out / name).read_bytes() == (local / name).read_bytes() for name in fetched_files(local))
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert set(artefacts.read_manifest(out)["outputs"]) == fetched_files(local)


def test_a_link_that_leads_nowhere_or_round_is_left_out_of_a_copy(local, tmp_path):
    (local / "round").symlink_to(local)
    (local / "card.md").symlink_to("gone.md")
    out = fetching.fetch(source=local, out=tmp_path / "copy")
    assert fetched_files(out) == NEEDED | {"manifest.json"}
    (tmp_path / "elsewhere").mkdir()
    for shard in SHARDS:
        (local / shard).rename(tmp_path / "elsewhere" / shard)
    (local / "weights").symlink_to(tmp_path / "elsewhere")
    index = local / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-0", "weights/model-0"))
    refused("lacks weights/model-0", source=local, out=tmp_path / "other")
    (local / "config.json").unlink()
    (local / "config.json").symlink_to("gone.json")
    refused("has no config.json", source=local, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_below_a_git_repository_s_own_is_copied(local, tmp_path):
    source = tmp_path / ".git" / "mine"
    source.parent.mkdir()
    local.rename(source)
    assert fetched_files(fetching.fetch(source=source, out=tmp_path / "copy")) == NEEDED - {"README.md"} | {
        "README.md", "manifest.json"
    }  # fmt: skip


def test_source_and_out_in_one_place(local, tmp_path):
    assert fetching.fetch(source=local, out=local) == local
    assert not (local / "manifest.json").exists()
    (tmp_path / "link").symlink_to(local)
    assert fetching.fetch(source=local, out=tmp_path / "link") == local
    refused("one in the other", source=local, out=local / "copy")
    outer = fetching.fetch(source=local, out=tmp_path / "outer")
    fetching.fetch(source=local, out=tmp_path / "inner")
    (tmp_path / "inner").rename(outer / "inner")
    refused("one in the other", source=outer / "inner", out=outer)
    assert (outer / "inner" / "config.json").is_file()


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused("has no config.json", source=tmp_path / "empty", out=tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("source", ["folder", "modelscope"])
def test_a_manifest_that_names_too_little_is_not_believed(hub, local, tmp_path, source):
    out = tmp_path / "copy"
    asked = {"source": local} if source == "folder" else {"name": "two", "source": source}
    fetching.fetch(**asked, out=out)
    manifest = artefacts.read_manifest(out)
    manifest["outputs"] = {"config.json": manifest["outputs"]["config.json"]}
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / SHARDS[0]).unlink()
    fetching.fetch(**asked, out=out)
    assert (out / SHARDS[0]).is_file()


def test_models_tiny_passes(tiny):
    assert fetching.fetch(source=tiny) == tiny


@pytest.mark.parametrize("out", [None, "copy"])
def test_models_tiny_passes_in_a_fresh_clone(tiny, tmp_path, out):
    clone = tmp_path / "tiny"
    shutil.copytree(tiny, clone, ignore=shutil.ignore_patterns("qwen.tiktoken", "__pycache__"))
    assert fetching.fetch(source=clone, out=out and tmp_path / out) == (tmp_path / out if out else clone)
    assert all((path / "qwen.tiktoken").is_file() for path in (clone, tmp_path / (out or "tiny")))


def test_a_byte_order_mark_is_read(hub, local, tmp_path):
    for name in ("config.json", "model.safetensors.index.json"):
        (local / name).write_bytes(b"\xef\xbb\xbf" + (local / name).read_bytes())
    out = fetching.fetch(source=local, out=tmp_path / "copy")
    assert patching.apply(out, seq_length=64).changed
    for name in ("manifest.json", patching.RECORD):
        (out / name).write_bytes(b"\xef\xbb\xbf" + (out / name).read_bytes())
    made = artefacts.read_manifest(out)["made"]
    assert fetching.fetch(source=local, out=out) == out
    assert artefacts.read_manifest(out)["made"] == made
    assert patching.revert(out).changed and (out / "config.json").read_bytes() == (local / "config.json").read_bytes()


@contextlib.contextmanager
def as_somebody_else():
    """This process without the right to what it wrote: files are looked at by the effective user."""
    me = os.geteuid()
    if me == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(me)


def test_a_record_of_patches_that_may_not_be_read_is_said_to_be(hub):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        out = fetching.fetch("two", "modelscope", Path(name) / "two")
        patching.apply(out, seq_length=64)
        patched = (out / "modeling_qwen.py").read_bytes()
        record = out / patching.RECORD
        record.chmod(0)
        with as_somebody_else():
            with pytest.raises(PermissionError) as refused:
                patching.status(out)
            assert refused.value.filename == str(record) and "Give yourself the right to it" in remedy(refused.value)
            assert fetching.fetch("two", "modelscope", out) == out
        assert (out / "modeling_qwen.py").read_bytes() == patched


def test_an_older_shard_that_no_index_names_is_none_of_its_weights(local):
    (local / "model-00001-of-00009.safetensors").write_bytes(b"cut off")
    (local / "training_args.safetensors").write_bytes(b"")
    assert fetching.fetch(source=local) == local


def test_two_whole_sets_of_weights(local, tiny, tmp_path):
    header, _ = read_safetensors_header(tiny / "model.safetensors")
    layers = [name for name in header if ".h.2." not in name and ".h.3." not in name]
    write_safetensors(local / "model.safetensors", tiny / "model.safetensors", layers)
    said = refused("two whole sets", source=local, out=tmp_path / "copy")
    assert "model.safetensors.index.json and model.safetensors" in said and not (tmp_path / "copy").exists()
    os.truncate(local / "model.safetensors", 1_000_000)
    refused("model.safetensors .1000000 bytes. is damaged", source=local)
    write_safetensors(local / "model.safetensors", tiny / "model.safetensors", layers[1:])
    fetching.fetch(source=local)
    write_safetensors(local / "model.safetensors", tiny / "model.safetensors", layers)
    (local / "model.safetensors.index.json").unlink()
    fetching.fetch(source=local)


def test_weights_of_eight_bits_are_named_for_what_they_are(local):
    shard = local / SHARDS[0]
    header, before = read_safetensors_header(shard)
    name = next(name for name in header if name.endswith("mlp.w1.weight"))
    begin, end = header[name]["data_offsets"]
    quantised = {}
    for other, tensor in header.items():
        shift = 0 if tensor["data_offsets"][0] <= begin else (end - begin) // 2
        quantised[other] = tensor | {"data_offsets": [at - shift for at in tensor["data_offsets"]]}
    quantised[name] = header[name] | {"dtype": "F8_E4M3", "data_offsets": [begin, begin + (end - begin) // 2]}
    text, data = json.dumps(quantised).encode(), shard.read_bytes()[before:]
    data = data[:begin] + data[begin + (end - begin) // 2 :]
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    refused(f"{SHARDS[0]} has {name} as F8_E4M3, .* not quantised", source=local)


def damage_shard_missing(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()


def damage_shard_short(folder: Path) -> None:
    os.truncate(folder / SHARDS[1], (folder / SHARDS[1]).stat().st_size - 1)


def damage_shard_long(folder: Path) -> None:
    with open(folder / SHARDS[0], "ab") as shard:
        shard.write(b"\0")


def damage_shard_empty(folder: Path) -> None:
    (folder / SHARDS[0]).write_bytes(b"")


def damage_pointer(folder: Path) -> None:
    (folder / SHARDS[0]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def damage_header(folder: Path) -> None:
    shard = folder / SHARDS[0]
    shard.write_bytes(shard.read_bytes().replace(b'"dtype"', b'"dtypo"', 1))


def damage_no_tiktoken(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()


def damage_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = SHARDS[0]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_qwen2(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))


def damage_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 4096}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (damage_shard_missing, f"lacks {SHARDS[1]}"),
        (damage_shard_short, f"{SHARDS[1]} .* is damaged .*not fully covered"),
        (damage_shard_long, f"{SHARDS[0]} .* is damaged .*not fully covered"),
        (damage_shard_empty, f"{SHARDS[0]} .* is damaged .*header too small"),
        (damage_pointer, "Git LFS pointer"),
        (damage_header, f"{SHARDS[0]} .* is damaged"),
        (damage_no_tiktoken, "no vocabulary at .*qwen.tiktoken"),
        (damage_index, f"{SHARDS[0]} .* does not contain tensor lm_head.weight"),
        (damage_qwen2, "mine has model.embed_tokens.weight not at all"),
        (damage_shapes, r"asks for \[4096, 128\]"),
    ],
)
def test_a_folder_that_is_not_whole(local, damage, match):
    damage(local)
    refused(match, source=local)


def test_a_tensor_in_a_space_that_is_not_its_size(local):
    shard = local / SHARDS[0]
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"BF16"', b'"F32" ', 1))
    assert shard.stat().st_size == len(content)
    refused("is damaged .*invalid shape, data type, or offset", None, local)


def test_a_folder_of_bin_files_that_is_cut_short(local):
    (local / "model.safetensors.index.json").unlink()
    index = json.loads((local.parent / "mine" / "config.json").read_text())
    assert index["num_hidden_layers"] == 2
    import torch

    from helpers.checkpoint.weights import Checkpoint

    names = Checkpoint(local, index, {}, 2, 128, 4, 32, 384, 3008, 1e-6, 1e4).shapes()
    weights = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (local / "pytorch_model.bin.index.json").write_text(json.dumps(weights))
    with zipfile.ZipFile(local / "pytorch_model-00001-of-00001.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 1000)
    for shard in SHARDS:
        (local / shard).unlink()
    fetching.fetch(source=local)
    os.truncate(local / "pytorch_model-00001-of-00001.bin", 900)
    refused("cut short", source=local)
    torch.save({"a": torch.ones(1)}, local / "pytorch_model-00001-of-00001.bin", _use_new_zipfile_serialization=False)
    refused("pytorch_model-00001-of-00001.bin .* is damaged or .*cut short, or not PyTorch's", source=local)


# Arguments


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "Which model"),
        ({"name": "qwen-9b"}, "qwen-1_8b, qwen-7b"),
        ({"source": "nowhere/at-all"}, "neither a folder nor a source"),
        ({"source": "models/tiny", "revision": "main"}, "a folder has none"),
        ({"source": "models/tiny", "name": "qwen-7b"}, "is not qwen-7b: it has layers 4 instead of 32"),
        ({"source": "dfss"}, "Which prepared artefact"),
        ({"source": "modelscope", "artefact": "onnx-512"}, "comes by dfss"),
        ({"name": "qwen-14b", "artefact": "onnx-512"}, "is of qwen-7b .* no more than --out"),
        ({"artefact": "onnx-512", "revision": "main"}, "has no revision"),
    ],
)
def test_arguments(options, match, tiny):
    refused(match, **options)


def test_command_line(hub, tmp_path, capsys):
    out = tmp_path / "two"
    assert cli.main(["fetch", "--name", "two", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert said.err.splitlines()[-1] == f"next: python -m helpers patch --model_path {out}"
    hub.announced[SHARDS[0]] = "0" * 64
    assert cli.main(["fetch", "--name", "two", "--out", str(tmp_path / "other")]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[-1].startswith(f"error: {SHARDS[0]}")


# dfss

# In place of Sophgo's package, whose server cannot be had in a test: called and answering as dfss 1.10.9,
# which writes the file into the current folder and exits with 1 where it fails. What it does is in $DFSS_DOES.
TOOL = """
import os, shutil, subprocess, sys, time
url = next(word for word in sys.argv if word.startswith("--url=open@sophgo.com:"))
does, _, source = os.environ["DFSS_DOES"].partition(":")
name = url.rpartition("/")[2]
if does == "give":
    shutil.copyfile(source, name)
elif does == "fail":
    print("ERROR main.cpp:1396: Cannot download /LLM/" + name + " from open@sophgo.com")
    sys.exit(1)
elif does == "silence":
    child = subprocess.Popen(["sleep", "1800"])
    open(source, "w").write(str(child.pid))
    with open(name, "wb") as out:
        out.write(b"x" * 1000)
    child.wait()
"""


@pytest.fixture
def dfss(tmp_path, monkeypatch):
    """does(what): how the tool behaves from now on."""
    package = tmp_path / "site" / "dfss"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(TOOL)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    return lambda what: monkeypatch.setenv("DFSS_DOES", what)


def make_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_an_archive_is_unpacked_and_not_fetched_twice(dfss, tmp_path, capsys):
    archive = make_archive(tmp_path / "a.zip", {"onnx/block_0.onnx": b"net" * 1000, "onnx/lm_head.onnx": b"head"})
    dfss(f"give:{archive}")
    out = tmp_path / "nets"
    assert cli.main(["fetch", "--artefact", "onnx-512", "--out", str(out)]) == 0
    assert fetched_files(out) == {"onnx/block_0.onnx", "onnx/lm_head.onnx", "manifest.json"}
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and f"--onnx {out}/onnx " in said.err
    assert artefacts.read_manifest(out)["inputs"] == {"qwen_512.zip": sha256_file(archive)}
    dfss("fail")
    assert fetching.fetch(artefact="onnx-512", out=out) == out
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "site", "nets"}


def test_a_bmodel_that_is_one(dfss, tmp_path, bmodel_tiny):
    dfss(f"give:{bmodel_tiny}")
    path = fetching.fetch(artefact="bmodel-int4", out=tmp_path / "b")
    assert path == tmp_path / "b" / "qwen-7b_int4_1dev.bmodel"
    assert path.read_bytes() == Path(bmodel_tiny).read_bytes()
    assert artefacts.read_manifest(path)["settings"]["place"] == "/LLM/LLM-TPU/qwen-7b_int4_1dev.bmodel"
    assert "--tokenizer" in prepared.next_step("bmodel-int4", path)


def test_a_bmodel_that_is_none(dfss, tmp_path):
    (tmp_path / "page").write_text("<html>not found</html>" * 100)
    dfss(f"give:{tmp_path / 'page'}")
    refused("not a bmodel", artefact="bmodel-int4", out=tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_dfss_fails(dfss, tmp_path):
    dfss("fail")
    said = refused("did not give qwen_8k.zip", artefact="onnx-8k", out=tmp_path / "nets")
    assert "Cannot download" in said
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_dfss_falls_silent_and_is_ended_with_all_it_started(dfss, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "STALL", 0.5)
    dfss(f"silence:{tmp_path / 'pid'}")
    started = time.monotonic()
    refused("fell silent: 1000 bytes came", artefact="onnx-8k", out=tmp_path / "nets")
    assert time.monotonic() - started < SOON
    child = Path("/proc") / (tmp_path / "pid").read_text()
    until = time.monotonic() + SOON
    while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until
    assert {path.name for path in tmp_path.iterdir()} == {"site", "pid"}


def test_dfss_is_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if "site-packages" not in folder])
    refused("pip install dfss", artefact="onnx-512", out=tmp_path / "nets")


# Archives


def test_an_archive_writes_nothing_outside_its_folder(tmp_path):
    names = ["../out.txt", "a/../../out.txt", f"{tmp_path}/out.txt", "..\\out.txt"]
    for i, name in enumerate(names):
        archive = make_archive(tmp_path / f"{i}.zip", {"good": b"", name: b"x"})
        prepared.unpack(archive, tmp_path / f"to{i}")
        assert sum(path.is_file() for path in (tmp_path / f"to{i}").rglob("*")) == 2
    assert {path.name for path in tmp_path.iterdir()} == {f"{kind}{i}{end}" for i in range(4)
        for kind, end in (("", ".zip"), ("to", ""))}  # fmt: skip


def test_a_link_in_an_archive_leads_nowhere(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc")
    prepared.unpack(tmp_path / "a.zip", tmp_path / "to")
    assert not (tmp_path / "to" / "link").is_symlink() and (tmp_path / "to" / "link").read_text() == "/etc"


def test_a_damaged_archive(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"net.onnx": os.urandom(10_000)})
    whole = archive.read_bytes()
    # One bit: a fixed byte in the place of a random one is now and then the same.
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    for i, damaged in enumerate([whole[:-100], flipped, whole[:300] + whole[9000:], b""]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            prepared.unpack(archive, tmp_path / f"to{i}")


def test_an_archive_without_a_file(tmp_path):
    archive = make_archive(tmp_path / "a.zip", {"onnx/": b""})
    with pytest.raises(UserError, match="holds no file"):
        prepared.unpack(archive, tmp_path / "to")
