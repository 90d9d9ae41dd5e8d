"""Let the caller give the rotation, in the revisions where a block makes its own. (Not in the documented list.)

An exported decode step always sees S rows of past, so a block that takes its position from the length of the past
would turn every new token by position S. From 24 September 2023 on a block is handed the cosine and sine of the right
positions as `rotary_pos_emb_list=[[cos, sin]]`; this gives the same argument to the blocks before that.

Recognises: `QWenBlock.forward` with an argument `rotary_pos_emb` (one revision of 24 September 2023), or with none and
`query = apply_rotary_pos_emb(query, …)`, `key = apply_rotary_pos_emb(key, …)` in `QWenAttention.forward` (August 2023).
The block may do nothing with past, mask and rotation but hand them on (helpers/patching/understood.py).
Not needed: in all later revisions. Without the new argument the code does what it did before.
"""

import ast

from helpers.patching.passages import MisfitError, NotNeededError, Source, body_with, calls, is_code
from helpers.patching.understood import check_block

FILE = "modeling_qwen.py"
ARGUMENT = "rotary_pos_emb_list"


def change(source: Source) -> Source:
    source.required("QWenAttention", "forward")
    check_block(source)
    arguments = {a.arg for a in source.required("QWenBlock", "forward").args.args}
    if ARGUMENT in arguments:
        raise NotNeededError("a block is given its rotation already")
    if "rotary_pos_emb" in arguments:
        source = _with_argument(source, "QWenBlock")
        first = source.required("QWenBlock", "forward").body[0]
        return source.insert_before(first, [f"if {ARGUMENT} is not None:", f"    rotary_pos_emb = {ARGUMENT}[0]"])
    return _rotate_by_argument(_pass_on(_with_argument(_with_argument(source, "QWenBlock"), "QWenAttention")))


def _with_argument(source: Source, owner: str) -> Source:
    last = source.required(owner, "forward").args.defaults[-1]
    return source.replace_expression(last, f"{ast.unparse(last)},{source.newline}        {ARGUMENT}=None")


def _pass_on(source: Source) -> Source:
    attention = calls(source.required("QWenBlock", "forward"), "attn")
    if len(attention) != 1 or not attention[0].keywords:
        raise MisfitError(f"not one call of self.attn, {source.excerpt(source.required('QWenBlock', 'forward'))}")
    value = attention[0].keywords[-1].value
    return source.replace_expression(value, f"{ast.unparse(value)}, {ARGUMENT}={ARGUMENT}")


def _rotate_by_argument(source: Source) -> Source:
    forward = source.required("QWenAttention", "forward")
    pair = [
        s
        for s in ast.walk(forward)
        if isinstance(s, ast.Assign) and is_code(s, r"(query|key) = apply_rotary_pos_emb\(\1, [qk]_pos_emb\)")
    ]
    pair.sort(key=lambda s: s.lineno)
    if len(pair) != 2 or source.function("_rotate_half") is None:
        raise MisfitError(f"not one rotation of query and key, {source.excerpt(forward)}")
    block = body_with(forward, pair[0])
    if block.index(pair[0]) + 1 != block.index(pair[1]):
        raise MisfitError(f"the rotations of query and key are apart, {source.excerpt(*pair)}")
    new = [f"if {ARGUMENT} is not None:", f"    cos, sin = {ARGUMENT}[0]"]
    for x in ("query", "key"):
        new.append(f"    {x} = ({x}.float() * cos + _rotate_half({x}.float()) * sin).type_as({x})")
    return source.replace(*pair, [*new, "else:", *(f"    {line}" for line in source.lines_of(*pair))])
