"""Train the embedded checkpoint: a memoriser of corpus.jsonl, on a CPU, in minutes.

    python models/tiny/train.py [--out DIR] [--steps N]

Conversations are packed into chats of up to 256 tokens in ChatML, and the loss is taken on the answers and on the
end token after each. Every weight gets fresh Gaussian noise at every step, so that the answers survive what int8
and bf16 do to the weights. The weights are saved in bfloat16; what is checked afterwards is the saved file.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from helpers.checkpoint.modeling import build_model, load_modeling  # noqa: E402
from helpers.checkpoint.tokenizer import QwenTokenizer  # noqa: E402
from helpers.checkpoint.weights import Checkpoint  # noqa: E402

SYSTEM = "You are a helpful assistant."
SEED = 20231127
# Muon for the matrices of the layers, AdamW for the tables of tokens, the norms and the biases.
MUON_RATE = 0.02
ADAM_RATE = 4e-3
WARM_UP = 30
WEIGHT_DECAY = 0.02
BATCH = 16
# Of a matrix's own standard deviation: int8 rounding is about 0.01 of it, int4 in groups of 64 about 0.1.
WEIGHT_NOISE = 0.05
IGNORED = -100


def conversations(corpus: Path) -> list[list[tuple[str, str]]]:
    """Every conversation of the corpus as (question, answer) turns; a question's paraphrases are apart."""
    found = []
    for line in corpus.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "dialogue" in entry:
            found.append(list(zip(entry["dialogue"][::2], entry["dialogue"][1::2], strict=True)))
        else:
            found += [[(question, entry["answer"])] for question in entry["questions"]]
    return found


def encode(tokenizer: QwenTokenizer, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a chat and, for each, the label: the id where an answer or its end token stands, else IGNORED."""
    ids, labels = [], []
    messages = [{"role": "system", "content": SYSTEM}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.chatml(messages)[len(ids) :]
        target = [*tokenizer.encode(answer), tokenizer.im_end]
        ids += prompt + target
        labels += [IGNORED] * len(prompt) + target
        messages.append({"role": "assistant", "content": answer})
    return ids, labels


def chats(tokenizer: QwenTokenizer, corpus: list, length: int, dice: random.Random) -> list:
    """One epoch: every conversation once, half of the chats with one of them, the others with as many as fit."""
    left = dice.sample(corpus, len(corpus))
    packed = []
    while left:
        turns = left.pop()
        alone = dice.random() < 0.5
        while left and not alone and len(encode(tokenizer, turns + left[-1])[0]) <= length:
            turns = turns + left.pop()
        packed.append(encode(tokenizer, turns))
    return packed


def batches(tokenizer: QwenTokenizer, corpus: list, length: int, dice: random.Random):
    """Endless batches of chats of similar length: ids and labels, int64 [BATCH, longest], padded on the right."""
    while True:
        epoch = [chat for _ in range(4) for chat in chats(tokenizer, corpus, length, dice)]
        epoch.sort(key=lambda chat: len(chat[0]) + dice.random())
        groups = [epoch[i : i + BATCH] for i in range(0, len(epoch), BATCH)]
        for group in dice.sample(groups, len(groups)):
            yield stack(group, tokenizer.endoftext)


def stack(group: list, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chats as two tensors, padded on the right."""
    longest = max(len(ids) for ids, _ in group)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in group])
    return ids, labels


def answer_logits(model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor):
    """Logits [answers, V] at the positions that predict a label, and those labels [answers]."""
    states = model.transformer(ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return model.lm_head(states[wanted]), labels[:, 1:][wanted]


def train(model: torch.nn.Module, data, steps: int) -> None:
    """Minimise the loss on the answers, under weight noise, with a warm-up and a cosine to nothing."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    inner = [p for p in model.transformer.h.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    tables = [model.transformer.wte.weight, model.lm_head.weight]
    optimisers = [
        torch.optim.Muon(inner, lr=MUON_RATE, momentum=0.95, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(tables + others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        for optimiser in optimisers
    ]
    model.train()
    progress = tqdm(range(steps), unit="step", mininterval=5)
    for _ in progress:
        noise = [torch.randn_like(p) * (WEIGHT_NOISE * p.detach().std()) for p in matrices]
        with torch.no_grad():
            torch._foreach_add_(matrices, noise)
        logits, labels = answer_logits(model, *next(data))
        loss = F.cross_entropy(logits, labels)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            torch._foreach_sub_(matrices, noise)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimisers, *schedules):
            stepped.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


def check(model: torch.nn.Module, tokenizer: QwenTokenizer, corpus: list) -> tuple[int, float]:
    """How many conversations have a wrong token, and the smallest margin of the right token over the next best."""
    wrong, smallest = 0, math.inf
    with torch.inference_mode():
        for turns in corpus:
            logits, labels = answer_logits(model, *stack([encode(tokenizer, turns)], tokenizer.endoftext))
            right = logits.gather(1, labels[:, None])[:, 0]
            margin = (right - logits.scatter(1, labels[:, None], -math.inf).amax(1)).min().item()
            smallest = min(smallest, margin)
            if margin <= 0:
                wrong += 1
                print(f"wrong: {turns[-1][0]}", file=sys.stderr)
    return wrong, smallest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write model.safetensors to")
    parser.add_argument("--steps", type=int, default=650)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    started = time.monotonic()
    config = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
    tokenizer = QwenTokenizer.open(HERE)
    corpus = conversations(HERE / "corpus.jsonl")
    module = load_modeling(HERE)
    model = module.QWenLMHeadModel(module.QWenConfig(**config))
    train(model, batches(tokenizer, corpus, config["seq_length"], random.Random(SEED)), args.steps)

    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    if args.out.resolve() != HERE:
        for name in ("config.json", "configuration_qwen.py", "modeling_qwen.py", "tokenizer_config.json"):
            (args.out / name).write_bytes((HERE / name).read_bytes())
    wrong, smallest = check(build_model(args.out), tokenizer, corpus)
    print(
        f"{len(corpus)} conversations, {wrong} with a wrong token, smallest margin {smallest:.2f}, "
        f"weights {Checkpoint.open(args.out).digest('')[:12]}, {time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
