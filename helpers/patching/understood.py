"""The statements of Qwen's attention that the patches rely on: known ones in their known order, and no others.

A patched block is padded and is given its rotation and its mask. That leaves its outputs as they were only where query,
key, value and mask go the way that Qwen's published code sends them. A statement that touches them and is not in these
lists is refused, whatever it does.
"""

import ast
import re
from collections.abc import Iterator

from helpers.patching.passages import MisfitError, Source, calls, is_code, names

# What conditions are in an exported net, which has none of these options and one rotation.
_CONDITIONS = dict.fromkeys(
    ("self.use_cache_quantization", "self.use_cache_kernel", "self.use_flash_attn", "SUPPORT_TORCH2"), False
) | {"len(rotary_pos_emb_list) == 1": True}

# What a block only hands on to its attention, and what patch 07 puts before that.
_HANDED_ON = {"layer_past", "attention_mask", "rotary_pos_emb", "rotary_pos_emb_list"}
_ROTATION_FROM_LIST = r"if rotary_pos_emb_list is not None:\s+rotary_pos_emb = rotary_pos_emb_list\[0\]"

# One row is one statement, or the head of a compound one, in normal form; it may come several times in a row. Rows
# that some revision lacks begin with "? ".
_PROJECTION = r"""
mixed_x_layer = self\.c_attn\(hidden_states\)
\(?query, key, value\)? = mixed_x_layer\.split\(self\.split_size, dim=2\)
(query|key|value) = self\._split_heads\(\1, self\.num_heads, self\.head_dim\)
"""
_LENGTH = r"""
? kv_seq_len = hidden_states\.size\(\)\[1\]
? if layer_past
? kv_seq_len \+= layer_past\[0\]\.shape\[1\]
? if self\.use_dynamic_ntk and kv_seq_len == hidden_states\.size\(\)\[1\].*
? (context_value|ntk_alpha|self\._ntk_cached) = .*
"""
_ROTATION_GIVEN = r"""
if (rotary_pos_emb_list|rotary_pos_emb) is not None
cur_len = query\.shape\[1\]
? rotary_pos_emb = rotary_pos_emb_list\[0\]
rotary_pos_emb = \[i\[:, -cur_len:, :, :\] for i in rotary_pos_emb(_list\[0\])?\]
? rotary_pos_emb = \(rotary_pos_emb,\) \* 2
? \(?q_pos_emb, k_pos_emb\)? = rotary_pos_emb
query = apply_rotary_pos_emb\(query, (q|rotary)_pos_emb\)
key = apply_rotary_pos_emb\(key, (k|rotary)_pos_emb\)
"""
_ROTATION_OWN = r"""
rotary_pos_emb = self\.rotary_emb\(kv_seq_len, ntk_alpha=ntk_alpha\)\.to\(hidden_states\.device\)
if rotary_pos_emb is not None
if isinstance\(rotary_pos_emb, tuple\)
rotary_pos_emb = (rotary_pos_emb|\(rotary_pos_emb,\) \* 2)
if rotary_pos_emb is not None
\(?q_pos_emb, k_pos_emb\)? = rotary_pos_emb
cur_len = query\.shape\[1\]
(q|k)_pos_emb = \1_pos_emb\[:, -cur_len:, :, :\]
? if rotary_pos_emb_list is not None
? \(?cos, sin\)? = rotary_pos_emb_list\[0\]
? (query|key) = \(\1\.float\(\) \* cos \+ _rotate_half\(\1\.float\(\)\) \* sin\)\.type_as\(\1\)
query = apply_rotary_pos_emb\(query, q_pos_emb\)
key = apply_rotary_pos_emb\(key, k_pos_emb\)
"""
_ATTENTION = r"""
? if use_cache
? present = (\(key, value\)|None)
if layer_past is not None
\(?past_key, past_value\)? = \(?layer_past\[0\], layer_past\[1\]\)?
(key|value) = torch\.cat\(\(past_\1, \1\), dim=1\)
? if use_cache
? present = (\(key, value\)|None)
? key_size = .*key\.size\(1\)
? if (key_size > self\.seq_length and )?self\.use_logn_attn( and \(?not self\.training\)?)?
? if self\.logn_tensor\.device != query\.device.*
? self\.logn_tensor = self\.logn_tensor\.to\(query\.device\)\.type_as\(query\)
? (seq_start|seq_end) = key\.size\([01]\)( - query\.size\([01]\))?
? logn_tensor = self\.logn_tensor\[:, seq_start:seq_end, :, :\](\.type_as\(query\))?
? query = query \* logn_tensor\.expand_as\(query\)
? key_size = .*key\.size\(1\)
? if query\.size\(1\) == key_size
? (registered_)?causal_mask = (None|torch\.tril\(.*\)\.view\(.*\))
(query|key|value) = \1\.permute\(0, 2, 1, 3\)
\(?attn_output, attn_weight\)? = self\._attn\(query, key, value, (\w*causal_mask, )?attention_mask, head_mask\)
context_layer = self\._merge_heads\(attn_output, self\.num_heads, self\.head_dim\)
attn_output = self\.c_proj\(context_layer\)
outputs = \(attn_output, present\)
? if output_attentions
? outputs \+= \(attn_weight,\)
return outputs
"""
_SCORES = r"""
? device = query\.device
attn_weights = torch\.matmul\(query, key\.transpose\(-1, -2\)\)
? if self\.scale_attn_weights
? size_temp = value\.size\(-1\)
attn_weights = attn_weights / .*
? \(?query_length, key_length\)? = .*
? causal_mask = .*
? mask_value = .*
? if causal_mask is not None
? attn_weights = torch\.where\(causal_mask, .*\)
? if attention_mask is not None
? attn_weights = attn_weights \+ attention_mask
? if self\.softmax_in_fp32
attn_weights = nn\.functional\.softmax\(attn_weights(\.float\(\))?, dim=-1\)
attn_weights = attn_weights\.type\((query|value)\.dtype\)
attn_weights = self\.attn_dropout\(attn_weights\)
? if head_mask is not None
? attn_weights = attn_weights \* head_mask
attn_output = torch\.matmul\(attn_weights, value\)
attn_output = attn_output\.transpose\(1, 2\)
return \(?attn_output, attn_weights\)?
"""


def check_forward(source: Source) -> None:
    """Raise MisfitError unless query, key, value and mask go through QWenAttention.forward as published."""
    forward = source.required("QWenAttention", "forward")
    own = calls(forward, "rotary_emb")
    _check(source, forward, _PROJECTION + _LENGTH + (_ROTATION_OWN if own else _ROTATION_GIVEN) + _ATTENTION)
    turn = source.required("apply_rotary_pos_emb")
    if not own and not any(is_code(s, r"\(?cos, sin\)? = freqs") for s in ast.walk(turn)):
        raise MisfitError(f"a rotation that is not given as its cosine and sine, {source.excerpt(turn)}")


def check_scores(source: Source) -> None:
    """Raise MisfitError unless QWenAttention._attn does to the scores what the published code does; not of the mask."""
    _check(source, source.required("QWenAttention", "_attn"), _SCORES)


def check_block(source: Source) -> None:
    """Raise MisfitError unless QWenBlock.forward hands past, mask and rotation on to its attention as they are."""
    block = source.required("QWenBlock", "forward")
    attention = calls(block, "attn")
    patched = [s for s in block.body if is_code(s, _ROTATION_FROM_LIST)]
    given = _HANDED_ON & {a.arg for a in block.args.args} - names(*patched)
    passed = [a for call in attention for a in (*call.args, *(k.value for k in call.keywords if k.arg in given))]
    uses = [n for s in block.body if s not in patched for n in ast.walk(s) if isinstance(n, ast.Name) and n.id in given]
    for use in uses:
        if use not in passed:
            raise MisfitError(f"the block does more with {use.id} than hand it on, {source.excerpt(use)}")
    if len(attention) != 1 or given - {use.id for use in uses}:
        raise MisfitError(f"the block does not hand on {', '.join(sorted(given))}, {source.excerpt(block)}")


def _check(source: Source, function: ast.FunctionDef, table: str) -> None:
    rows = [(line.startswith("? "), line.removeprefix("? ")) for line in table.splitlines() if line]
    words = set(re.findall(r"self\.\w+|\w+", table.replace("\\", ""))) - {"self"}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    local = {a.arg for a in function.args.args} | stored
    place, unknown, left_out = -1, [], None
    for statement, code in _running(function.body):
        row = next((i for i in range(max(place, 0), len(rows)) if re.fullmatch(rows[i][1], code)), None)
        if row is not None:
            if not all(optional for optional, _ in rows[place + 1 : row]):
                left_out = left_out or statement
            place = row
        elif any(name in local or name.startswith("self.") for name in names(statement) & words):
            unknown.append(f"\n    line {statement.lineno}: {source.lines[statement.lineno - 1].strip()}")
    where = f"QWenAttention.{function.name}"
    if unknown:
        raise MisfitError(f"{where} has statements on query, key, value or mask that are not known:{''.join(unknown)}")
    if left_out:
        raise MisfitError(f"{where} leaves out a step of the published code before {source.excerpt(left_out)}")


def _running(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """The statements that run in an exported net, one by one, each with its code; of an `if` its head comes first."""
    for statement in body:
        if not isinstance(statement, ast.If):
            yield statement, ast.unparse(statement)
            continue
        result = _result(statement.test)
        if result is None:
            yield statement, f"if {ast.unparse(statement.test)}"
        yield from _running(statement.body if result is not False else [])
        yield from _running(statement.orelse if result is not True else [])


def _result(test: ast.expr) -> bool | None:
    """What a condition is in an exported net; None where that is not known."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return {True: False, False: True}.get(_result(test.operand))
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) and False in map(_result, test.values):
        return False
    return _CONDITIONS.get(ast.unparse(test))
