"""The size of a model whose speed is to be forecast, and what no such model has."""

from dataclasses import asdict, dataclass

from helpers.compile.options import Q_GROUP_SIZE, check_options
from helpers.errors import UserError
from helpers.fetch.fetching import MODELS

# Bytes that a program gets of 16 GB: on a card; on a board, unless its memory is divided otherwise than as delivered.
HOSTS = {"soc": 9_000_000_000, "pcie": 14_700_000_000}
SIZES = ("hidden_size", "intermediate_size", "layers", "heads", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A first-generation Qwen and how it is compiled. intermediate_size: one branch of SwiGLU. seq_length: S."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int
    mode: str = "int8"
    seq_length: int = 512
    num_device: int = 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def block_weights(self) -> int:
        """Weights of the matrices of one block."""
        return self.hidden_size * (4 * self.hidden_size + 3 * self.intermediate_size)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys and values in bfloat16, over all devices."""
        return 2 * 2 * self.layers * self.seq_length * self.hidden_size

    @property
    def mask_bytes(self) -> int:
        """Bytes of the mask of a prefill in bfloat16: S rows of S."""
        return 2 * self.seq_length**2

    def check(self) -> None:
        """Raises UserError for a shape that no model has, or that cannot be compiled."""
        for name, value in asdict(self).items():
            if name != "mode" and (type(value) is not int or value < 1):
                raise UserError(f"--{name} is {value}, it must be a whole number from 1 on.")
        if self.hidden_size % self.heads or self.head_dim % 2:
            raise UserError(
                f"--heads {self.heads} does not divide --hidden_size {self.hidden_size} into heads of an even size: "
                "look both up in the model's config.json."
            )
        check_options(self.mode, self.num_device, "io_alone", self.heads, self.hidden_size)
        rows = self.mask_bytes + self.cache_bytes // self.num_device
        if rows > HOSTS["pcie"]:
            raise UserError(
                f"S = {self.seq_length} takes {rows / 1e9:.1f} GB of memory of a device for the mask of a prefill and "
                f"the KV cache alone, a card gives {HOSTS['pcie'] / 1e9:.1f} GB: take a shorter --seq_length."
            )
        if self.mode == "int4" and self.intermediate_size % Q_GROUP_SIZE:
            raise UserError(
                f"int4 quantises in groups of {Q_GROUP_SIZE} weights, which does not divide --intermediate_size "
                f"{self.intermediate_size} (one branch: half of what Qwen's config.json says): take int8 or bf16."
            )


def shape_of(name: str | None = None, **given) -> Shape:
    """The shape of a published model by its name, or of the sizes that are given; checked.

    Raises UserError where a size is missing, given twice, or none that a model has.
    """
    given = {key: value for key, value in given.items() if value is not None}
    if name is not None:
        if name not in MODELS:
            raise UserError(f"No size is known for {name}: take one of {', '.join(MODELS)}, or give --hidden_size etc.")
        if twice := [f"--{size}" for size in SIZES if size in given]:
            raise UserError(f"--name {name} has its own sizes: leave {', '.join(twice)} out, or --name.")
        given |= {size: getattr(MODELS[name], size) for size in SIZES}
    if missing := [f"--{size}" for size in SIZES if size not in given]:
        raise UserError(f"{', '.join(missing)} is missing: give it, or --name with one of {', '.join(MODELS)}.")
    shape = Shape(**given)
    shape.check()
    return shape
