"""What runs a net by its name, on numpy arrays: the exported modules in PyTorch, the ONNX files, a bmodel in an engine.

All three have `layers`, `seq_length` and `run(net, *arrays) -> arrays`, for helpers.parity.chain. Beside them the
checkpoint's own, unpatched model, which knows nothing of nets.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from helpers import artefacts, machine
from helpers.checkpoint import modeling
from helpers.checkpoint.weights import Checkpoint
from helpers.export.exporting import needed_bytes
from helpers.export.modules import NetBuilder, load_weights
from helpers.nets import count_layers, qwen_shape
from helpers.run.engines.base import Engine
from helpers.tensors import HOST_DTYPE, from_bf16, to_bf16


def torch_device() -> torch.device:
    """Where PyTorch computes: an NVIDIA GPU if torch is a build that can use it, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fits_in_memory(checkpoint: Checkpoint, device: torch.device) -> bool:
    """Whether a checkpoint's weights in float32 take less than half of the memory that is free on a device now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.free_memory()
    return needed_bytes(checkpoint)[1] < free / 2


class TorchNets:
    """The exported modules in PyTorch, float32, with one net's weights resident at a time or all of them."""

    def __init__(self, model_path: str | Path, seq_length: int):
        self.checkpoint = Checkpoint.open(model_path)
        self.layers, self.seq_length = self.checkpoint.layers, seq_length
        self._builder = NetBuilder(self.checkpoint, seq_length)
        self._device = torch_device()
        resident = fits_in_memory(self.checkpoint, self._device)
        self._module = functools.lru_cache(None if resident else 0)(self._load)

    def _load(self, net: str) -> torch.nn.Module:
        module = self._builder.module(net)
        load_weights(module, self.checkpoint, net)
        return module.to(self._device)

    def run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        # A net and its *_cache are one module: only their inputs differ.
        module = self._module(net.replace("_cache", ""))
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in inputs))
        return [tensor.cpu().numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]


class OnnxNets:
    """The exported ONNX files in onnxruntime on the CPU, with one net's weights resident at a time or all of them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = artefacts.read_manifest(self.folder)
        self.layers, self.seq_length = count_layers(manifest["nets"]), manifest["seq_length"]
        total = sum(path.stat().st_size for path in self.folder.glob("*.weights"))
        # A net and its *_cache are two sessions, each with the weights.
        self._session = functools.lru_cache(None if 2 * total < machine.free_memory() / 2 else 0)(self._load)

    def _load(self, net: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin while they wait take a core from whoever else computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = str(self.folder / f"{net}.onnx")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        session = self._session(net)
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
        wanted = zip(session.get_inputs(), inputs, strict=True)
        return session.run(None, {w.name: np.asarray(array, dtype=kinds[w.type]) for w, array in wanted})


class EngineNets:
    """The nets of a bmodel in an engine, one at a time with inputs from the host: for parity, not for chatting."""

    def __init__(self, engine: Engine):
        shape = qwen_shape(engine.nets, "The bmodel")
        self.engine, self.layers, self.seq_length = engine, shape.layers, shape.seq_length

    def run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        tensors = [self.engine.input_tensor(net, i) for i in range(len(inputs))]
        outputs = [self.engine.output_tensor(net, i) for i in range(len(self.engine.nets[net].outputs))]
        for tensor, array in zip(tensors, inputs, strict=True):
            if tensor.dtype == "bfloat16":
                array = to_bf16(array)
            self.engine.write(tensor, np.asarray(array, dtype=HOST_DTYPE[tensor.dtype]).reshape(tensor.shape))
        self.engine.run(net, tensors, outputs)
        arrays = [self.engine.read(tensor) for tensor in outputs]
        return [from_bf16(a) if t.dtype == "bfloat16" else a for a, t in zip(arrays, outputs, strict=True)]


class OriginalModel:
    """The checkpoint's own, unpatched QWenLMHeadModel in float32, through its own forward and its own cache.

    resident: whether its weights stay in memory, by default where they fit; else each part's are read at every token.
    """

    def __init__(self, model_path: str | Path, resident: bool | None = None):
        self.device = torch_device()
        if resident is None:
            resident = fits_in_memory(Checkpoint.open(model_path), self.device)
        build = modeling.build_model if resident else modeling.build_streamed_model
        self.model = build(model_path, device=self.device)

    def _run(self, ids: Sequence[int], **options):
        with torch.no_grad():
            return self.model(torch.tensor([list(ids)], device=self.device), **options)

    def states(self, ids: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Output of every block [1,T,H] (the last one after ln_f) and the last row's logits [V], for one prompt."""
        result = self._run(ids, output_hidden_states=True, use_cache=False)
        return [state.cpu().numpy() for state in result.hidden_states[1:]], result.logits[0, -1].cpu().numpy()

    def greedy(self, ids: Sequence[int], stop_ids: Iterable[int], max_new_tokens: int, seq_length: int) -> list[int]:
        """Greedy answer with the same limits as a bmodel of sequence length S would have."""
        stop_ids, tokens, past = frozenset(stop_ids), [], None
        for _ in range(min(max_new_tokens, seq_length - len(ids) + 1)):
            result = self._run(tokens[-1:] or ids, past_key_values=past, use_cache=True)
            past, token = result.past_key_values, int(result.logits[0, -1].argmax())
            if token in stop_ids:
                break
            tokens.append(token)
        return tokens
