"""The same for the attention that computes in float32: the caller's mask is the only one.

`_upcast_and_reordered_attn` is the second copy of the attention and carries the same causal mask. No public revision
of `forward` calls it, so no exported net depends on this; it is changed, as documented, so that the two copies go on
meaning the same.

Recognises: the same passage as patch 03, in `QWenAttention._upcast_and_reordered_attn`.
Not needed: from 14 November 2023 on, when Qwen dropped that method.
"""

from helpers.patching.masking import caller_mask_only
from helpers.patching.passages import NotNeededError, Source

FILE = "modeling_qwen.py"


def change(source: Source) -> Source:
    function = source.function("QWenAttention", "_upcast_and_reordered_attn")
    if function is None:
        raise NotNeededError("this revision has no _upcast_and_reordered_attn")
    return caller_mask_only(source, function)
