"""Divide the attention scores by a number, not by a tensor made while running.

`torch.full([], …)` makes the divisor a tensor, so that the exported graph fills a tensor (ConstantOfShape, Add) before
it divides; shape inference over that failed when the documentation was written. With torch 2.11 and TPU-MLIR 1.30.2 it
passes, and the front end folds it away: the compiled block is the same, cycle for cycle. The patch stays for the
graph's sake, which then says a number where a number is meant.

Recognises: `attn_weights / torch.full([], X ** 0.5, …)` in `QWenAttention._attn`, whatever X is.
Not needed: from the end of November 2023 on, when Qwen changed it so itself.
"""

import ast

from helpers.patching.passages import MisfitError, NotNeededError, Source, is_code

FILE = "modeling_qwen.py"


def change(source: Source) -> Source:
    attention = source.required("QWenAttention", "_attn")
    divisions = [n for n in ast.walk(attention) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)]
    if len(divisions) != 1 or not is_code(divisions[0].left, "attn_weights"):
        raise MisfitError(f"not one division of attn_weights, {source.excerpt(attention)}")
    divisor = divisions[0].right
    if is_code(divisor, r"[\w.()-]+ \*\* 0\.5"):
        raise NotNeededError("this revision divides by a number already")
    if not is_code(divisor, r"torch\.full\(\[\], [\w.()-]+ \*\* 0\.5, dtype=.*, device=.*\)"):
        raise MisfitError(f"a divisor that is not known, {source.excerpt(divisions[0])}")
    return source.replace_expression(divisor, f"({ast.unparse(divisor.args[1])})")
