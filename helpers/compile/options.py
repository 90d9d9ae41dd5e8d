"""What the compiler is told of each net: the flags of the documented compile.sh, and what a user may choose."""

from helpers.errors import UserError
from helpers.nets import HEADS, net_kind
from helpers.tensors import ADDR_MODES

# Documented: --quantize W8BF16 for int8, W4BF16 --q_group_size 64 for int4. 64 is the tools' default for W8 too.
QUANTIZE = {"bf16": "BF16", "int8": "W8BF16", "int4": "W4BF16"}
Q_GROUP_SIZE = 64


def check_name(name: str) -> None:
    """Raises UserError where a name cannot begin a file's name: the file would be elsewhere, or nowhere."""
    if not name.strip() or name.startswith(".") or "/" in name or "\0" in name or len(name.encode()) > 100:
        raise UserError(f"{name[:99]!r} cannot begin a file's name: give a short one without slashes, such as qwen-7b.")


def check_options(mode: str, num_device: int, addr_mode: str, heads: int, hidden_size: int) -> None:
    """Raises UserError for what a model of this size cannot be compiled with."""
    if mode not in QUANTIZE:
        raise UserError(f"mode is {mode!r}, it must be one of {', '.join(QUANTIZE)}.")
    if addr_mode not in ADDR_MODES:
        raise UserError(f"addr_mode is {addr_mode!r}, it must be one of {', '.join(ADDR_MODES)}.")
    if num_device < 1 or heads % num_device:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"num_device {num_device} does not divide the {heads} attention heads, which are split over the devices: "
            f"take one of {fitting}."
        )
    if mode == "int4" and hidden_size % Q_GROUP_SIZE:
        raise UserError(
            f"int4 quantises in groups of {Q_GROUP_SIZE} weights, which does not divide the hidden size "
            f"{hidden_size}: take int8 or bf16."
        )


def net_settings(
    net: str, mode: str, num_device: int, addr_mode: str, dynamic: bool, head_mode: str | None = None
) -> dict:
    """The compiler's settings for one net, as documented in compile.sh; and the edits of helpers.compile.graph.

    io_alone is for block_cache only: its inputs are the cache, which must outlive a run. dynamic is for prefill
    (embedding and blocks): decode nets have one row whatever the prompt. head_mode: of lm_head, where it is another.
    """
    kind = net_kind(net)
    head, embedding, block = net in HEADS, kind.startswith("embedding"), kind.startswith("block")
    quantize = "F32" if head else "BF16" if embedding else QUANTIZE[head_mode or mode if net == "lm_head" else mode]
    return {
        "quantize": quantize,
        "q_group_size": Q_GROUP_SIZE if quantize.startswith("W") else 0,
        "quant_input": not head,
        "quant_output": embedding or block,
        "num_device": 1 if head else num_device,
        "addr_mode": addr_mode if kind == "block_cache" else "basic",
        "dynamic": dynamic and kind in ("embedding", "block"),
        "merge_cache": kind == "block_cache",
        # The pass that splits a net over devices looks for the rotation in its long form.
        "fuse_rotation": block and num_device == 1,
    }
