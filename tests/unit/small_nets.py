"""A Qwen of one layer, hidden size 64, two heads, S = 32, 192 tokens, as ONNX nets of the documented form.

And a checkpoint of random weights, for what the embedded model's config and sureness would hide.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

from helpers.compile.jobs import NetToCompile
from helpers.export.signature import read_signature
from helpers.run.engines import open_engine
from tests.conftest import TINY

HIDDEN, HEADS, FF, S, VOCAB = 64, 2, 128, 32, 192


def write_nets(out: Path, layers: int = 1, nets: tuple[str, ...] = ()) -> Path:
    """Write the nets (default: all of them) to a folder. Inline weights, random but the same each time."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    head_dim = HIDDEN // HEADS
    angles = torch.outer(torch.arange(S).float(), 10000 ** -(torch.arange(0, head_dim, 2) / head_dim))
    angles = torch.cat((angles, angles), -1)

    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(1 + 0.1 * torch.randn(HIDDEN))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight

    def rotate(x, cos, sin):
        first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(dim=-2)
        return x * cos + torch.cat((-second, first), -1) * sin

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = RMSNorm(), RMSNorm()
            self.c_attn, self.c_proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN, bias=False)
            self.w1, self.w2 = nn.Linear(HIDDEN, FF, bias=False), nn.Linear(HIDDEN, FF, bias=False)
            self.down = nn.Linear(FF, HIDDEN, bias=False)
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, states, positions, mask, past_k=None, past_v=None):
            cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
            q, k, v = (
                t.view(1, t.shape[1], HEADS, head_dim) for t in self.c_attn(self.ln_1(states)).split(HIDDEN, dim=2)
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            new = k, v
            if past_k is not None:
                k, v = torch.cat((past_k, k), 1), torch.cat((past_v, v), 1)
            q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
            scores = (q @ k.transpose(-1, -2) / math.sqrt(head_dim) + mask).softmax(-1)
            states = states + self.c_proj((scores @ v).transpose(1, 2).reshape(1, -1, HIDDEN))
            x = self.ln_2(states)
            return states + self.down(self.w1(x) * nn.functional.silu(self.w2(x))), *new

    class LmHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = RMSNorm(), nn.Linear(HIDDEN, VOCAB, bias=False)

        def forward(self, states):
            return self.head(self.norm(states))

    class Greedy(nn.Module):
        def forward(self, logits):
            return torch.topk(logits, 1)[1]

    class Penalty(nn.Module):
        def forward(self, logits, ids, top_p, temperature, penalty):
            seen = torch.gather(logits, 1, ids)
            logits = torch.scatter(logits, 1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
            logits, tokens = torch.topk(logits, 50)
            inside = ((logits / temperature).softmax(1).cumsum(1) < top_p).float()
            return (logits / temperature * inside).softmax(1), tokens

    def export(net, module, inputs, names, outputs):
        if nets and net not in nets:
            return
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module.eval(), inputs, str(out / f"{net}.onnx"), input_names=names, output_names=outputs,
                opset_version=15, dynamo=False,
            )

    out.mkdir(parents=True, exist_ok=True)
    embedding = nn.Embedding(VOCAB, HIDDEN)
    export("embedding", embedding, (torch.zeros(1, S, dtype=torch.int32),), ["input_ids"], ["states"])
    export("embedding_cache", embedding, (torch.zeros(1, 1, dtype=torch.int32),), ["input_ids"], ["states"])
    export("lm_head", LmHead(), (torch.zeros(1, HIDDEN),), ["hidden_states"], ["m_logits"])
    export("greedy_head", Greedy(), (torch.zeros(1, VOCAB),), ["m_logits"], ["token"])
    ids = torch.zeros(1, S, dtype=torch.int64)
    one = torch.ones(1)
    names = ["m_logits", "input_ids", "top_p", "temperature", "penalty"]
    export("penalty_sample_head", Penalty(), (torch.zeros(1, VOCAB), ids, one, one, one), names, ["probs", "token"])
    names = ["input_states", "position_ids", "attention_mask", "history_k", "history_v"]
    outputs = ["hidden_states", "past_k", "past_v"]
    past = torch.zeros(1, S, HEADS, head_dim)
    for i in range(layers):
        block = Block()
        prefill = (torch.zeros(1, S, HIDDEN), torch.zeros(1, S, dtype=torch.int32), torch.zeros(1, 1, S, S))
        export(f"block_{i}", block, prefill, names[:3], outputs)
        decode = (torch.zeros(1, 1, HIDDEN), torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, S + 1))
        export(f"block_cache_{i}", block, (*decode, past, past), names, outputs)
    return out


def write_random_checkpoint(folder: Path, **config) -> Path:
    """Write a checkpoint of two layers and 512 tokens with the embedded model's code, and `config` in its config.json.

    Its weights are random, the same each time: nothing about it is sure of itself.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in TINY.iterdir():
        if path.suffix in (".py", ".json", ".tiktoken"):
            shutil.copy(path, folder)
    smaller = {"num_hidden_layers": 2, "vocab_size": 512}
    whole = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | smaller | config
    (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, weight in load_file(TINY / "model.safetensors").items():
        if ".h.2." in name or ".h.3." in name:
            continue
        shape = [512 if size == 3008 else size for size in weight.shape]
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensors[name] = 0.1 * noise + (1 if "ln_" in name else 0)
        else:
            tensors[name] = noise if "wte" in name else noise * shape[-1] ** -0.5
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def task(nets, folder, net, settings):
    """What helpers.compile.jobs.compile_net takes, for a net of `write_nets`."""
    onnx = nets / f"{net}.onnx"
    return NetToCompile(net, onnx, read_signature(onnx), folder, settings)


def outputs_on_simulator(bmodel, net, arrays):
    """Outputs of a net on the simulator, each input written to the net's own memory."""
    with open_engine(bmodel, "simulator") as engine:
        inputs = [engine.input_tensor(net, i) for i in range(len(arrays))]
        outputs = [engine.output_tensor(net, i) for i in range(len(engine.nets[net].outputs))]
        for tensor, array in zip(inputs, arrays, strict=True):
            engine.write(tensor, array)
        engine.run(net, inputs, outputs)
        return [engine.read(tensor) for tensor in outputs]
