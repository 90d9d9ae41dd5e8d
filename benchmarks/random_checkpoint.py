"""Checkpoints of any size with random weights: the embedded model's code, Qwen's layout, one shard a layer.

python -m benchmarks.random_checkpoint DIR --hidden 4096 --heads 32 --layers 1 --inner 11008 --vocab 151936
"""

import argparse
import json
import shutil
from pathlib import Path

TINY = Path(__file__).resolve().parent.parent / "models" / "tiny"


def write(
    folder: str | Path,
    *,
    hidden: int = 128,
    heads: int = 4,
    layers: int = 4,
    inner: int = 384,
    vocab: int = 3008,
    seq_length: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with bfloat16 weights that all differ. inner: size of w1 and of w2. Returns the folder."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in TINY.iterdir():
        if file.suffix in (".py", ".json") and not file.name.startswith(("train", "demo", "patches")):
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": hidden // heads,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * inner,
        "vocab_size": vocab,
        "seq_length": seq_length,
        "max_position_embeddings": seq_length,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    random = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return (torch.randn(shape, generator=random) * 0.02).bfloat16()

    def norm():
        return (1 + torch.randn(hidden, generator=random) * 0.02).bfloat16()

    def block(i):
        name = f"transformer.h.{i}."
        return {
            name + "ln_1.weight": norm(),
            name + "attn.c_attn.weight": matrix(3 * hidden, hidden),
            name + "attn.c_attn.bias": matrix(3 * hidden),
            name + "attn.c_proj.weight": matrix(hidden, hidden),
            name + "ln_2.weight": norm(),
            name + "mlp.w1.weight": matrix(inner, hidden),
            name + "mlp.w2.weight": matrix(inner, hidden),
            name + "mlp.c_proj.weight": matrix(hidden, inner),
        }

    def ends():
        return {
            "transformer.wte.weight": matrix(vocab, hidden),
            "transformer.ln_f.weight": norm(),
            "lm_head.weight": matrix(vocab, hidden),
        }

    parts = [ends, *(lambda i=i: block(i) for i in range(layers))]
    index = {}
    for number, part in enumerate(parts, start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = part()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    for size, default in (("hidden", 128), ("heads", 4), ("layers", 4), ("inner", 384), ("vocab", 3008)):
        parser.add_argument(f"--{size}", type=int, default=default)
    args = vars(parser.parse_args())
    print(write(args.pop("folder"), **args))


if __name__ == "__main__":
    main()
