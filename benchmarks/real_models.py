"""What the real models take, computed from their sizes: the tables of docs/qwen-7b-on-a-chip.md.

    python -m benchmarks.real_models

Nothing is run. B is the weights of one layer's matrices, 4 H H + 3 H I; E those of the embedding, V H, as many as
lm_head's; L layers; S = 512. Minutes are those of a benchmark on 2 cores (benchmarks.compile_vs_llm_convert, two layers
of Qwen-7B's size: export 134 s, compile 152 to 169 s a mode), in proportion to the weights.
"""

from helpers.compile.needs import needs_of
from helpers.fetch.fetching import MODELS

NAMES = ("qwen-1_8b", "qwen-7b", "qwen-14b")
SEQ_LENGTH = 512
# A group of 64 weights has a scale of 16 bits and a zero point of 8. Measured: 405, 212, 111 MB for 0.2024e9 weights.
BITS = {"bf16": 16, "int8": 8 + 24 / 64, "int4": 4 + 24 / 64}
# Bytes a second at which every weight load of a decode block of Qwen-7B's size runs in the compiler's cycle model.
LOAD_SPEED = 54.0e9  # a profile prints 50.3, in GiB/s
MEASURED_WEIGHTS, EXPORT_SECONDS, COMPILE_SECONDS = 1.6497e9, 134, 160
NETWORK = 100e6 / 8


class Sizes:
    """Weights of one model (numbers of them), and bytes that follow from them."""

    def __init__(self, name: str):
        model = MODELS[name]
        hidden, inner = model.hidden_size, model.intermediate_size
        self.block = 4 * hidden * hidden + 3 * hidden * inner
        self.embedding = model.vocab_size * hidden
        self.blocks = model.layers * self.block
        self.all = self.blocks + 2 * self.embedding
        self.checkpoint = model.weight_bytes
        self.cache = 2 * 2 * model.layers * SEQ_LENGTH * hidden

    def export_memory(self) -> float:
        """The copies of the largest net in float32, and what Python and PyTorch take: the process as a whole."""
        head = 4 * self.embedding
        return 0.7e9 + (2 if head >= 2 << 30 else 3) * head

    def compile_memory(self) -> float:
        """What `compile` asks for the largest net, in int8; measured for Qwen-7B's lm_head in int4: 8.6 GB."""
        return needs_of("lm_head", 4 * self.embedding, "W8BF16").memory

    def bmodel(self, mode: str) -> float:
        """Weights only: the embedding in bfloat16, blocks and lm_head in the mode's bits."""
        return 2 * self.embedding + BITS[mode] / 8 * (self.blocks + self.embedding)

    def compile_disk(self, mode: str) -> float:
        """Each net's own file (the two nets of a layer, and of the embedding, have the same weights), and the whole."""
        head = BITS[mode] / 8 * self.embedding
        return 2 * (self.bmodel(mode) - head) + head + self.bmodel(mode)

    def tokens_a_second(self, mode: str) -> float:
        """A decode step reads the weights of blocks and lm_head once, at the cycle model's speed, and does no more."""
        return LOAD_SPEED / (BITS[mode] / 8 * (self.blocks + self.embedding))


def rows() -> list[list[str]]:
    """The table: what, then one column a model."""
    sizes = [Sizes(name) for name in NAMES]

    def row(what, value, form="{:.1f}"):
        return [what, *(form.format(value(size)) for size in sizes)]

    def each_mode(what, value, form="{:.1f}"):
        return [what, *(" / ".join(form.format(value(size, mode)) for mode in BITS) for size in sizes)]

    minutes = "{:.0f}"
    return [
        row("weights, 10^9", lambda s: s.all / 1e9),
        row("fetch: disk, GB", lambda s: s.checkpoint / 1e9),
        row("fetch: minutes at 100 Mbit/s", lambda s: s.checkpoint / NETWORK / 60, minutes),
        row("export: minutes", lambda s: EXPORT_SECONDS * s.all / MEASURED_WEIGHTS / 60, minutes),
        row("export: memory, GB", lambda s: s.export_memory() / 1e9),
        row("export: disk, GB", lambda s: 4 * s.all / 1e9),
        row("compile, a mode: minutes", lambda s: COMPILE_SECONDS * s.all / MEASURED_WEIGHTS / 60, minutes),
        row("compile: memory, GB", lambda s: s.compile_memory() / 1e9),
        each_mode("compile: disk, GB (bf16 / int8 / int4)", lambda s, m: s.compile_disk(m) / 1e9),
        each_mode("bmodel, GB (bf16 / int8 / int4)", lambda s, m: s.bmodel(m) / 1e9),
        row("KV cache at S = 512, GB", lambda s: s.cache / 1e9),
        each_mode("chat: token/s at most (bf16 / int8 / int4)", lambda s, m: s.tokens_a_second(m)),
    ]


def main() -> None:
    header = ["", "1.8B", "7B", "14B"]
    for row in [header, ["---"] * len(header), *rows()]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
