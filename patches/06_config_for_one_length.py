"""Tell config.json the one sequence length that is compiled, and that the weights are bfloat16.

`bf16`: the model was trained in bfloat16, and float32 would double every file. `seq_length` and
`max_position_embeddings`: the nets are compiled for one length S; a later step reads it here, and until November 2023
Qwen builds a causal mask of max_position_embeddings squared, 1 GB for 32768.

seq_length has a second meaning in Qwen's code: the length the model was trained for. For a longer text the query is
scaled (`use_logn_attn`) and the rotation base changed (`use_dynamic_ntk`). A compiled decode step always has S + 1
keys, so with seq_length = S alone every token's query would be scaled by log(S + 1)/log(S), 1.0003 for 512. Within
the trained length both scalings are exactly 1, so both are turned off here, which the documented change leaves out.
For an S beyond the trained length they are not applied: a warning says so.

Recognises: a config.json of model_type qwen with seq_length in it.
"""

import json
import re

from helpers.patching.passages import MisfitError, NotNeededError

FILE = "config.json"
BOM = "\ufeff"


def change(text: str, seq_length: int) -> str:
    config = json.loads(text.removeprefix(BOM))
    if config.get("model_type") != "qwen" or not isinstance(config.get("seq_length"), int):
        found = {key: config.get(key) for key in ("model_type", "seq_length")}
        raise MisfitError(f"not the configuration of a first-generation Qwen: {found}")
    # August 2023 says n_positions.
    positions = {"n_positions", "max_position_embeddings"} & config.keys() or {"max_position_embeddings"}
    wanted = {
        "bf16": True,
        "fp16": False,
        "fp32": False,
        **dict.fromkeys(sorted(positions), seq_length),
        "seq_length": seq_length,
        "use_logn_attn": False,
        "use_dynamic_ntk": False,
    }
    changes = {key: value for key, value in wanted.items() if config.get(key, False) != value}
    if not changes:
        raise NotNeededError("config.json says so already")
    changed = text
    for key, value in changes.items():
        changed = _with_value(changed, key, value)
    more_than_once = [key for key in changes if len(re.findall(rf'"{key}"\s*:', text)) > 1]
    if more_than_once or json.loads(changed.removeprefix(BOM)) != config | changes:
        raise MisfitError(f"one of {', '.join(changes)} stands in it more than once, or not as a plain value")
    return changed


def _with_value(text: str, key: str, value: bool | int) -> str:
    """The text with one key's value changed, or the key put first; the rest as it was."""
    changed, found = re.subn(rf'("{key}"\s*:\s*)[^,}}\s]+', rf"\g<1>{json.dumps(value)}", text, count=1)
    return changed if found else re.sub(r"\{(\s*)", rf'{{\g<1>"{key}": {json.dumps(value)},\g<1>', text, count=1)
