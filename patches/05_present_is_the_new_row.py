"""Return only the new rows of key and value, not the whole cache again.

`present` is taken after the past has been joined in front of the new key and value, so a decode step would hand back
all S + 1 rows of every layer's cache to have one row stored: 269 MB a token for 7B at S = 512. Taken before, it is the
new row alone, and the caller writes it in its place.

Recognises, in `QWenAttention.forward`: `if use_cache: present = (key, value) else: present = None` right after
`if layer_past is not None: …`. It is moved in front of it. Nothing else may be done to query, key, value or mask in
`forward` than Qwen's published code does (helpers/patching/understood.py): a row of the cache is final once
it is returned.

After it the file's own `QWenModel.forward` can no longer decode: only the blocks, with a cache outside, are of use.
"""

from helpers.patching.passages import MisfitError, NotNeededError, Source, is_code
from helpers.patching.understood import check_forward

FILE = "modeling_qwen.py"


def change(source: Source) -> Source:
    check_forward(source)
    forward = source.required("QWenAttention", "forward")
    present = r"if use_cache:\s+present = \(key, value\)\s+else:\s+present = None"
    takes = [i for i, s in enumerate(forward.body) if is_code(s, present)]
    joins = [i for i, s in enumerate(forward.body) if is_code(s, r"if layer_past is not None:.*torch\.cat.*")]
    if len(takes) != 1 or len(joins) != 1:
        raise MisfitError(f"`present` and the joining of the past are not each there once, {source.excerpt(forward)}")
    (take,), (join,) = takes, joins
    if take < join:
        raise NotNeededError("present is taken before the past is joined already")
    if take != join + 1:
        raise MisfitError(
            f"something stands between the joining of the past and `present`, "
            f"{source.excerpt(forward.body[join + 1], forward.body[take])}"
        )
    moved = forward.body[take]
    return source.replace(moved, moved, []).insert_before(forward.body[join], source.lines_of(moved, moved))
