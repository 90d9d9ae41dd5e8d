"""The same nets on the host, in PyTorch and in onnxruntime, chained as the chip chains them; and parity between them.

`HostChain` walks the contract of helpers.nets with numpy arrays, over anything that runs a net by name. So
patched PyTorch, onnxruntime and (for per-net parity) the chip's own nets are compared on the very same inputs.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from helpers import artefacts, machine
from helpers.errors import UserError
from helpers.nets import decode_mask, net_kind, prefill_mask
from helpers.tensors import HOST_DTYPE, from_bf16, to_bf16


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Largest absolute difference and cosine similarity of two float arrays of the same shape."""
    found, expected = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (found, expected))
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return {
        "max_abs": float(np.abs(found - expected).max()),
        "cosine": float(found @ expected / norms) if norms else float(not norms and np.array_equal(found, expected)),
    }


def torch_device():
    """Where PyTorch computes: an NVIDIA GPU if torch is a build that can use it, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TorchNets:
    """The exported modules in PyTorch, float32, with one net's weights resident at a time or all of them."""

    def __init__(self, model_path: str | Path, seq_length: int):
        from helpers.checkpoint.weights import Checkpoint
        from helpers.export.modules import NetBuilder

        self.checkpoint = Checkpoint.open(model_path)
        self.layers, self.seq_length = self.checkpoint.layers, seq_length
        self._builder = NetBuilder(self.checkpoint, seq_length)
        self._device = torch_device()
        self._resident = _Resident(self.checkpoint, self._device)

    def _make(self, net: str):
        from helpers.export.modules import load_weights

        module = self._builder.module(net)
        load_weights(module, self.checkpoint, net)
        return module.to(self._device)

    def run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        import torch

        module = self._resident.get(net.replace("_cache", ""), lambda: self._make(net))
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in inputs))
        return [tensor.cpu().numpy() for tensor in (outputs if isinstance(outputs, tuple) else (outputs,))]


class OnnxNets:
    """The exported ONNX files in onnxruntime on the CPU, with one net's weights resident at a time or all of them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = artefacts.read_manifest(self.folder)
        self.layers = sum(net.startswith("block_cache_") for net in self.manifest["nets"])
        self.seq_length = self.manifest["seq_length"]
        total = sum(path.stat().st_size for path in self.folder.glob("*.weights"))
        self._resident = _Resident(2 * total)

    def _make(self, net: str):
        import onnxruntime

        path = self.folder / f"{net}.onnx"
        if not path.exists():
            raise UserError(f"{self.folder} has no {net}.onnx: run `python -m helpers export` again.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Threads that spin while they wait take a core from whoever else computes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        session = self._resident.get(net, lambda: self._make(net))
        wanted = session.get_inputs()
        kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
        feed = {w.name: np.asarray(a, dtype=kinds[w.type]) for w, a in zip(wanted, inputs, strict=True)}
        return session.run(None, feed)


class EngineNets:
    """The nets of a bmodel in an engine, one at a time with inputs from the host: for parity, not for chatting."""

    def __init__(self, engine):
        from helpers.run.generation import QwenRunner

        runner = QwenRunner(engine)
        self.engine, self.layers, self.seq_length = engine, runner.layers, runner.seq_length

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


def fits_in_memory(needed: object, device: object = None) -> bool:
    """Whether so many bytes, or a checkpoint's weights in float32, take no more than half of the memory free now.

    device: a torch.device whose memory is meant; by default the machine's.
    """
    if not isinstance(needed, int):
        from helpers.export.exporting import needed_bytes

        needed = needed_bytes(needed)[1]
    if device is not None and device.type == "cuda":
        import torch

        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = machine.free_memory()
    return needed < free / 2


class _Resident:
    """Keeps what was loaded while all of it fits in half of the free memory, else only the last one."""

    def __init__(self, needed: object, device: object = None):
        self._keep_all = fits_in_memory(needed, device)
        self._loaded: dict[str, object] = {}

    def get(self, name: str, make):
        if name not in self._loaded:
            if not self._keep_all:
                self._loaded.clear()
            self._loaded[name] = make()
        return self._loaded[name]


class HostChain:
    """Prefill and decode over `nets.run(net, *arrays)`, keys and values in numpy.

    `record` (when a dict is given) receives, per net, the inputs it was given and the outputs it gave: lists of arrays.
    """

    def __init__(self, nets, record: dict | None = None):
        self.nets, self.record = nets, record
        self.position = 0
        self.caches: list[list[np.ndarray]] = []

    def _run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        outputs = self.nets.run(net, *inputs)
        if self.record is not None:
            self.record[net] = ([np.array(a) for a in inputs], [np.array(a) for a in outputs])
        return outputs

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after a prompt: float32 [V]."""
        count, seq_length = len(ids), self.nets.seq_length
        padded = np.zeros((1, seq_length), dtype=np.int32)
        padded[0, :count] = ids
        positions = np.zeros((1, seq_length), dtype=np.int32)
        positions[0, :count] = np.arange(count)
        mask = prefill_mask(count, seq_length)
        states = self._run("embedding", padded)[0]
        self.caches = []
        for i in range(self.nets.layers):
            states, key, value = self._run(f"block_{i}", states, positions, mask)
            self.caches.append([np.array(key), np.array(value)])
        self.position = count
        return self._run("lm_head", states[:, count - 1])[0].reshape(-1)

    def decode(self, token: int) -> np.ndarray:
        """Logits after one more token: float32 [V]."""
        position = np.array([[self.position]], dtype=np.int32)
        mask = decode_mask(self.position, self.nets.seq_length)
        states = self._run("embedding_cache", np.array([[token]], dtype=np.int32))[0]
        for i, (keys, values) in enumerate(self.caches):
            states, key, value = self._run(f"block_cache_{i}", states, position, mask, keys, values)
            keys[:, self.position], values[:, self.position] = key[:, 0], value[:, 0]
        self.position += 1
        return self._run("lm_head", states[:, 0])[0].reshape(-1)

    def greedy(self, ids: Sequence[int], stop_ids: Iterable[int], max_new_tokens: int | None = None) -> list[int]:
        """Greedy answer to a prompt, without its stop token, with the limits of QwenRunner.generate."""
        stop_ids, tokens = frozenset(stop_ids), []
        room = self.nets.seq_length - len(ids) + 1
        logits = self.prefill(ids)
        for _ in range(room if max_new_tokens is None else min(max_new_tokens, room)):
            token = int(logits.argmax())
            if token in stop_ids:
                break
            tokens.append(token)
            if self.position >= self.nets.seq_length:
                break
            logits = self.decode(token)
        return tokens


class OriginalModel:
    """The checkpoint's own, unpatched QWenLMHeadModel in float32, through its own forward and its own cache.

    Its weights stay in memory where they fit in half of what is free; else each part's are read from the checkpoint
    when its turn comes, at every token, and given up after it. resident: False asks for that.
    """

    def __init__(self, model_path: str | Path, resident: bool | None = None):
        from helpers.checkpoint import modeling
        from helpers.checkpoint.weights import Checkpoint

        self.device = torch_device()
        if resident is None:
            resident = fits_in_memory(Checkpoint.open(model_path), self.device)
        build = modeling.build_model if resident else modeling.build_streamed_model
        self.model = build(model_path, device=self.device)

    def states(self, ids: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
        """Output of every block [1,T,H] (the last one after ln_f) and the last row's logits [V], for one prompt."""
        import torch

        with torch.no_grad():
            prompt = torch.tensor([list(ids)], device=self.device)
            result = self.model(prompt, output_hidden_states=True, use_cache=False)
        return [state.cpu().numpy() for state in result.hidden_states[1:]], result.logits[0, -1].cpu().numpy()

    def greedy(
        self, ids: Sequence[int], stop_ids: Iterable[int], max_new_tokens: int, seq_length: int
    ) -> list[int]:
        """Greedy answer with the same limits as a bmodel of sequence length S would have."""
        import torch

        stop_ids, tokens, past = frozenset(stop_ids), [], None
        feed = list(ids)
        with torch.no_grad():
            for _ in range(min(max_new_tokens, seq_length - len(ids) + 1)):
                ids_now = torch.tensor([feed], device=self.device)
                result = self.model(ids_now, past_key_values=past, use_cache=True)
                past, token = result.past_key_values, int(result.logits[0, -1].argmax())
                if token in stop_ids:
                    break
                tokens.append(token)
                feed = [token]
        return tokens


def parity(recorded: dict, nets, *, tokens: int) -> dict[str, dict[str, float]]:
    """Run each recorded net alone on its recorded inputs; compare outputs. `tokens`: rows that are not padding.

    recorded: from HostChain(record=...). Returns {net: {max_abs, cosine}}, the worst of a net's outputs.
    """
    result = {}
    for net, (inputs, expected) in recorded.items():
        found = nets.run(net, *inputs)
        pairs = [(f, e) for f, e in zip(found, expected, strict=True)]
        if net_kind(net) in ("block", "embedding"):
            pairs = [(f[:, :tokens], e[:, :tokens]) for f, e in pairs]
        figures = [compare(f, e) for f, e in pairs]
        result[net] = {
            "max_abs": max(f["max_abs"] for f in figures),
            "cosine": min(f["cosine"] for f in figures),
        }
    return result


def chained_parity(found: dict, expected: dict, *, tokens: int) -> dict[str, dict[str, float]]:
    """Compare two chains' records of the same prompt and tokens, net by net: errors have travelled with the states."""

    class Replay:
        def run(self, net, *inputs):
            return found[net][1]

    return parity(expected, Replay(), tokens=tokens)
