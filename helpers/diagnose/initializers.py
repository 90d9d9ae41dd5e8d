"""The weights in an ONNX file, beside those in the checkpoint: what changed, and how."""

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from helpers.checkpoint.weights import Checkpoint
from helpers.diagnose.suspects import Cause
from helpers.export.modules import read_weights


def compare_initializers(folder: Path, net: str, checkpoint: Checkpoint) -> Cause | None:
    """The first weight of a net that is not the checkpoint's; None where all are."""
    model = onnx.load(str(folder / f"{net}.onnx"))
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, tensor in read_weights(checkpoint, net):
        if name not in found:
            continue
        ours, theirs = numpy_helper.to_array(found[name]), tensor.float().numpy()
        if ours.shape != theirs.shape:
            return Cause("shape", f"{name} is {list(ours.shape)}, in the checkpoint {list(theirs.shape)}", name)
        wrong = np.argwhere(ours.view(np.uint32) != theirs.view(np.uint32))
        if not len(wrong):
            continue
        place = tuple(int(n) for n in wrong[0])
        one, other = float(ours[place]), float(theirs[place])
        sentence = f"{name}{list(place)} is {one:g}, in the checkpoint {other:g} ({len(wrong)} values differ)"
        ratio = math.frexp(abs(one / other))[0] if one and other and math.isfinite(one) else 0
        if len(wrong) == 1 and (ratio == 0.5 or not math.isfinite(one)):
            return Cause("exponent_bit", f"{sentence}: a bit of its exponent has flipped, on a disk or in memory", name)
        return Cause("weight", f"{sentence}: the file is not what the export wrote", name)
    return None
