"""Which models are special cases of first-generation Qwen, and of what sizes they are.

A decoder with RMSNorm, rotary embedding over whole heads, SwiGLU, a bias on query, key and value and on nothing else,
as many heads for keys as for queries. What differs in anything else is refused, by the key or the tensor that says so.
"""

from dataclasses import dataclass

from helpers.convert.sources import Source
from helpers.errors import UserError

# What is read: ours, and after its kind in a GGUF, and on Hugging Face.
_SIZES = {
    "layers": ("block_count", "num_hidden_layers"),
    "hidden_size": ("embedding_length", "hidden_size"),
    "heads": ("attention.head_count", "num_attention_heads"),
    "kv_heads": ("attention.head_count_kv", "num_key_value_heads"),
    "inner": ("feed_forward_length", "intermediate_size"),
    "context": ("context_length", "max_position_embeddings"),
    "eps": ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    "rotary_base": ("rope.freq_base", "rope_theta"),
}
# What transformers takes where its config.json says nothing; of a GGUF only what llama.cpp does without.
_DEFAULTS = {"kv_heads": None, "rotary_base": 10000.0}, {"kv_heads": None, "rotary_base": 10000.0, "eps": 1e-6}

# What changes the function, and the one value that does not. "head": the size of a head.
_NEUTRAL = (
    {
        "expert_count": ("a mixture of experts", 0),
        "expert_used_count": ("a mixture of experts", 0),
        "rope.dimension_count": ("rotation of a part of each head", "head"),
        "rope.scaling.type": ("scaled rope", "none"),
        "rope.scaling.factor": ("scaled rope", 1.0),
        "rope.scale_linear": ("scaled rope", 1.0),
        "attention.key_length": ("heads that are not hidden size / number of heads wide", "head"),
        "attention.value_length": ("heads that are not hidden size / number of heads wide", "head"),
        "attention.sliding_window": ("sliding windows", 0),
        "attention.causal": ("attention to what comes later", True),
        "attn_logit_softcapping": ("soft caps", 0.0),
        "final_logit_softcapping": ("soft caps", 0.0),
    },
    {
        "hidden_act": ("another activation than SwiGLU's silu", "silu"),
        "attention_bias": ("a bias on attention's output", False),
        "mlp_bias": ("a bias in the MLP", False),
        "head_dim": ("heads that are not hidden size / number of heads wide", "head"),
        "partial_rotary_factor": ("rotation of a part of each head", 1.0),
        "use_sliding_window": ("sliding windows", False),
        "quantization_config": ("weights that are quantised", None),
    },
)
# Of a GGUF's other keys after its kind, those that say nothing about the function. The rest is refused.
_HARMLESS = {"vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "rope.scaling.original_context_length"}
_HARMLESS |= {"rope.scaling.finetuned"}


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model that is to be converted. inner: of one branch of SwiGLU. context: tokens it was trained for."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    inner: int
    context: int
    eps: float
    rotary_base: float
    vocab_size: int
    tied: bool


def understand(source: Source) -> Architecture:
    """The sizes of a model. Raises UserError where it is no special case of first-generation Qwen."""
    prefix = "" if source.column else f"{source.kind}."
    found = dict(_DEFAULTS[source.column])
    for name, keys in _SIZES.items():
        if (value := source.get(prefix + keys[source.column])) is not None:
            found[name] = value
    if source.column:
        found["rotary_base"] = _rotary_base(source, found["rotary_base"])
    found["kv_heads"] = found["kv_heads"] or found.get("heads")
    for name, keys in _SIZES.items():
        value = found.get(name)
        kinds = (int, float) if name in ("eps", "rotary_base") else (int,)
        if type(value) not in kinds or not value > 0:
            raise UserError(
                f"{source.file} says {prefix}{keys[source.column]} = {value!r}, one positive number was needed: "
                "download it again, or take a model whose layers are all alike."
            )
    if found["hidden_size"] % found["heads"] or found["heads"] % found["kv_heads"]:
        raise UserError(
            f"{source.file} says {found['hidden_size']} for the hidden size, {found['heads']} heads and "
            f"{found['kv_heads']} for keys: each was needed to be a multiple of the next; download it again."
        )
    _refuse_what_differs(source, prefix, found)
    if source.column:
        rows, tied = source.get("vocab_size"), source.get("tie_word_embeddings") is True
    else:
        rows = source.tensors.get("token_embd.weight", (None, (None,)))[1][0]
        tied = "output.weight" not in source.tensors
    if type(rows) is not int or rows < 1:
        raise UserError(f"{source.file} does not say for how many tokens it is: a whole language model was needed.")
    return Architecture(**found, vocab_size=rows, tied=tied)


def _rotary_base(source: Source, default: float) -> object:
    """Of config.json as transformers 5 writes it, or before. Raises UserError for a rope that is scaled."""
    base = default
    for key in ("rope_scaling", "rope_parameters"):
        said = source.get(key)
        if said is None:
            continue
        kind = said.get("rope_type", said.get("type", "default")) if isinstance(said, dict) else None
        if kind != "default" or said.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused(source, key, said, "scaled rope")
        base = said.get("rope_theta", base)
    return base


def _refuse_what_differs(source: Source, prefix: str, found: dict) -> None:
    head = found["hidden_size"] // found["heads"]
    for key, (what, neutral) in _NEUTRAL[source.column].items():
        value = source.get(prefix + key)
        if value is not None and value != (head if neutral == "head" else neutral):
            if key == "attention.sliding_window" and type(value) is int and value >= found["context"]:
                continue  # as wide as all that it was trained for
            raise _refused(source, prefix + key, value, what)
    if any(kind != "full_attention" for kind in source.get("layer_types") or ()):
        raise _refused(source, "layer_types", source.get("layer_types"), "sliding windows")
    if not source.column:
        known = {keys[0] for keys in _SIZES.values()} | _NEUTRAL[0].keys() | _HARMLESS
        for key in source.fields:
            if key.startswith(prefix) and key.removeprefix(prefix) not in known:
                raise _refused(source, key, source.get(key), "something that is not known here")


def _refused(source: Source, key: str, value: object, what: str) -> UserError:
    shown = repr(value)
    return UserError(
        f"{source.file} says {key} = {shown[:80]}{'…' * (len(shown) > 80)}: {what}, which first-generation Qwen does "
        "not have, so the model cannot become one exactly; take one without."
    )
