"""Let the attention mask that the caller gives be the only mask.

`_attn` cuts a causal mask out of a big triangular one, by the lengths of query and key, and puts the smallest number
there before it adds the caller's mask. In an exported net the caller's mask says everything, the causal part and the
padding too, and the key has a fixed length that says nothing about how many rows are filled. Without this an exported
block lacks the triangle (September and October 2023: `'NoneType' object is not subscriptable`), has one that is too
small for S + 1 keys (August), or makes it with torch.tril, at which TPU-MLIR 1.30.2 stops (from November on).

Recognises, in `QWenAttention._attn`: `attn_weights = torch.where(causal_mask, attn_weights, mask_value)`, under
`if causal_mask is not None` or not, with the statements before it that only prepare its arguments: the lengths, the cut
from `registered_causal_mask` or `self.bias`, and the mask value.
Beside that only what Qwen's published code does to the scores (helpers/patching/understood.py).
In the revisions up to 24 September 2023 `_attn` does not read the caller's mask at all: there it is added.

After it the file's own `QWenModel.forward` is no longer causal: only the blocks, with an explicit mask, are of use.
"""

from helpers.patching.masking import caller_mask_only
from helpers.patching.passages import Source
from helpers.patching.understood import check_scores

FILE = "modeling_qwen.py"


def change(source: Source) -> Source:
    check_scores(source)
    return caller_mask_only(source, source.required("QWenAttention", "_attn"))
