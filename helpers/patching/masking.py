"""The causal mask inside Qwen's attention: finding it and taking it out (patches 03 and 04)."""

import ast

from helpers.patching.passages import MisfitError, NotNeededError, Source, calls, is_code, names

# What may stand in the passage, in normal form. Anything else is not known and is refused.
_MASKING = (
    r"attn_weights = torch\.where\(causal_mask, attn_weights(\.to\(attn_weights\.dtype\))?, mask_value\)",
    r"if causal_mask is not None:\s+attn_weights = torch\.where\(causal_mask, attn_weights.*, mask_value\)",
)
_LENGTHS = r"\(?query_length, key_length\)? = \(?query\.size\(-2\), key(\[0\])?\.size\(-2\)\)?"
_PREPARATION = (
    _LENGTHS,
    rf"if self\.use_cache_quantization:\s+{_LENGTHS}\s+else:\s+{_LENGTHS}",
    r"causal_mask = (registered_causal_mask|self\.bias)"
    r"\[:, :, key_length - query_length:key_length, :key_length\]",
    r"mask_value = torch\.finfo\(attn_weights\.dtype\)\.min",
    r"mask_value = torch\.(full\(\[\], |tensor\()mask_value, dtype=attn_weights\.dtype\)\.to\(attn_weights\.device\)",
)
_ADDITION = r"if attention_mask is not None:\s+attn_weights = attn_weights \+ attention_mask"
_ONLY_FOR_THE_MASK = {"causal_mask", "registered_causal_mask", "self.bias", "mask_value", "query_length", "key_length"}


def caller_mask_only(source: Source, function: ast.FunctionDef) -> Source:
    """Comment out the causal mask of an attention function; add the caller's mask where it is not added.

    Raises NotNeededError where there is no such mask, MisfitError where it is not one of the known ones.
    """
    body = function.body
    adds = [s for s in body if is_code(s, _ADDITION)]
    masks = [i for i, s in enumerate(body) if any(is_code(s, form) for form in _MASKING)]
    if not masks:
        if _ONLY_FOR_THE_MASK & names(*body) or calls(function, "where") or calls(function, "masked_fill") or not adds:
            raise MisfitError(f"a mask that is not known, {_mask_excerpt(source, function)}")
        raise NotNeededError("the caller's mask is the only one already")
    last = first = masks[-1]
    while first > 0 and any(is_code(body[first - 1], form) for form in _PREPARATION):
        first -= 1
    left_over = _ONLY_FOR_THE_MASK & names(*body[:first], *body[last + 1 :])
    if len(masks) != 1 or left_over or calls(function, "masked_fill") or len(calls(function, "where")) != 1:
        raise MisfitError(f"a causal mask with more to it than is known, {_mask_excerpt(source, function)}")
    then = () if adds else ("if attention_mask is not None:", "    attn_weights = attn_weights + attention_mask")
    return source.comment_out(body[first], body[last], then=then)


def _mask_excerpt(source: Source, function: ast.FunctionDef) -> str:
    """The statements that have to do with the mask, from the first to the last of them."""
    about = [s for s in function.body if (_ONLY_FOR_THE_MASK | {"attention_mask"}) & names(s)]
    return source.excerpt(about[0], about[-1]) if about else source.excerpt(function)
