"""What the compiler's cycle model says of each kind of net at a size: out of the atlas, or compiled now.

Cycles depend on shapes, not on values. So one block of random weights stands for all layers of a model, a file of a few
hundred MB for a checkpoint of 15 GB. `atlas.json` beside this file has what was compiled before; what is compiled on
this machine is kept in out/forecast.
"""

import json
from pathlib import Path

from helpers import artefacts
from helpers.forecast.shape import Shape

ATLAS = Path(__file__).with_name("atlas.json")
OUT = Path("out/forecast")
KINDS = ("embedding", "embedding_cache", "block", "block_cache", "lm_head")
# Rows of an embedding that is compiled for its cycles: a net reads S rows, however many there are.
EMBEDDING_ROWS = 3008
# What of these helpers decides the figures of a net.
CODE = artefacts.code_of(
    "compile.graph", "compile.options", "compile.worker", "export.modules", "export.tracing", "forecast.compiling"
)


def key_of(kind: str, shape: Shape) -> str:
    """What a kind of net depends on, as one word: `block h4096 i11008 a32 s512 int4 d1`."""
    h, s, of = f"h{shape.hidden_size}", f"s{shape.seq_length}", f"{shape.mode} d{shape.num_device}"
    return {
        "embedding": f"embedding {h} {s} d{shape.num_device}",
        "embedding_cache": f"embedding_cache {h} d{shape.num_device}",
        "block": f"block {h} i{shape.intermediate_size} a{shape.heads} {s} {of}",
        "block_cache": f"block_cache {h} i{shape.intermediate_size} a{shape.heads} {s} {of}",
        "lm_head": f"lm_head {h} v{shape.vocab_size} {of}",
    }[kind]


def known(out: Path = OUT) -> dict[str, dict]:
    """All figures that there are, by their keys: of the atlas, and of what was compiled on this machine."""
    atlas = json.loads(ATLAS.read_text(encoding="utf-8")) if ATLAS.is_file() else {}
    return atlas | compiled(out)


def compiled(out: Path = OUT) -> dict[str, dict]:
    """What was compiled on this machine, by these helpers as they are, and is kept in `out`."""
    figures = {}
    for path in sorted(out.glob("*.figures.json")):
        manifest = artefacts.manifest_path(path)
        if manifest.is_file() and artefacts.read_manifest(path).get("code") == CODE:
            figures.update(json.loads(path.read_bytes()))
    return figures
