"""The four nets of the engines' tests, in numpy: tests.engine_bmodel makes a bmodel of them.

    embedding    ids int32 [1,8]                                     -> states bf16 [1,8,32]      basic
    cache        states bf16 [1,1,32], past bf16 [1,8,32]            -> states, row bf16 [1,1,32] ADDR_MODE
    logits       states bf16 [1,32]                                  -> logits float32 [1,64]     basic
    greedy_head  logits float32 [1,64]                               -> token int32 [1,1]         basic, dynamic

`cache` attends over `past` with `states` and gives a new row for it, as a decode block does.
"""

import numpy as np

ROWS, WIDTH, VOCABULARY = 8, 32, 64


def weights() -> dict[str, np.ndarray]:
    """float32: embedding [V,W], row [W,W], logits [W,V]."""
    random = np.random.default_rng(7)
    shapes = {"embedding": (VOCABULARY, WIDTH), "row": (WIDTH, WIDTH), "logits": (WIDTH, VOCABULARY)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
