"""The tutorial's plumbing: a room for each step of the story, in its order; an import only ever goes down.

    errors files machine tensors nets cost artefacts toolchain home cli    the ground floor
    checkpoint    weights, tokenizer and code of a Qwen checkpoint
    convert       make one of a llama or a Qwen2
    fetch         bring one here
    patching      change its code so that it exports (the changes are in patches/)
    export        write it as ONNX, net by net
    parity        the same nets in PyTorch, in onnxruntime and in an engine, compared
    compile       compile the nets with TPU-MLIR, to one bmodel
    calibrate     what rounding to int8 and int4 costs, and weights that round well
    bmodel        what such a file contains
    run           the engines (the chip, the simulator), prefill and decode, lookahead, latency
    chat serve    a conversation; the same over HTTP
    forecast      how fast a model will be on the chip, from the cycles of its nets
    diagnose      which rung, which layer, which tensor: where garbage comes from
    notebook      what runs the notebooks and draws in them
    doctor        what this machine has and lacks
    commands      `python -m helpers COMMAND`, a file each

To chat and to serve on the box with a chip, requirements-device.txt is enough; the rest needs requirements.txt.

The story, to read in one evening in this order, and the files of patches/ after the fourth; the rest is guarantees:

    helpers/nets.py                   the contract: which nets there are, what they take, the masks
    helpers/tensors.py                the device's dtypes
    helpers/checkpoint/tokenizer.py   text to ids and back
    helpers/patching/passages.py      how a patch finds its passage
    helpers/export/modules.py         what is exported
    helpers/export/tracing.py         tracing without weights
    helpers/export/exporting.py       net by net
    helpers/parity/chain.py           the nets chained on the host, and compared
    helpers/compile/options.py        what each net is compiled with
    helpers/compile/graph.py          the changes that beat the one-click converter
    helpers/run/engines/base.py       the one interface of chip and simulator
    helpers/run/generation.py         prefill, decode, sampling
    helpers/run/lookahead.py          several tokens a step, the same answer
"""

from helpers import home

home.provide()
