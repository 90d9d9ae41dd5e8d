"""Take the attention that is written out, not torch 2's fused one.

Torch 2's `F.scaled_dot_product_attention` could not be exported to ONNX when this was documented. Torch 2.11 can, but
in front of it Qwen builds a causal mask of its own: until November 2023 from an argument that an exported block does
not have (`'NoneType' object is not subscriptable`), since then with torch.tril, at which TPU-MLIR 1.30.2 stops
(convert_trilu_op: operand not found). Qwen's older path, `_attn`, is plain matrix products and a softmax: with
SUPPORT_TORCH2 off it is the one taken.

Recognises: the assignment to SUPPORT_TORCH2 at the top of the file, where each fused call stands under
`if … SUPPORT_TORCH2:`.
Not needed: in the revisions before October 2023, which do not call the fused attention.
"""

import ast

from helpers.patching.passages import MisfitError, NotNeededError, Source, calls, is_code

FILE = "modeling_qwen.py"


def change(source: Source) -> Source:
    fused = calls(source.tree, "scaled_dot_product_attention")
    under_switch = [
        call
        for branch in ast.walk(source.tree)
        if isinstance(branch, ast.If) and is_code(branch.test, "(.* and )?SUPPORT_TORCH2")
        for statement in branch.body
        for call in calls(statement, "scaled_dot_product_attention")
    ]
    switch = [s for s in source.tree.body if is_code(s, "SUPPORT_TORCH2 = .*")]
    if not fused:
        raise NotNeededError("this revision does not call torch's fused attention")
    if len(switch) != 1 or len(under_switch) != len(fused):
        raise MisfitError(f"fused attention that SUPPORT_TORCH2 does not switch off, {source.excerpt(fused[0])}")
    if is_code(switch[0], "SUPPORT_TORCH2 = False"):
        raise NotNeededError("SUPPORT_TORCH2 is False already")
    if not is_code(switch[0].value, r".*torch\.__version__\.split\('\.'\).*>= 2"):
        raise MisfitError(f"SUPPORT_TORCH2 is set in a way that is not known, {source.excerpt(switch[0])}")
    return source.comment_out(switch[0], switch[0], then=("SUPPORT_TORCH2 = False",))
