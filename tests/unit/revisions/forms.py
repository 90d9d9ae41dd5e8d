"""Code of our own with the passages of each public revision of Qwen's modeling_qwen.py.

Qwen's file exists in many revisions. Where they differ for the patches is in a handful of passages; a `Form` says
which of them a revision has, and `write` makes the smallest module with them that runs. What is not a passage (the
MLP, the norms, the rotation) is written here in our own way. README.md lists the real revisions of each form.
"""

from dataclasses import dataclass
from pathlib import Path

from tests.unit.revisions import blocks


@dataclass(frozen=True)
class Form:
    """The passages of one group of revisions.

    mask: where the causal mask comes from: "buffer" (self.bias), "argument" (registered_causal_mask), "made" (the same
    name, made in forward), "optional" (causal_mask, made in forward for a prefill, None in decoding).
    rotation: "own" (from the length of the past), "pair" ([cos, sin]) or "list" ([[cos, sin]]); of the FOREIGN forms
    "tuple" (one pair for the query, one for the key, or both in a tuple) and "indexed" (whole tables, cut at cur_len).
    edits_rows: forward makes each two neighbouring tokens share a row of key and value.
    parts: what QWenModel has beside its blocks, "audio" or "visual".
    """

    mask: str
    rotation: str = "list"
    reads_attention_mask: bool = True
    cache_quantization: bool = False
    upcast: bool = True
    tensor_scale: bool = True
    fused: bool = False
    fused_mask_is_lost: bool = False
    edits_rows: bool = False
    parts: tuple[str, ...] = ()


FORMS = {
    "2023-08": Form(mask="buffer", rotation="own", reads_attention_mask=False),
    "2023-08-with-mask": Form(mask="buffer", rotation="own"),
    "2023-09-24-first": Form(mask="argument", rotation="pair", reads_attention_mask=False),
    "2023-09-24": Form(mask="argument"),
    "2023-09-25": Form(mask="argument", cache_quantization=True),
    "2023-10-14": Form(mask="argument", cache_quantization=True, fused=True),
    "2023-11-14": Form(mask="made", cache_quantization=True, fused=True, upcast=False),
    "2023-11-30": Form(
        mask="optional",
        cache_quantization=True,
        fused=True,
        upcast=False,
        tensor_scale=False,
        fused_mask_is_lost=True,
    ),
    "2023-12": Form(mask="optional", cache_quantization=True, fused=True, upcast=False, tensor_scale=False),
}

# Models made from Qwen whose blocks do not mean what the patches rely on: README.md says which real ones.
FOREIGN = {
    "codefuse-tuple": Form(mask="none", rotation="tuple", upcast=False),
    "codefuse-indexed": Form(mask="none", rotation="indexed", upcast=False),
    "edited-rows": Form(mask="optional", fused=True, upcast=False, tensor_scale=False, edits_rows=True),
    "qwen-vl": Form(mask="always", rotation="pair", upcast=False, parts=("visual",)),
}
QWEN_AUDIO = Form(mask="made", cache_quantization=True, fused=True, upcast=False, parts=("audio",))

CONFIGURATION = """\
class QWenConfig:
    softmax_in_fp32 = False

    def __init__(self, **settings):
        self.__dict__.update(settings)
"""

HEAD = """\
import math

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_qwen import QWenConfig
"""

SWITCH = """
SUPPORT_TORCH2 = hasattr(torch, '__version__') and int(torch.__version__.split(".")[0]) >= 2
"""

PLAIN_PARTS = """

def _rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


{apply_rotary}


class RotaryEmbedding(nn.Module):
    def __init__(self, width, base):
        super().__init__()
        self.register_buffer("speed", base ** -(torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, length, ntk_alpha=1.0):
        return torch.outer(torch.arange(length), self.speed).repeat(1, 2)[None, :, None, :]


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenPreTrainedModel(nn.Module):
    pass


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.split_size = config.hidden_size
        self.rotary_emb = RotaryEmbedding(self.head_dim, base=config.rotary_emb_base)
        self.attn_dropout = nn.Dropout(config.attn_dropout_prob)
        self.seq_length = config.seq_length
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scale_attn_weights = True
        self.use_logn_attn = config.use_logn_attn
        logn = [math.log(i, self.seq_length) if i > self.seq_length else 1 for i in range(1, 256)]
        self.register_buffer("logn_tensor", torch.tensor(logn)[None, :, None, None], persistent=False)
        positions = config.max_position_embeddings
        triangle = torch.tril(torch.ones((positions, positions), dtype=torch.bool))
        self.register_buffer("bias", triangle[None, None], persistent=False)
        self.use_cache_quantization = False

    def _split_heads(self, tensor, num_heads, attn_head_size):
        return tensor.view(tensor.shape[:-1] + (num_heads, attn_head_size))

    def _merge_heads(self, tensor, num_heads, attn_head_size):
        return tensor.contiguous().flatten(2)
"""

APPLY_ROTARY = {
    "own": """\
def apply_rotary_pos_emb(t, freqs):
    return (t.float() * freqs.cos() + _rotate_half(t.float()) * freqs.sin()).type_as(t)
""",
    "given": """\
def apply_rotary_pos_emb(t, freqs):
    cos, sin = freqs
    return (t.float() * cos + _rotate_half(t.float()) * sin).type_as(t)
""",
}

SCALE = {
    True: """\
            attn_weights = attn_weights / torch.full(
                [],
                {size} ** 0.5,
                dtype=attn_weights.dtype,
                device=attn_weights.device,
            )
""",
    False: """\
            attn_weights = attn_weights / ({size} ** 0.5)
""",
}

LENGTHS = """\
        query_length, key_length = query.size(-2), key.size(-2)
"""
LENGTHS_QUANTIZED = """\
        if self.use_cache_quantization:
            query_length, key_length = query.size(-2), key[0].size(-2)
        else:
            query_length, key_length = query.size(-2), key.size(-2)
"""
CUT = """\
        causal_mask = {triangle}[
            :, :, key_length - query_length : key_length, :key_length
        ]
"""
MASK_VALUE = """\
        mask_value = torch.finfo(attn_weights.dtype).min
"""
OPTIONAL_MASK = """\
        if causal_mask is not None:
            attn_weights = torch.where(
                causal_mask, attn_weights.to(attn_weights.dtype), mask_value
            )
"""
ALWAYS_MASK = """\
        mask_value = torch.full([], mask_value, dtype=attn_weights.dtype).to(
            attn_weights.device
        )
        attn_weights = torch.where(
            causal_mask, attn_weights.to(attn_weights.dtype), mask_value
        )
"""
UPCAST_MASK = """\
        mask_value = torch.tensor(mask_value, dtype=attn_weights.dtype).to(
            attn_weights.device
        )
        attn_weights = torch.where(causal_mask, attn_weights, mask_value)
"""
ADD_MASK = """\
        if attention_mask is not None:
            attn_weights = attn_weights + attention_mask
"""

FUSED_CUT = """\
causal_mask = registered_causal_mask[
    :, :, key.size(-2) - query.size(-2): key.size(-2), :key.size(-2)
]
"""
FUSED_MASKS = {
    "registered": """\
if attention_mask is not None:
    attention_mask = attention_mask.expand(
        -1, -1, causal_mask.size(2), -1
    ).masked_fill(~causal_mask, torch.finfo(query.dtype).min)
""",
    "optional": """\
if attention_mask is not None:
    attention_mask = attention_mask.expand(-1, -1, query.size(2), -1)
    if causal_mask is not None:
        attention_mask = attention_mask.masked_fill(~causal_mask, torch.finfo(query.dtype).min)
""",
    "lost": """\
if attention_mask is not None:
    attention_mask = attention_mask.expand(
        -1, -1, causal_mask.size(2), -1
    )
    if causal_mask is not None:
        attention_mask.masked_fill(~causal_mask, torch.finfo(query.dtype).min)
""",
}
FUSED = """\
else:
    attention_mask = causal_mask
attn_output = F.scaled_dot_product_attention(
    query, key, value, attn_mask=attention_mask
).transpose(1, 2)
"""

BLOCK = """

class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        hidden_states,
{parameters}        use_cache=False,
        output_attentions=False,
    ):
        outputs = self.attn(
            self.ln_1(hidden_states),
{passed}            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        hidden_states = outputs[0] + hidden_states
        hidden_states = hidden_states + self.mlp(self.ln_2(hidden_states))
        return (hidden_states,) + outputs[1:]
"""


MODEL = """

class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__()
        self.h = nn.ModuleList([QWenBlock(config)])
"""

EDITED_ROWS = """\
        def in_pairs(rows):
            even = rows.shape[1] // 2 * 2
            mean = (rows[:, :even:2] + rows[:, 1:even:2]) / 2
            return torch.cat((mean.repeat_interleave(2, dim=1), rows[:, even:]), dim=1)

        key = in_pairs(key)
        value = in_pairs(value)
"""


def source(form: Form) -> str:
    """The text of a modeling_qwen.py of this form."""
    turned_by = "own" if form.rotation in ("own", "indexed") else "given"
    parts = PLAIN_PARTS.replace("{apply_rotary}", APPLY_ROTARY[turned_by].strip())
    model = MODEL if form.parts else ""
    model += "".join(f"        self.{part} = nn.Identity()\n" for part in form.parts)
    return "".join(
        [HEAD, SWITCH if form.fused else "", parts, _attn(form), _upcast(form), _forward(form), _block(form), model]
    )


def write(form: Form, folder: Path) -> Path:
    """Make a folder with the module, its configuration class and a config.json for one small layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modeling_qwen.py").write_text(source(form))
    (folder / "configuration_qwen.py").write_text(CONFIGURATION)
    blocks.make_small(folder)
    return folder


def _mask_name(form: Form) -> str | None:
    return {"argument": "registered_causal_mask", "made": "registered_causal_mask", "optional": "causal_mask"}.get(
        form.mask
    )


def _arguments(form: Form) -> str:
    mask = _mask_name(form)
    return f"query, key, value, {mask + ', ' if mask else ''}attention_mask"


def _masking(form: Form, last: str) -> str:
    if form.mask in ("none", "always"):
        return LENGTHS if form.mask == "always" else ""
    if form.mask == "optional":
        return MASK_VALUE + OPTIONAL_MASK
    triangle = "self.bias" if form.mask == "buffer" else "registered_causal_mask"
    quantized = form.cache_quantization and last is ALWAYS_MASK
    return (LENGTHS_QUANTIZED if quantized else LENGTHS) + CUT.format(triangle=triangle) + MASK_VALUE + last


def _attn(form: Form) -> str:
    size = "size_temp" if form.cache_quantization else "value.size(-1)"
    branches = """\
            if self.use_cache_quantization:
                size_temp = value[0].size(-1)
            else:
                size_temp = value.size(-1)
"""
    return (
        f"""
    def _attn(self, {_arguments(form)}=None, head_mask=None):
        attn_weights = torch.matmul(query, key.transpose(-1, -2))

        if self.scale_attn_weights:
"""
        + (branches if form.cache_quantization else "")
        + SCALE[form.tensor_scale].format(size=size)
        + _masking(form, ALWAYS_MASK)
        + ("        attn_weights = attn_weights + attention_mask\n" if form.mask == "always" else "")
        + ("\n" + ADD_MASK if form.reads_attention_mask and form.mask != "always" else "")
        + """
        attn_weights = nn.functional.softmax(attn_weights, dim=-1)
        attn_weights = attn_weights.type(query.dtype)
        attn_weights = self.attn_dropout(attn_weights)
        attn_output = torch.matmul(attn_weights, value)
        attn_output = attn_output.transpose(1, 2)
        return attn_output, attn_weights
"""
    )


def _upcast(form: Form) -> str:
    if not form.upcast:
        return ""
    return (
        f"""
    def _upcast_and_reordered_attn(self, {_arguments(form)}=None, head_mask=None):
        attn_weights = torch.matmul(query.float(), key.float().transpose(-1, -2)) * float(value.size(-1)) ** -0.5
"""
        + _masking(form, UPCAST_MASK)
        + "\n"
        + ADD_MASK
        + """
        attn_weights = torch.softmax(attn_weights, dim=-1).type(value.dtype)
        return torch.matmul(attn_weights, value), attn_weights
"""
    )


def _parameters(form: Form) -> list[str]:
    names = {
        "own": [],
        "pair": ["rotary_pos_emb"],
        "list": ["rotary_pos_emb_list"],
        "tuple": ["rotary_pos_emb"],
        "indexed": ["rotary_pos_emb", "cur_len"],
    }[form.rotation]
    return names + (["registered_causal_mask"] if form.mask == "argument" else []) + ["layer_past", "attention_mask"]


ROTATIONS = {
    "own": """\
        kv_seq_len = hidden_states.size()[1]
        if layer_past:
            kv_seq_len += layer_past[0].shape[1]
        ntk_alpha = 1.0
        rotary_pos_emb = self.rotary_emb(kv_seq_len, ntk_alpha=ntk_alpha).to(hidden_states.device)

        if rotary_pos_emb is not None:
            if isinstance(rotary_pos_emb, tuple):
                rotary_pos_emb = rotary_pos_emb
            else:
                rotary_pos_emb = (rotary_pos_emb,) * 2

        if rotary_pos_emb is not None:
            q_pos_emb, k_pos_emb = rotary_pos_emb
            cur_len = query.shape[1]
            q_pos_emb = q_pos_emb[:, -cur_len:, :, :]
            k_pos_emb = k_pos_emb[:, -cur_len:, :, :]
            query = apply_rotary_pos_emb(query, q_pos_emb)
            key = apply_rotary_pos_emb(key, k_pos_emb)
""",
    "tuple": """\
        if rotary_pos_emb is not None:
            if isinstance(rotary_pos_emb, tuple):
                rotary_pos_emb = rotary_pos_emb
            else:
                rotary_pos_emb = (rotary_pos_emb,) * 2

        if rotary_pos_emb is not None:
            query = apply_rotary_pos_emb(query, rotary_pos_emb)
            key = apply_rotary_pos_emb(key, rotary_pos_emb)
""",
    "indexed": """\
        if rotary_pos_emb is not None:
            if isinstance(rotary_pos_emb, tuple):
                rotary_pos_emb = rotary_pos_emb
            else:
                rotary_pos_emb = (rotary_pos_emb,) * 2

        if rotary_pos_emb is not None:
            q_pos_emb, k_pos_emb = rotary_pos_emb
            q_pos_emb = q_pos_emb[:, cur_len, :, :]
            k_pos_emb = k_pos_emb[:, cur_len, :, :]
            query = apply_rotary_pos_emb(query, q_pos_emb)
            key = apply_rotary_pos_emb(key, k_pos_emb)
""",
    "pair": """\
        if rotary_pos_emb is not None:
            cur_len = query.shape[1]
            rotary_pos_emb = [i[:, -cur_len:, :, :] for i in rotary_pos_emb]
            query = apply_rotary_pos_emb(query, rotary_pos_emb)
            key = apply_rotary_pos_emb(key, rotary_pos_emb)
""",
    "list": """\
        if rotary_pos_emb_list is not None:
            cur_len = query.shape[1]
            rotary_pos_emb = [i[:, -cur_len:, :, :] for i in rotary_pos_emb_list[0]]
            query = apply_rotary_pos_emb(query, rotary_pos_emb)
            key = apply_rotary_pos_emb(key, rotary_pos_emb)
""",
}

MADE_MASKS = {
    "made": """\
        registered_causal_mask = torch.tril(
            torch.ones((key.size(1), key.size(1)), dtype=torch.bool, device=key.device)
        ).view(1, 1, key.size(1), key.size(1))
""",
    "optional": """\
        key_size = key.size(1)
        if query.size(1) == key_size:
            causal_mask = torch.tril(
                torch.ones((key_size, key_size), dtype=torch.bool, device=query.device)
            ).view(1, 1, key_size, key_size)
        else:
            causal_mask = None
""",
}


def _forward(form: Form) -> str:
    parameters = "".join(f"        {name}=None,\n" for name in _parameters(form))
    optional = form.mask == "optional"
    plain = f"""\
attn_output, attn_weight = self._attn(
    {_arguments(form)}, head_mask
)
"""
    return (
        f"""
    def forward(
        self,
        hidden_states,
{parameters}        head_mask=None,
        output_attentions=False,
        use_cache=False,
    ):
        mixed_x_layer = self.c_attn(hidden_states)
        query, key, value = mixed_x_layer.split(self.split_size, dim=2)
{EDITED_ROWS if form.edits_rows else ""}        query = self._split_heads(query, self.num_heads, self.head_dim)
        key = self._split_heads(key, self.num_heads, self.head_dim)
        value = self._split_heads(value, self.num_heads, self.head_dim)

"""
        + ROTATIONS[form.rotation]
        + f"""
        if layer_past is not None:
            past_key, past_value = layer_past[0], layer_past[1]
            key = torch.cat((past_key, key), dim=1)
            value = torch.cat((past_value, value), dim=1)

        if use_cache:
            present = (key, value)
        else:
            present = None

{"        key_size = key.size(1)" if optional else ""}
        if {"key_size > self.seq_length and " if optional else ""}self.use_logn_attn and not self.training:
            seq_start = key.size(1) - query.size(1)
            seq_end = key.size(1)
            logn_tensor = self.logn_tensor[:, seq_start:seq_end, :, :]
            query = query * logn_tensor.expand_as(query)

"""
        + MADE_MASKS.get(form.mask, "")
        + """\
        query = query.permute(0, 2, 1, 3)
        key = key.permute(0, 2, 1, 3)
        value = value.permute(0, 2, 1, 3)
"""
        + (_fused(form, plain) if form.fused else _indented(plain, 8))
        + """\
        context_layer = self._merge_heads(attn_output, self.num_heads, self.head_dim)
        attn_output = self.c_proj(context_layer)
        outputs = (attn_output, present)
        return outputs
"""
    )


def _fused(form: Form, plain: str) -> str:
    kind = "lost" if form.fused_mask_is_lost else "optional" if form.mask == "optional" else "registered"
    cut = FUSED_CUT if kind == "registered" else ""
    return (
        "        if not self.use_cache_quantization and SUPPORT_TORCH2:\n"
        + _indented(cut + FUSED_MASKS[kind] + FUSED, 12)
        + "        else:\n"
        + _indented(plain, 12)
    )


def _block(form: Form) -> str:
    names = _parameters(form)
    return BLOCK.format(
        parameters="".join(f"        {name}=None,\n" for name in names),
        passed="".join(f"            {name}={name},\n" for name in names),
    )


def _indented(text: str, by: int) -> str:
    return "".join(" " * by + line for line in text.splitlines(keepends=True))
