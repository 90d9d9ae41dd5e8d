"""The patches: that they do no harm, that each is needed, and that files are safe in their hands."""

import ast
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cli
from helpers.errors import UserError
from helpers.files import remedy
from helpers.patching import patching, understood
from helpers.patching.passages import Source
from tests.unit.revisions import blocks, forms, public

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
PATCHES = [patch.name for patch in patching.all_patches()]
ROWS = 16
TRAINED = blocks.SETTINGS["seq_length"]
TOLERANCE = 2e-6  # float32, states of magnitude 1


def make(name: str, folder: Path) -> Path:
    """A folder with the code of one form, or the embedded checkpoint's own code, and a config for one small layer."""
    if name != "tiny":
        return forms.write(forms.FORMS[name], folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("modeling_qwen.py", "configuration_qwen.py"):
        shutil.copy(TINY / file, folder)
    blocks.make_small(folder)
    return folder


CODES = ["tiny", *forms.FORMS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every code, unpatched, in a folder of its name."""
    root = tmp_path_factory.mktemp("codes")
    for name in CODES:
        make(name, root / name)
    return root


@pytest.fixture
def folder(tmp_path):
    return forms.write(forms.FORMS["2023-10-14"], tmp_path / "checkpoint")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- no harm -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, TRAINED])
@pytest.mark.parametrize("name", CODES)
def test_a_patched_block_gives_what_the_unpatched_one_gives(made, tmp_path, name, rows):
    """Prefill and decode, without padding (tokens == rows) and with it, up to the length the model was trained for."""
    patching.apply(made / name, out=tmp_path / "patched", seq_length=rows)
    before, after = blocks.load_block(made / name), blocks.load_block(tmp_path / "patched")
    for tokens in (1, 5, rows - 2, rows):
        found = blocks.agreement(before, after, tokens, rows)
        assert found.prefill < TOLERANCE and found.decode < TOLERANCE, f"{tokens} tokens: {found}"


def test_the_harness_sees_a_wrong_mask_and_a_wrong_position(made, tmp_path, monkeypatch):
    patching.apply(made / "2023-12", out=tmp_path / "patched", seq_length=ROWS)
    before, after = blocks.load_block(made / "2023-12"), blocks.load_block(tmp_path / "patched")
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "prefill_mask", lambda tokens, rows: blocks.torch.zeros(1, 1, rows, rows))
        assert blocks.agreement(before, after, 5, ROWS).prefill > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "decode_mask", lambda filled, rows: blocks.torch.zeros(1, 1, 1, rows + 1))
        assert blocks.agreement(before, after, 5, ROWS).decode > 1e-2
    rotation = blocks.rotation
    monkeypatch.setattr(blocks, "rotation", lambda positions: rotation([p + (len(positions) == 1) for p in positions]))
    assert blocks.agreement(blocks.load_block(made / "2023-08"), after, 5, ROWS).decode > 1e-2


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_embedded_models_logits_before_and_after_agree(tmp_path, tokens):
    """The whole model: its own forward before, the chain of patched blocks with explicit masks after."""
    import torch

    from helpers.checkpoint.modeling import build_model
    from helpers.checkpoint.weights import Checkpoint

    rows, steps = 24, 3
    patching.apply(TINY, out=tmp_path / "patched", seq_length=rows)
    model, checkpoint = build_model(TINY), Checkpoint.open(tmp_path / "patched")
    layers = build_model(tmp_path / "patched").transformer.h
    heads, width, base = checkpoint.heads, checkpoint.head_dim, checkpoint.rotary_base
    caches = [[torch.randn(1, rows, heads, width) for _ in range(2)] for _ in layers]

    def chain(states, positions, mask, place, past):
        frequencies = 1.0 / (base ** (torch.arange(0, width, 2).float() / width))
        angles = torch.outer(torch.tensor(positions).float(), frequencies).repeat(1, 2)[None, :, None]
        for layer, cache in zip(layers, caches, strict=True):
            states, rows_of_cache = layer(
                states,
                rotary_pos_emb_list=[[angles.cos(), angles.sin()]],
                attention_mask=mask,
                layer_past=tuple(cache) if past else None,
                use_cache=True,
            )
            for kept, new in zip(cache, rows_of_cache, strict=True):
                kept[:, place] = new[:, : place.stop - place.start]
        return model.lm_head(model.transformer.ln_f(states))

    ids = torch.randint(0, checkpoint.vocab_size, (1, tokens + steps), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(ids[:, :tokens], use_cache=True)
        padded = torch.zeros(1, rows, dtype=torch.long)
        padded[:, :tokens] = ids[:, :tokens]
        mask = blocks.prefill_mask(tokens, rows)
        positions = [*range(tokens), *[0] * (rows - tokens)]
        found = chain(model.transformer.wte(padded), positions, mask, slice(0, tokens), past=False)
        torch.testing.assert_close(found[:, :tokens], expected.logits, atol=2e-4, rtol=1e-4)
        for p in range(tokens, tokens + steps):
            new = ids[:, p : p + 1]
            expected = model(new, past_key_values=expected.past_key_values, use_cache=True)
            found = chain(model.transformer.wte(new), [p], blocks.decode_mask(p, rows), slice(p, p + 1), past=True)
            torch.testing.assert_close(found, expected.logits, atol=2e-4, rtol=1e-4)


def test_the_documented_config_change_alone_would_scale_every_decoded_query(made, tmp_path):
    """Why patch 06 turns log-n scaling off: seq_length = S makes each decode step look longer than trained."""
    target = tmp_path / "documented"
    patching.apply(made / "2023-12", out=target, seq_length=ROWS)
    config = json.loads((target / "config.json").read_text()) | {"use_logn_attn": True}
    (target / "config.json").write_text(json.dumps(config))
    found = blocks.agreement(blocks.load_block(made / "2023-12"), blocks.load_block(target), 5, ROWS)
    assert found.prefill < TOLERANCE < 1e-3 < found.decode


# Real revisions, which this repository does not contain: there is such a test only where a folder of them is named.
if PUBLIC := os.environ.get("QWEN_REVISIONS"):

    @pytest.mark.parametrize("revision", public.revisions(Path(PUBLIC)), ids=str)
    def test_public_revisions_agree_or_are_refused(revision):
        result = public.measure(revision)
        assert "does not fit" in result.refused or max(result.prefill, result.decode) < TOLERANCE


# --- each is needed ----------------------------------------------------------------------------------------------
# A check returns what is wrong, or None. Each patch, taken back alone, makes the check named for it fail.


def exported_graph(folder: Path, decode: bool):
    """One block's ONNX graph as the export makes it: opset 15, the TorchScript exporter, fixed shapes."""
    import onnx
    import torch

    block = blocks.load_block(folder)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block
            self.cos, self.sin = blocks.rotation(list(range(ROWS)))

        def forward(self, states, positions, mask, *past):
            turn = [table[0, :, 0][positions].unsqueeze(2) for table in (self.cos, self.sin)]
            states, present = self.block(
                states,
                rotary_pos_emb_list=[turn],
                attention_mask=mask,
                layer_past=past or None,
                use_cache=True,
            )
            return states, *present

    tokens = 1 if decode else ROWS
    inputs = [
        torch.zeros(1, tokens, blocks.HIDDEN),
        torch.zeros(1, tokens, dtype=torch.int32),
        torch.zeros(1, 1, tokens, ROWS + 1 if decode else ROWS),
    ]
    inputs += [torch.zeros(1, ROWS, blocks.HEADS, blocks.HEAD_DIM) for _ in range(2 if decode else 0)]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Qwen's code compares shapes, which are constants for a fixed S
        torch.onnx.export(Net(), tuple(inputs), file, opset_version=15, dynamo=False)
    return onnx.load_from_string(file.getvalue())


def fault_in_graph(folder: Path) -> str | None:
    """Prefill and decode export, and the graphs hold no causal mask of their own and no tensor made while running.

    TPU-MLIR 1.30.2 stops at a Trilu of a constant (see test_the_compiler_stops_…).
    """
    try:
        operators = {node.op_type for decode in (False, True) for node in exported_graph(folder, decode).graph.node}
    except (TypeError, AttributeError, RuntimeError) as error:
        return f"does not export: {error}"
    unwanted = operators & {"Trilu", "Where", "ConstantOfShape", "Expand"}
    return f"unwanted operators {sorted(unwanted)}" if unwanted else None


def fault_in_decode(folder: Path, unpatched: Path, rows: int) -> str | None:
    """A decode step agrees with the unpatched block's and gives one row of key and value."""
    try:
        found = blocks.agreement(blocks.load_block(unpatched), blocks.load_block(folder), rows - 2, rows)
    except (AssertionError, TypeError, RuntimeError) as error:
        return str(error)
    return None if found.decode < TOLERANCE else f"decode differs by {found.decode}"


def fault_in_upcast(folder: Path) -> str | None:
    """Both copies of the attention mean the same, given nothing but the caller's mask."""
    import torch

    attention = blocks.load_block(folder).attn
    if not hasattr(attention, "_upcast_and_reordered_attn"):
        return None
    query, past = torch.randn(1, 2, 1, 8), torch.randn(1, 2, ROWS + 1, 8)
    given = {"attention_mask": blocks.decode_mask(5, ROWS)}
    if "registered_causal_mask" in attention._attn.__code__.co_varnames:
        given["registered_causal_mask"] = None
    expected, _ = attention._attn(query, past, past, **given)
    try:
        found, _ = attention._upcast_and_reordered_attn(query, past, past, **given)
    except (TypeError, RuntimeError) as error:
        return str(error)
    same = torch.allclose(found, expected.transpose(1, 2), atol=1e-6)
    return None if same else "the two copies of the attention differ"


# What fails without it (a regular expression), and the check that says so. Which of the words it is depends on where
# the revision has its causal mask from: an argument that an exported block lacks, a buffer, or a triangle made there.
NEEDED_FOR = {
    "01_no_fused_attention": ("graph", "NoneType|Trilu"),
    "02_constant_scale": ("graph", "ConstantOfShape"),
    "03_attention_mask_only": ("graph", "NoneType|Trilu|Where|size of tensor"),
    "04_attention_mask_only_upcast": ("upcast", "NoneType|size of tensor|must match"),
    "05_present_is_the_new_row": ("decode", f"returned {ROWS + 1} rows of key"),
    "06_config_for_one_length": ("decode at the trained length", "decode differs"),
    "07_rotation_from_caller": ("graph", "unexpected keyword argument"),
}


def checks(folder: Path, unpatched: Path) -> dict:
    return {
        "graph": lambda: fault_in_graph(folder),
        "decode": lambda: fault_in_decode(folder, unpatched, ROWS),
        "decode at the trained length": lambda: fault_in_decode(folder, unpatched, TRAINED),
        "upcast": lambda: fault_in_upcast(folder),
    }


def applicable():
    root = Path(tempfile.mkdtemp())
    try:
        for name in CODES:
            for step in patching.plan(patching._read(make(name, root / name))[0], ROWS):
                if step.state == patching.APPLIED:
                    yield name, step.patch.name
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("name", CODES)
def test_with_all_patches_every_check_passes(made, tmp_path, name):
    patching.apply(made / name, out=tmp_path / "patched", seq_length=ROWS)
    faults = {check: fault() for check, fault in checks(tmp_path / "patched", made / name).items()}
    assert faults == dict.fromkeys(faults)


@pytest.mark.parametrize(("name", "patch"), list(applicable()))
def test_each_patch_taken_back_alone_fails_the_check_named_for_it(made, tmp_path, name, patch):
    target = tmp_path / "patched"
    patching.apply(made / name, out=target, seq_length=ROWS)
    patching.revert(target, only=[patch])
    check, words = NEEDED_FOR[patch]
    fault = checks(target, made / name)[check]()
    assert fault is not None and re.search(words, fault), f"{check}: {fault}"
    with pytest.raises(UserError, match=patch):
        patching.require_patched(target)


def test_every_patch_is_needed_by_some_code():
    assert {patch for _, patch in applicable()} == set(PATCHES) == set(NEEDED_FOR)


@pytest.mark.slow
def test_the_compiler_stops_at_a_block_with_a_causal_mask_of_its_own(made, tmp_path):
    """What an unwanted Trilu means: TPU-MLIR's front end cannot convert one of a constant."""
    import onnx

    target = tmp_path / "patched"
    patching.apply(made / "2023-12", out=target, seq_length=ROWS)
    patching.revert(target, only=["03"])
    onnx.save(exported_graph(target, decode=False), tmp_path / "block.onnx")
    tool = Path(sys.executable).with_name("model_transform.py")
    command = [sys.executable, str(tool), "--model_name", "block", "--model_def", "block.onnx", "--mlir", "block.mlir"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "convert_trilu_op" in done.stderr + done.stdout, done.stderr[-2000:]


# --- finding a passage -------------------------------------------------------------------------------------------


def outcome(text: str, config: str) -> dict[str, str]:
    return {
        step.patch.name: step.state
        for step in patching.plan({"modeling_qwen.py": text, "config.json": config}, seq_length=ROWS)
    }


def patched_tree(text: str) -> str:
    """What the patched text means: its syntax tree without positions. Comments do not count."""
    config = json.dumps({"model_type": "qwen", **blocks.SETTINGS})
    steps = patching.plan({"modeling_qwen.py": text, "config.json": config}, seq_length=ROWS)
    assert patching.MISFIT not in {step.state for step in steps}
    return ast.dump(ast.parse([step.after for step in steps if step.patch.file == "modeling_qwen.py"][-1]))


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(list(forms.FORMS)), data=st.data())
def test_comments_and_blank_lines_do_not_matter(name, data):
    plain = forms.source(forms.FORMS[name])
    lines = plain.splitlines()
    places = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=12))
    for place in sorted(places, reverse=True):
        lines.insert(place, data.draw(st.sampled_from(["", "# 注释 causal_mask = None", "        # a note"])))
    assert patched_tree("\n".join(lines) + "\n") == patched_tree(plain)


def test_layout_does_not_matter():
    plain = forms.source(forms.FORMS["2023-10-14"])
    dense = plain.replace(
        "causal_mask = registered_causal_mask[\n            :, :, key_length - query_length : key_length, :key_length\n"
        "        ]",
        "causal_mask=registered_causal_mask[:,:,(key_length-query_length):key_length,:key_length]  # triangle",
    )
    assert dense != plain
    assert patched_tree(dense) == patched_tree(plain)


def test_line_endings_stay_and_everything_outside_the_passages_too(tmp_path):
    folder = forms.write(forms.FORMS["2023-08"], tmp_path / "a")
    path = folder / "modeling_qwen.py"
    unix = path.read_bytes()
    path.write_bytes(unix.replace(b"\n", b"\r\n"))
    patching.apply(folder)
    assert b"\n" not in path.read_bytes().replace(b"\r\n", b"")
    path.with_name("unix").mkdir()
    windows = path.read_bytes().replace(b"\r\n", b"\n")
    steps = patching.plan({"modeling_qwen.py": unix.decode(), "config.json": "{}"}, ROWS)
    assert windows.decode() == steps[-1].after


@pytest.mark.parametrize("name", CODES)
def test_a_diff_touches_only_its_passage(made, name):
    originals, _ = patching._read(made / name)
    for step in patching.plan(originals, ROWS):
        diff = difflib.ndiff(step.before.splitlines(), step.after.splitlines())
        touched = [line for line in diff if line[0] in "+-"]
        assert len(touched) <= 40
        assert bool(touched) == (step.state == patching.APPLIED)


REFUSED = {
    # a mask that knows more than the causal one
    "a window in the mask": (
        "03_attention_mask_only",
        "causal_mask, attn_weights.to(attn_weights.dtype), mask_value",
        "causal_mask & self.window, attn_weights.to(attn_weights.dtype), mask_value",
    ),
    "a bias beside the mask": (
        "03_attention_mask_only",
        "        attn_weights = nn.functional.softmax(attn_weights, dim=-1)",
        "        attn_weights = nn.functional.softmax(attn_weights + causal_mask, dim=-1)",
    ),
    "another mask value": ("03_attention_mask_only", "torch.finfo(attn_weights.dtype).min", "self.masked_bias"),
    "a scale by layer": ("02_constant_scale", "size_temp ** 0.5", "(size_temp ** 0.5 * self.layer_number)"),
    "a scale that is a root": ("02_constant_scale", "torch.full(\n", "torch.sqrt(\n"),
    "a switch by configuration": (
        "01_no_fused_attention",
        "SUPPORT_TORCH2 = hasattr(torch, '__version__') and int(torch.__version__.split(\".\")[0]) >= 2",
        "SUPPORT_TORCH2 = flash_attention_wanted()",
    ),
    "no switch": ("01_no_fused_attention", "self.use_cache_quantization and SUPPORT_TORCH2", "self.fused"),
    "a cache of another layout": (
        "05_present_is_the_new_row",
        "present = (key, value)",
        "present = torch.stack((key, value))",
    ),
    "work between past and present": (
        "05_present_is_the_new_row",
        "        if use_cache:\n            present",
        "        key = compress(key)\n        if use_cache:\n            present",
    ),
    # what the patches rely on around their passages
    "rows of the cache that are let go": (
        "05_present_is_the_new_row",
        "        if self.use_logn_attn",
        "        key, value = key[:, -1024:], value[:, -1024:]\n        if self.use_logn_attn",
    ),
    "keys that are turned when they are read": (
        "05_present_is_the_new_row",
        "        if self.use_logn_attn",
        "        key = apply_rotary_pos_emb(key, rotary_pos_emb)\n        if self.use_logn_attn",
    ),
    "keys under another name": (
        "05_present_is_the_new_row",
        "        if self.use_logn_attn",
        "        rows = key\n        rows[:, :4] = 0\n        if self.use_logn_attn",
    ),
    "a rotation of every second layer": (
        "05_present_is_the_new_row",
        "if rotary_pos_emb_list is not None:",
        "if rotary_pos_emb_list is not None and self.layer_number % 2:",
    ),
    "a rotation of its own choice": (
        "05_present_is_the_new_row",
        "            rotary_pos_emb = [i[:, -cur_len:, :, :] for i in rotary_pos_emb_list[0]]\n",
        "",
    ),
    "a rotation by an angle": (
        "05_present_is_the_new_row",
        "    cos, sin = freqs\n",
        "    cos, sin = freqs.cos(), freqs.sin()\n",
    ),
    "a query with something added": (
        "05_present_is_the_new_row",
        "        key = self._split_heads(",
        "        query = query + self.lora(hidden_states)\n        key = self._split_heads(",
    ),
    "a mask of its own": (
        "05_present_is_the_new_row",
        "        query = query.permute(",
        "        attention_mask = self.window\n        query = query.permute(",
    ),
    "only the highest scores": (
        "03_attention_mask_only",
        "        attn_weights = self.attn_dropout(attn_weights)",
        "        attn_weights = highest(attn_weights)\n        attn_weights = self.attn_dropout(attn_weights)",
    ),
    "a block that shortens the past": (
        "07_rotation_from_caller",
        "            layer_past=layer_past,",
        "            layer_past=shortened(layer_past),",
    ),
    "a block that changes the mask": (
        "07_rotation_from_caller",
        "        outputs = self.attn(",
        "        attention_mask = widened(attention_mask)\n        outputs = self.attn(",
    ),
    "a block that keeps the mask": ("07_rotation_from_caller", "            attention_mask=attention_mask,\n", ""),
    "another class": ("02_constant_scale", "class QWenAttention", "class QWenAttention2"),
    "another model": ("06_config_for_one_length", '"model_type": "qwen"', '"model_type": "qwen2"'),
    "no Python": ("01_no_fused_attention", "import math", "<<<<<<< HEAD"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("copied", [False, True], ids=["in place", "copy"])
def test_an_unknown_revision_is_refused_with_the_passage_and_left_as_it_was(folder, case, copied):
    name, old, new = REFUSED[case]
    file = next(patch.file for patch in patching.all_patches() if patch.name == name)
    path = folder / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    before = bytes_of(folder)
    with pytest.raises(UserError) as refusal:
        patching.apply(folder, out=folder.with_name("copy") if copied else None)
    message = str(refusal.value)
    assert name in message and str(path) in message
    assert "line " in message or "there is no QWenAttention" in message or "qwen2" in message
    assert bytes_of(folder) == before
    assert not folder.with_name("copy").exists()


@pytest.mark.parametrize("name", forms.FOREIGN)
def test_a_model_made_from_qwen_that_works_otherwise_is_refused(tmp_path, name, capsys):
    folder = forms.write(forms.FOREIGN[name], tmp_path / "c")
    before = bytes_of(folder)
    for more in ([], ["--out", str(tmp_path / "copy")], ["--only", "06"]):
        assert cli.main(["patch", "--model_path", str(folder), *more]) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: Patch 0") and "Traceback" not in told
        assert bytes_of(folder) == before and not (tmp_path / "copy").exists()
    # The lines that it names are those of the file as it is.
    lines = before["modeling_qwen.py"].decode().splitlines()
    named = re.findall(r"line (\d+):\s+(.*)", told)
    assert named and all(lines[int(number) - 1].strip() == code for number, code in named)


def test_the_lines_are_those_of_the_statements_at_fault(tmp_path):
    for name, at_fault in (
        ("codefuse-tuple", "if isinstance(rotary_pos_emb, tuple):"),
        ("codefuse-indexed", "q_pos_emb = q_pos_emb[:, cur_len, :, :]"),
        ("edited-rows", "key = in_pairs(key)"),
    ):
        with pytest.raises(UserError, match=re.escape(at_fault)):
            patching.apply(forms.write(forms.FOREIGN[name], tmp_path / name))


def test_a_model_that_is_refused_would_be_wrong(tmp_path, monkeypatch):
    """Why they are refused: patched nevertheless, two do not run and one gives other outputs."""
    monkeypatch.setattr(understood, "_check", lambda *_: None)
    monkeypatch.setattr(understood, "is_code", lambda *_: True)  # whether cosine and sine are unpacked
    found = {}
    for name in ("codefuse-tuple", "codefuse-indexed", "edited-rows"):
        folder = forms.write(forms.FOREIGN[name], tmp_path / name)
        patching.apply(folder, out=tmp_path / f"{name} patched", seq_length=ROWS)
        found[name] = fault_in_graph(tmp_path / f"{name} patched")
    assert found.pop("edited-rows") is None
    assert all(fault.startswith("does not export") for fault in found.values()), found
    before, after = (blocks.load_block(tmp_path / f"edited-rows{end}") for end in ("", " patched"))
    assert blocks.agreement(before, after, 5, ROWS).prefill > 1e-2


def test_a_statement_that_touches_nothing_of_the_attention_is_let_be(folder):
    path = folder / "modeling_qwen.py"
    add = "\n        mixed_x_layer ="
    assert add in path.read_text()
    path.write_text(path.read_text().replace(add, '\n        """Attention."""\n        self.calls = 1' + add))
    assert "modeling_qwen.py" in patching.apply(folder).changed


def test_qwen_audio_is_called_what_it_is(tmp_path, capsys):
    audio = forms.write(forms.QWEN_AUDIO, tmp_path / "audio")
    assert cli.main(["patch", "--model_path", str(audio), "--out", str(tmp_path / "patched"), "-s", str(ROWS)]) == 0
    assert "this is Qwen-Audio" in capsys.readouterr().err
    found = blocks.agreement(blocks.load_block(audio), blocks.load_block(tmp_path / "patched"), 5, ROWS)
    assert max(found.prefill, found.decode) < TOLERANCE


def test_the_refusal_shows_the_passage(folder):
    path = folder / "modeling_qwen.py"
    path.write_text(path.read_text().replace("torch.finfo(attn_weights.dtype).min", "self.masked_bias"))
    with pytest.raises(UserError, match="mask_value = self.masked_bias"):
        patching.apply(folder)


def test_statements_that_share_a_line_are_refused(folder):
    path = folder / "modeling_qwen.py"
    path.write_text(path.read_text().replace("\nSUPPORT_TORCH2", "\nx = 1; SUPPORT_TORCH2"))
    with pytest.raises(UserError, match="shares a line"):
        patching.apply(folder)


# --- applying and taking back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODES)
def test_applied_twice_then_taken_back(made, tmp_path, name):
    folder = shutil.copytree(made / name, tmp_path / "c")
    before = bytes_of(folder)
    first = patching.apply(folder)
    assert first.changed == ["modeling_qwen.py", "config.json"]
    patched = bytes_of(folder)
    assert patching.apply(folder).changed == []
    assert bytes_of(folder) == patched
    patching.require_patched(folder)
    assert patching.revert(folder).changed == ["modeling_qwen.py", "config.json"]
    assert bytes_of(folder) == before
    assert patching.revert(folder).changed == []


@settings(max_examples=10, deadline=None)
@given(
    name=st.sampled_from(["2023-08", "2023-10-14", "2023-12"]),
    orders=st.tuples(st.permutations(PATCHES), st.permutations(PATCHES)),
)
def test_patches_go_on_and_off_in_any_order(name, orders):
    """One by one in any order gives what all at once gives; one by one off gives the original back."""
    with tempfile.TemporaryDirectory() as root:
        folder = forms.write(forms.FORMS[name], Path(root) / "a")
        whole = forms.write(forms.FORMS[name], Path(root) / "b")
        before = bytes_of(folder)
        patching.apply(whole)
        for patch in orders[0]:
            patching.apply(folder, only=[patch])
        assert {k: v for k, v in bytes_of(folder).items() if k != patching.RECORD} == {
            k: v for k, v in bytes_of(whole).items() if k != patching.RECORD
        }
        for patch in orders[1]:
            patching.revert(folder, only=[patch])
        assert bytes_of(folder) == before


def test_only_by_number_and_unknown_names(folder):
    report = patching.apply(folder, only=["03"])
    assert [step.patch.name for step in report.steps if step.state == patching.APPLIED] == ["03_attention_mask_only"]
    with pytest.raises(UserError, match="01_no_fused_attention, 02"):
        patching.apply(folder, only=["3"])


def test_the_sequence_length_goes_into_the_config_and_can_be_changed(folder):
    patching.apply(folder, seq_length=24)
    config = json.loads((folder / "config.json").read_text())
    assert (config["seq_length"], config["max_position_embeddings"], config["bf16"]) == (24, 24, True)
    assert config["n_embd"] == blocks.HIDDEN
    assert patching.apply(folder).changed == []
    assert patching.apply(folder, seq_length=16).changed == ["config.json"]
    assert json.loads((folder / "config.json").read_text())["seq_length"] == 16
    assert patching.trained_seq_length(folder) == TRAINED


def test_by_default_the_documented_length_or_the_trained_one_if_that_is_less(folder):
    patching.apply(folder)
    assert json.loads((folder / "config.json").read_text())["seq_length"] == TRAINED
    patching.revert(folder)
    config = json.loads((folder / "config.json").read_text()) | {"seq_length": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    patching.apply(folder)
    assert json.loads((folder / "config.json").read_text())["seq_length"] == 512


def test_beyond_the_trained_length_there_is_a_warning(folder):
    assert "trained" in patching.apply(folder, seq_length=TRAINED + 1).warnings[0]
    assert not patching.apply(folder, seq_length=TRAINED).warnings


@pytest.mark.parametrize("length", [0, -1, 1.5, "512"])
def test_a_sequence_length_that_is_none_is_refused(folder, length):
    before = bytes_of(folder)
    with pytest.raises(UserError, match="seq_length"):
        patching.apply(folder, seq_length=length)
    assert bytes_of(folder) == before


def test_the_config_keeps_its_layout_and_its_unknown_keys():
    config = '{\n    "model_type":"qwen", "bf16" : false,\n\n  "seq_length":  8192,\n "extra": {"a": [1, 2]}\n}'
    change = next(patch for patch in patching.all_patches() if patch.file == "config.json")
    state, _, changed = change.outcome(config, 512)
    assert state == patching.APPLIED
    assert '"model_type":"qwen", "bf16" : true,\n\n  "seq_length":  512,\n "extra": {"a": [1, 2]}\n}' in changed
    added = {"bf16": True, "seq_length": 512, "max_position_embeddings": 512}
    assert json.loads(changed) == json.loads(config) | added


def test_a_config_with_a_key_twice_is_refused(folder):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"seq_length": 5,', 1))
    with pytest.raises(UserError, match="06_config"):
        patching.apply(folder, seq_length=16)


def test_hand_patched_files_are_as_good(made, tmp_path):
    """Who followed the documentation by hand has files in which no patch has anything to change."""
    folder = shutil.copytree(made / "2023-10-14", tmp_path / "c")
    patching.apply(folder)
    (folder / patching.RECORD).unlink()
    patching.require_patched(folder)
    assert patching.apply(folder).changed == []
    assert {step.state for step in patching.status(folder)} == {patching.NOT_NEEDED}


def test_status_says_what_is_and_changes_nothing(folder):
    before = bytes_of(folder)
    states = {step.patch.name[:2]: step.state for step in patching.status(folder)}
    assert states.pop("07") == patching.NOT_NEEDED
    assert set(states.values()) == {patching.NOT_APPLIED}
    assert bytes_of(folder) == before
    patching.apply(folder, only=["05"])
    states = {step.patch.name[:2]: step.state for step in patching.status(folder)}
    assert [number for number, state in states.items() if state == patching.APPLIED] == ["05"]


@pytest.mark.parametrize("patch", PATCHES)
def test_every_patch_says_why(patch):
    reason = ast.get_docstring(ast.parse((patching.FOLDER / f"{patch}.py").read_text()))
    assert reason.splitlines()[0].endswith((".", ")")) and len(reason) > 300 and "Recognises" in reason


# --- files in danger ---------------------------------------------------------------------------------------------


def run_and_die(action, at: int) -> bool:
    """Run an action in a child that dies, as by kill -9, right before or after a replacement; whether it did."""
    child = os.fork()
    if child == 0:
        moments = itertools.count(1)
        real = os.replace

        def deadly(*args):
            for do in (lambda: None, lambda: real(*args)):
                do()
                if next(moments) == at:
                    os._exit(9)

        os.replace = deadly
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("action", ["apply", "apply again", "revert"])
def test_killed_anywhere_every_file_is_whole_and_the_same_command_goes_on(tmp_path, action):
    deaths = 0
    reference = forms.write(forms.FORMS["2023-10-14"], tmp_path / "whole")
    patching.apply(reference, seq_length=16)
    whole = bytes_of(reference)
    for at in range(1, 10):
        folder = forms.write(forms.FORMS["2023-10-14"], tmp_path / f"{at}")
        original = bytes_of(folder)
        if action != "apply":
            patching.apply(folder, seq_length=8, only=["01", "06"])
        partly = bytes_of(folder)
        act = partial(patching.revert, folder) if action == "revert" else partial(patching.apply, folder, seq_length=16)
        deaths += run_and_die(act, at)
        for name in patching.FILES:
            assert (folder / name).read_bytes() in (original[name], partly[name], whole[name])
        patching.status(folder)
        act()
        expected = original if action == "revert" else whole
        assert {name: data for name, data in bytes_of(folder).items() if name != patching.RECORD} == {
            name: data for name, data in expected.items() if name != patching.RECORD
        }
        patching.revert(folder)
        assert bytes_of(folder) == original
    assert deaths == 6  # before and after: the record, two files


def test_a_file_edited_since_is_not_overwritten(folder):
    patching.apply(folder)
    path = folder / "modeling_qwen.py"
    path.write_text(path.read_text() + "\n# mine\n")
    before = bytes_of(folder)
    for action in (patching.revert, patching.apply, patching.status, patching.trained_seq_length):
        with pytest.raises(UserError, match="edited after it was patched"):
            action(folder)
    assert bytes_of(folder) == before
    patching.require_patched(folder)


def test_what_the_message_on_an_edited_file_says_works(folder):
    before = bytes_of(folder)
    patching.apply(folder)
    path = folder / "modeling_qwen.py"
    path.write_text(path.read_text() + "\n# mine\n")
    path.rename(folder / "mine.py")
    patching.revert(folder)
    (folder / "mine.py").unlink()
    assert bytes_of(folder) == before
    patching.apply(folder)
    path.write_text(path.read_text() + "\n# mine\n")
    (folder / patching.RECORD).unlink()
    patching.apply(folder)
    assert path.read_text().endswith("# mine\n")


@pytest.mark.parametrize("damage", ["{", "[]", '{"files": {}}', '{"files": {"modeling_qwen.py": 1, "config.json": 2}}'])
def test_a_damaged_record_is_said_to_be_damaged(folder, damage):
    patching.apply(folder)
    (folder / patching.RECORD).write_text(damage)
    with pytest.raises(UserError, match="record of patches"):
        patching.revert(folder)


def test_a_folder_without_the_right_to_write_is_left_alone():
    """As root every folder can be written: the attempt is made as somebody else."""
    root = Path(tempfile.mkdtemp())
    try:
        root.chmod(0o755)
        folder = forms.write(forms.FORMS["2023-12"], root / "c")
        folder.chmod(0o555)
        before = bytes_of(folder)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                patching.apply(folder)
                message = "no error"
            except OSError as error:
                message = f"{error.filename}: {error.strerror}. {remedy(error)}"
            os.write(writer, message.encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as answer:
            message = answer.read()
        os.waitpid(child, 0)
        assert str(folder) in message and "Permission denied" in message and "--out" in message
        assert bytes_of(folder) == before
    finally:
        (root / "c").chmod(0o755)
        shutil.rmtree(root)


def test_a_read_only_file_is_patched_and_stays_read_only(folder):
    path = folder / "modeling_qwen.py"
    before = path.read_bytes()
    path.chmod(0o444)
    patching.apply(folder)
    assert path.stat().st_mode & 0o777 == 0o444 and path.read_bytes() != before
    patching.revert(folder)
    assert path.stat().st_mode & 0o777 == 0o444 and path.read_bytes() == before


def test_a_hub_cache_keeps_its_blobs(folder, tmp_path):
    """Hugging Face's cache has links in place of files: the blobs they name belong to other revisions too."""
    blob = tmp_path / "blob"
    os.rename(folder / "modeling_qwen.py", blob)
    (folder / "modeling_qwen.py").symlink_to(blob)
    digest = hashlib.sha256(blob.read_bytes()).hexdigest()
    patching.apply(folder)
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == digest
    assert (folder / "modeling_qwen.py").read_bytes() != blob.read_bytes()
    patching.revert(folder)
    assert (folder / "modeling_qwen.py").read_bytes() == blob.read_bytes()


# --- a patched copy ----------------------------------------------------------------------------------------------


def test_a_copy_links_the_weights_and_leaves_the_checkpoint_alone(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / ".git").mkdir()
    before = bytes_of(folder)
    out = tmp_path / "new" / "copy"
    patching.apply(folder, out=out)
    assert bytes_of(folder) == before
    assert (out / "model.safetensors").samefile(folder / "model.safetensors")
    assert not (out / ".git").exists()
    patching.require_patched(out)
    assert patching.apply(folder, out=out).changed == []
    patching.revert(out)
    assert bytes_of(out) == before
    with pytest.raises(UserError, match="is not patched"):
        patching.require_patched(out)


def test_a_copy_follows_its_checkpoint(folder, tmp_path):
    """New weights of the same size, or new code, are not left out because a copy is there already."""
    weights, out = folder / "model.safetensors", tmp_path / "copy"
    weights.write_bytes(b"weights")
    patching.apply(folder, out=out)
    weights.unlink()
    weights.write_bytes(b"WEIGHTS")
    code = folder / "modeling_qwen.py"
    code.write_text(code.read_text() + "# newer\n")
    assert patching.apply(folder, out=out).changed == ["modeling_qwen.py"]
    assert (out / "model.safetensors").read_bytes() == b"WEIGHTS"
    assert (out / "modeling_qwen.py").read_text().endswith("# newer\n")
    patching.revert(out)
    assert bytes_of(out) == bytes_of(folder)


def test_a_copy_is_compared_by_its_bytes_not_by_its_size_and_time(folder, tmp_path):
    weights, out = folder / "model.safetensors", tmp_path / "copy"
    out.mkdir()
    weights.write_bytes(b"weights")
    (out / weights.name).write_bytes(b"foreign")
    for file in (weights, out / weights.name):
        os.utime(file, (1, 1))
    with pytest.raises(UserError, match=f"has another {weights.name}"):
        patching.apply(folder, out=out)
    assert (out / weights.name).read_bytes() == b"foreign"


def test_a_copy_that_was_edited_is_not_overwritten(folder, tmp_path):
    out = tmp_path / "copy"
    patching.apply(folder, out=out)
    (out / "modeling_qwen.py").write_text("mine")
    with pytest.raises(UserError, match="edited after it was patched"):
        patching.apply(folder, out=out)
    assert (out / "modeling_qwen.py").read_text() == "mine"


def test_a_copy_whose_making_was_killed_is_finished(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"weights")
    whole = tmp_path / "whole"
    patching.apply(folder, out=whole)
    for at in range(1, 14):
        out = tmp_path / f"copy{at}"
        died = run_and_die(partial(patching.apply, folder, out=out), at)
        patching.apply(folder, out=out)
        assert bytes_of(out) == bytes_of(whole)
    assert died is False


def test_a_copy_of_a_patched_checkpoint_can_be_taken_back(folder, tmp_path):
    before = bytes_of(folder)
    patching.apply(folder)
    patching.apply(folder, out=tmp_path / "copy")
    patching.require_patched(tmp_path / "copy")
    patching.revert(tmp_path / "copy")
    assert bytes_of(tmp_path / "copy") == before


def test_where_no_hard_link_is_possible_a_symbolic_one_is_made(folder, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(18, "Invalid cross-device link")

    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(patching.os, "link", refuse)
    patching.apply(folder, out=tmp_path / "copy")
    link = tmp_path / "copy" / "model.safetensors"
    assert link.is_symlink() and link.read_bytes() == b"weights"


def test_a_disk_without_links_gets_a_copy(folder, tmp_path, preload):
    """exFAT, or a Windows mount."""
    (folder / "model.safetensors").write_bytes(b"weights")
    environment = preload(
        """
        int symlink(const char *to, const char *path) { errno = EPERM; return -1; }
        int link(const char *to, const char *path) { errno = EPERM; return -1; }
        """
    )
    command = [sys.executable, "-m", "helpers", "patch", "--model_path", folder, "--out", tmp_path / "copy"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "copy" / "model.safetensors"
    made = weights.stat()
    assert weights.read_bytes() == b"weights" and made.st_nlink == 1 and not weights.is_symlink()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (again.returncode, weights.stat().st_ino) == (0, made.st_ino), again.stderr
    (folder / "model.safetensors").write_bytes(b"changed")
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert weights.read_bytes() == b"changed"


@pytest.mark.parametrize("file", ["modeling_qwen.py", "config.json", "configuration_qwen.py"])
def test_a_folder_with_something_else_in_it_is_not_overwritten(folder, tmp_path, file):
    out = tmp_path / "copy"
    out.mkdir()
    (out / file).write_text("something else")
    with pytest.raises(UserError, match=f"has another {file}"):
        patching.apply(folder, out=out)
    assert (out / file).read_text() == "something else"


def test_not_a_checkpoint(tmp_path):
    for action in (patching.apply, patching.revert, patching.status, patching.require_patched):
        with pytest.raises(UserError, match="modeling_qwen.py"):
            action(tmp_path / "nowhere")


def test_files_that_are_not_text(folder):
    (folder / "modeling_qwen.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        patching.apply(folder)
    (folder / "modeling_qwen.py").write_text("pass")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable JSON"):
        patching.apply(folder)


# --- the command line --------------------------------------------------------------------------------------------


def test_command_line(folder, capsys):
    before = bytes_of(folder)
    model = ["patch", "--model_path", str(folder)]
    assert cli.main([*model, "--seq_length", "16"]) == 0
    assert "03_attention_mask_only" in capsys.readouterr().out
    assert cli.main([*model, "--status"]) == 0
    assert capsys.readouterr().out.count(patching.APPLIED) == 6
    assert cli.main([*model, "--revert", "--only", "03"]) == 0
    with pytest.raises(UserError, match="03_attention_mask_only"):
        patching.require_patched(folder)
    assert cli.main([*model, "--revert"]) == 0
    assert bytes_of(folder) == before
    assert cli.main([*model, "--revert"]) == 0
    assert "nothing to take back" in capsys.readouterr().err
    assert cli.main([*model, "--seq_length", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: seq_length is 0")


def test_source_edits_count_bytes_not_characters():
    source = Source("x = '深圳'; y = 1 + 2\n")
    node = source.tree.body[1].value
    assert source.replace_expression(node, "3").text == "x = '深圳'; y = 3\n"


@pytest.mark.parametrize(
    "text, told",
    [("", "not readable JSON"), ('{"a":', "not readable JSON"), ("null", "no object"), ("[]", "no object")],
)
def test_a_config_that_is_none_is_one_sentence(folder, text, told):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=told):
        patching.apply(folder, seq_length=64)
    assert not (folder / patching.RECORD).exists()


@pytest.mark.parametrize("value", [0, -1, True])
def test_a_trained_length_that_is_none_leaves_every_file_as_it_was(folder, value):
    config = json.loads((folder / "config.json").read_text()) | {"seq_length": value}
    (folder / "config.json").write_text(json.dumps(config))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="the trained length was needed"):
        patching.apply(folder, seq_length=64)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("change", [{"patches": 3}, {"seq_length": "64"}, {"files": {}}])
def test_a_record_that_is_none_is_one_sentence(folder, change):
    patching.apply(folder, seq_length=64)
    record = json.loads((folder / patching.RECORD).read_text())
    (folder / patching.RECORD).write_text(json.dumps(record | change))
    with pytest.raises(UserError, match="not a readable record"):
        patching.revert(folder)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a folder with a first-generation Qwen checkpoint"):
        patching.apply(tmp_path / "file")
