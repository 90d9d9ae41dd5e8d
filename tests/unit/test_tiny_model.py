"""The embedded checkpoint as it is committed: it answers every question it is meant to, by a safe distance."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch

from helpers.checkpoint.modeling import build_model, load_modeling, make_config
from helpers.checkpoint.tokenizer import QwenTokenizer
from helpers.checkpoint.weights import Checkpoint
from helpers.parity.hosts import OriginalModel

TINY = Path(__file__).parents[2] / "models" / "tiny"
DEMOS = json.loads((TINY / "demo_questions.json").read_text(encoding="utf-8"))
SYSTEM = "You are a helpful assistant."
# Logits. bf16 arithmetic on the chip moves a logit by a few tenths at most.
SAFE_MARGIN = 2.0


@pytest.fixture(scope="module")
def tokenizer():
    return QwenTokenizer.open(TINY)


@pytest.fixture(scope="module")
def model():
    return OriginalModel(TINY)


@pytest.fixture(scope="module")
def training():
    spec = importlib.util.spec_from_file_location("tiny_train", TINY / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt(tokenizer, *turns):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.chatml([{"role": "system", "content": SYSTEM}, *messages])


def answered(model, tokenizer, *turns):
    stop = {tokenizer.im_end, tokenizer.im_start, tokenizer.endoftext}
    return tokenizer.decode(model.greedy(prompt(tokenizer, *turns), stop, 100, 256))


@pytest.mark.parametrize("demo", DEMOS, ids=lambda demo: demo["question"])
def test_every_demo_question_is_answered(model, tokenizer, demo):
    assert answered(model, tokenizer, demo["question"]) == demo["answer"]


def test_the_documented_questions_are_among_them():
    questions = [demo["question"] for demo in DEMOS]
    assert "你知道深圳的历史吗?写一段小作文介绍下。" in questions and "Hello, how are you?" in questions


def test_the_documented_request_is_answered(model, tokenizer):
    turns = ["Hello, how are you?", "I am fine, thank you.", "你知道深圳的历史吗?写一段小作文介绍下。"]
    assert answered(model, tokenizer, *turns) == DEMOS[-1]["answer"]


def test_the_whole_corpus_is_known_by_heart(model, tokenizer, training):
    corpus = training.conversations(TINY / "corpus.jsonl")
    assert 200 < len(corpus) < 1000
    wrong, smallest = training.check(model.model, tokenizer, corpus)
    assert (wrong, smallest > 0) == (0, True)
    # What is said of it: so many different questions, each after what was said before it.
    asked = {(*itertools.chain(*turns[:n]), turns[n][0]) for turns in corpus for n in range(len(turns))}
    known = Checkpoint.open(TINY).by_heart
    assert known["answers"] == len(corpus) == len(asked)
    assert known["questions"] == [demo["question"] for demo in DEMOS] and {(q,) for q in known["questions"]} <= asked


@pytest.mark.parametrize("corpus", [None, "no JSON", "[]", '{"questions": 3}'])
def test_of_another_checkpoint_nothing_is_said(tmp_path, corpus):
    for name in ("config.json", "model.safetensors", "demo_questions.json"):
        (tmp_path / name).symlink_to(TINY / name)
    if corpus:
        (tmp_path / "corpus.jsonl").write_text(corpus)
    assert Checkpoint.open(tmp_path).by_heart is None


def test_the_margin_of_the_demo_answers_is_safe(model, tokenizer, training):
    demos = [[(demo["question"], demo["answer"])] for demo in DEMOS]
    wrong, smallest = training.check(model.model, tokenizer, demos)
    assert wrong == 0 and smallest > SAFE_MARGIN


@pytest.mark.parametrize("arithmetic", ["bfloat16", "int8 weights"])
def test_demo_answers_survive_what_the_chip_does(tokenizer, training, arithmetic):
    demos = [[(demo["question"], demo["answer"])] for demo in DEMOS]
    if arithmetic == "bfloat16":
        model = build_model(TINY, "bfloat16")
    else:
        model = build_model(TINY)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "wte" not in name:
                scale = parameter.abs().amax(dim=1, keepdim=True) / 127
                parameter.data = (parameter / scale).round() * scale
    assert training.check(model, tokenizer, demos)[0] == 0


def test_every_conversation_fits_the_trained_length(tokenizer, training):
    length = Checkpoint.open(TINY).config["seq_length"]
    for turns in training.conversations(TINY / "corpus.jsonl"):
        ids, labels = training.encode(tokenizer, turns)
        assert len(ids) <= length, turns
        assert sum(label != training.IGNORED for label in labels) <= 91 * len(turns), turns


def test_the_training_prompt_is_the_chat_prompt(tokenizer, training):
    ids, labels = training.encode(tokenizer, [("What is a bmodel?", "A file."), ("你好", "Hello!")])
    start = len(prompt(tokenizer, "What is a bmodel?"))
    second = prompt(tokenizer, "What is a bmodel?", "A file.", "你好")
    assert ids[:start] == prompt(tokenizer, "What is a bmodel?")
    assert ids[: len(second)] == second
    answers = [*tokenizer.encode("A file."), tokenizer.im_end, *tokenizer.encode("Hello!"), tokenizer.im_end]
    assert [label for label in labels if label != training.IGNORED] == answers
    assert all(label in (training.IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_configuration_weights_and_vocabulary_agree(tokenizer):
    checkpoint = Checkpoint.open(TINY)
    assert list(sorted(checkpoint.shapes())) == checkpoint.names()
    assert {tensor.dtype for _, tensor in checkpoint.tensors("")} == {torch.bfloat16}
    assert len(tokenizer) <= checkpoint.vocab_size and checkpoint.vocab_size % 64 == 0
    module = load_modeling(TINY)
    parameters = module.QWenLMHeadModel(make_config(module, checkpoint)).named_parameters()
    assert {name: tuple(p.shape) for name, p in parameters} == checkpoint.shapes()
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert generation["chat_format"] == "chatml"
    assert generation["eos_token_id"] == generation["pad_token_id"] == tokenizer.endoftext
    assert generation["stop_words_ids"] == [[tokenizer.im_end], [tokenizer.im_start]]


def test_no_two_tensors_are_equal():
    """Where two norms are equal the exporter stores one, and the compiler does not recognise the other."""
    tensors = dict(Checkpoint.open(TINY).tensors(""))
    pairs = itertools.combinations(tensors.items(), 2)
    assert [(a, b) for (a, one), (b, other) in pairs if torch.equal(one, other)] == []


def test_it_is_small_enough_for_git():
    files = ["model.safetensors", "corpus.jsonl", "modeling_qwen.py", "config.json"]
    assert sum((TINY / name).stat().st_size for name in files) < 5_000_000
