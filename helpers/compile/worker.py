"""What happens to one net inside a fork of the compiler server: ONNX to MLIR to a bmodel of one net.

Only that process imports TPU-MLIR. Everything is written to the job's own folder: the tools use fixed names in the
current one.
"""

import contextlib
import ctypes
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from helpers import toolchain
from helpers.compile import graph
from helpers.compile.profile import PROFILE
from helpers.compile.server import die_with_parent
from helpers.errors import UserError
from helpers.files import locked

CHIP = "bm1684x"
# Tensors from this size on bypass the ONNX simplifier: it copies them many times over and looks at none.
BYPASS_BYTES = 1 << 16
RESULT = "result.json"
KERNELS = "kernels"
# <sys/personality.h>
_ADDR_NO_RANDOMIZE = 0x0040000
_ENVIRONMENT_BYTES = 1 << 15


def preload() -> None:
    """Import what every net needs. The server forks after this, so no thread may be left running.

    The front end imports torch for nets with operators of its own making, and all of transformers by way of a
    converter of tokenizers: nine tenths of its start for what no net of ours uses. They get empty modules instead.
    """
    tokenizers = types.ModuleType("onnxruntime_extensions.cvt")
    tokenizers.gen_processing_models = None
    sys.modules[tokenizers.__name__] = tokenizers
    sys.modules["torch"] = types.ModuleType("torch")

    environment = dict(os.environ)
    import tpu_mlir  # noqa: F401  puts the wheel's folders on sys.path

    # And on the lists of paths, before what helpers.toolchain has put there for good reason.
    os.environ.update(environment)

    # isort: split
    import onnx  # noqa: F401
    from tpu_mlir.python.utils import mlir_shell  # noqa: F401
    from transform import OnnxConverter  # noqa: F401


def compile_net(job: dict) -> None:
    """Compile one net in the folder job["work"]; leaves <net>.bmodel, the compiler's profile and result.json.

    job: net, onnx (path), work, log, kernels (folder of a cache for nets that need the same kernels), and settings
    {quantize, q_group_size, quant_input, quant_output, num_device, addr_mode, dynamic, and each of
    compiler_graph.EDITS}. Raises UserError or RuntimeError; what the tools say goes to standard output.
    """
    net, settings, work = job["net"], job["settings"], Path(job["work"])
    os.chdir(work)
    started = time.monotonic()
    # In a process of its own, so that its memory is given back before the compiler takes its own.
    transform_bytes = _in_child(lambda: transform(net, job["onnx"]))
    mlir = work / f"{net}.mlir"
    edits = {name: 0 for name in graph.EDITS if settings[name]}
    for name in edits:
        text, edits[name] = graph.EDITS[name](mlir.read_text(encoding="utf-8"))
        mlir.write_text(text, encoding="utf-8")
    transformed = time.monotonic()
    bmodel = work / f"{net}.bmodel"
    with _kernels(Path(job["kernels"])) as kernels:
        os.environ["PPL_CACHE_PATH"] = f"{kernels}/" if kernels.is_absolute() else f"./{kernels}/"
        deploy_bytes = _deploy(mlir, bmodel, settings)
    if not bmodel.is_file() or not bmodel.stat().st_size:
        raise RuntimeError("error: the compiler ended without an error and without a bmodel")
    result = {
        "edits": edits,
        "transform_s": round(transformed - started, 3),
        "deploy_s": round(time.monotonic() - transformed, 3),
        "transform_bytes": transform_bytes,
        "deploy_bytes": deploy_bytes,
    }
    keep = {bmodel.name, PROFILE, mlir.name}
    for path in work.iterdir():
        if path.is_file() and path.name not in keep:
            path.unlink()
    (work / RESULT).write_text(json.dumps(result), encoding="utf-8")


@contextlib.contextmanager
def _kernels(cache: Path):
    """Yields a folder for the kernels of fused attention, which the compiler builds with cmake for each shape.

    They are not in the home folder: the compiler remembers there for good that a kernel could not be built (for want
    of cmake, say), and goes without; and two of its processes that build one kernel spoil each other's. So the first
    net of a kind builds them alone, and they move to the cache when they are whole: one that was killed, or found the
    disk full, leaves none half built there, which the compiler would take and stop at. Those after it take a copy:
    there are disks without links. cmake does not work in folders with every name.
    """
    cache.mkdir(parents=True, exist_ok=True)
    whole, made = cache / "whole", Path(f"{KERNELS}.made")
    with contextlib.ExitStack() as stack:
        ours = Path(KERNELS)
        if not toolchain.is_plain(Path.cwd()):
            ours = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=toolchain.plain_parent()))) / KERNELS
        with locked(cache / "lock"):
            if not whole.exists():
                ours.mkdir()
                yield ours
                shutil.move(ours, made)
                # Without a lock another net may have been faster.
                with contextlib.suppress(OSError):
                    made.rename(whole)
                shutil.rmtree(made, ignore_errors=True)
                return
        shutil.copytree(whole, ours)
        yield ours
        shutil.rmtree(ours)


def _in_child(function) -> int:
    """Run a function in a fork and return its peak memory in bytes. Raises RuntimeError where it failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_with_parent()
            function()
            status = 0
        except UserError as error:
            print(f"error: {error}", flush=True)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print(f"error: the transform was ended by {signal.Signals(-code).name}", flush=True)
    if code:
        # Its own message is in the log already.
        os._exit(1)
    return usage.ru_maxrss * 1024


def _prepare_tool() -> None:
    die_with_parent()
    # The compiler writes some bytes of a dynamic net's code without having set them. They are the same each time if
    # its memory is laid out the same each time, the environment at its top included; where that may not be asked for,
    # only these bytes differ.
    ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE)


def _run_tool(command: list[str]) -> int:
    """Run a program of the wheel; its peak memory in bytes. Raises RuntimeError naming how it ended."""
    print("[Running]:", shlex.join(command), flush=True)
    env = {name: os.environ[name] for name in toolchain.VARIABLES if name in os.environ}
    # Without PWD and HOME it aborts.
    env |= {"PWD": ".", "HOME": ".", "PPL_CACHE_PATH": os.environ.get("PPL_CACHE_PATH", f"./{KERNELS}/")}
    # Always as long, whatever the PATH is and wherever the program: see _prepare_tool.
    program = shutil.which(command[0], path=env.get("PATH")) or command[0]
    length = len(program) + sum(len(name) + len(value) for name, value in env.items())
    env["PADDING"] = "." * (_ENVIRONMENT_BYTES - length)
    process = subprocess.run(command, env=env, preexec_fn=_prepare_tool, check=False)
    if process.returncode < 0:
        # The program's own last words are above in the log.
        print(f"{command[0]} was ended by {signal.Signals(-process.returncode).name}", flush=True)
    if process.returncode:
        os._exit(1)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def transform(net: str, path: str) -> None:
    """ONNX file -> <net>.mlir (top dialect, before any optimisation) and its weights as .npz, in the current folder.

    Raises UserError where the file is not an ONNX net that the front end can read.
    """
    import onnx
    from google.protobuf.message import DecodeError
    from transform import OnnxConverter as front_end

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is not a readable ONNX file ({error}): export it again.") from None
    weights = take_weights(model, Path(path).parent)
    # The optimised ONNX is saved for debugging only, in gigabytes.
    front_end.onnx.save = lambda *args, **kwargs: None
    front_end.ConstantFolding = _folding_class(front_end.ConstantFolding)
    converter = _converter_class(front_end.OnnxConverter)(net, model, weights)
    converter.generate_mlir(f"{net}.mlir")


def take_weights(model, folder: Path) -> dict:
    """Take the large float32 tensors out of an onnx.ModelProto, leave the small ones in it with their data.

    Returns name to numpy array, memory-mapped where the tensor was stored outside of the file.
    Raises UserError where an external file is missing or too short.
    """
    import numpy as np
    from onnx import TensorProto, external_data_helper, numpy_helper

    def array_of(tensor):
        if not external_data_helper.uses_external_data(tensor):
            return numpy_helper.to_array(tensor)
        info = external_data_helper.ExternalDataInfo(tensor)
        path = folder / info.location
        try:
            return np.memmap(path, "<f4", "r", info.offset or 0, tuple(tensor.dims))
        except (OSError, ValueError) as error:
            raise UserError(
                f"The weights of {tensor.name} cannot be read from {path} ({error}): export the net again."
            ) from None

    weights, rest = {}, []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            if external_data_helper.uses_external_data(tensor):
                external_data_helper.load_external_data_for_tensor(tensor, str(folder))
            rest.append(tensor)
            continue
        array = array_of(tensor)
        if array.ndim > 1 and array.nbytes >= BYPASS_BYTES:
            weights[tensor.name] = array
        else:
            rest.append(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    return weights


def contiguous(array):
    """The array in C order; a transposed matrix is copied tile by tile, which the processor's cache likes better."""
    import numpy as np

    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    rows, columns = 1024, 64
    target = np.empty(array.shape, array.dtype)
    for i in range(0, array.shape[0], rows):
        for j in range(0, array.shape[1], columns):
            target[i : i + rows, j : j + columns] = array[i : i + rows, j : j + columns]
    return target


def _converter_class(front_end):
    """The wheel's OnnxConverter, whose simplifier is not shown the large weights.

    They never become part of an ONNX message either: after the simplifier the graph names them, and what asks for
    their data gets the arrays themselves.
    """
    import numpy as np
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    class Weight(np.ndarray):
        """float32 that is not copied to become float32."""

        def astype(self, dtype, *args, **kwargs):
            return self if np.dtype(dtype) == self.dtype else super().astype(dtype, *args, **kwargs)

    named: dict[str, np.ndarray] = {}
    to_array = numpy_helper.to_array
    numpy_helper.to_array = lambda tensor, *args: (
        named[tensor.name] if tensor.name in named and not tensor.raw_data else to_array(tensor, *args)
    )

    class Converter(front_end):
        def __init__(self, net: str, model, weights: dict):
            self.large = weights
            super().__init__(net, model, [], [], "", {}, True, dump_final_opt=False)

        def model_simplify(self, input_shapes=()):
            untouched = ModelProto()
            untouched.CopyFrom(self.model)
            for name, array in self.large.items():
                self.model.graph.input.append(
                    helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
                )
            super().model_simplify(list(input_shapes))
            if not self._fold_transposes():
                print("something is computed from weights alone: the simplifier gets them all", flush=True)
                self.model = untouched
                for name, array in self.large.items():
                    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
                    self.model.graph.initializer.append(tensor)
                super().model_simplify(list(input_shapes))

        def _fold_transposes(self) -> bool:
            graph = self.model.graph
            inputs = [value for value in graph.input if value.name not in self.large]
            constants = {tensor.name for tensor in graph.initializer} | set(self.large)
            attached, nodes = dict(self.large), []
            for node in graph.node:
                if node.op_type == "Transpose" and node.input[0] in attached:
                    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
                    attached[node.output[0]] = np.transpose(attached[node.input[0]], perm)
                    constants.add(node.output[0])
                elif node.input and all(name in constants for name in node.input):
                    return False
                else:
                    nodes.append(node)
            used = {name for node in nodes for name in node.input}
            del graph.input[:]
            graph.input.extend(inputs)
            del graph.node[:]
            graph.node.extend(nodes)
            for name, array in attached.items():
                if name in used:
                    named[name] = contiguous(array).view(Weight)
                    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
                    graph.initializer.append(tensor)
            return True

    return Converter


def _folding_class(folding):
    """The wheel's ConstantFolding, which runs the whole net on random inputs to fold its constants, without that."""
    import numpy as np
    import onnxruntime
    from onnx import ModelProto, ValueInfoProto

    class Folding(folding):
        def generate_specific_rand_input(self, input_shapes):
            types = {name: self.get_np_type_from_elem_type(self.get_elem_type(name)) for name in input_shapes}
            return {name: np.zeros(shape, types[name]) for name, shape in input_shapes.items()}

        def forward_for_node_outputs(self, const_nodes):
            if any(node.op_type == "Shape" for node in const_nodes):
                return super().forward_for_node_outputs(const_nodes)
            if not const_nodes:
                return {}
            model = ModelProto()
            model.CopyFrom(self.model)
            graph = model.graph
            wanted = [name for node in const_nodes for name in node.output]
            constants = [node for node in graph.node if node.op_type == "Constant"]
            for field in (graph.node, graph.input, graph.output):
                del field[:]
            graph.node.extend([*constants, *const_nodes])
            graph.output.extend(ValueInfoProto(name=name) for name in wanted)
            options = onnxruntime.SessionOptions()
            # Else it lists the constants that this piece of the net does not use.
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            return dict(zip(wanted, session.run(wanted, {}), strict=True))

    return Folding


def _deploy(mlir: Path, bmodel: Path, settings: dict) -> int:
    """Compile MLIR of the top dialect to a bmodel; peak memory in bytes."""
    options = compiler_options(mlir.stem, bmodel.name, settings)
    split = options.index(_SPLITTING_PASS)
    if settings["num_device"] == 1:
        return _run_tool(["tpuc-opt", mlir.name, *options, "-o", os.devnull])
    parts, peak = split_over_devices(mlir, options[: split + 1])
    return max(peak, _run_tool(["tpuc-opt", parts.name, *options[split + 1 :], "-o", os.devnull]))


def split_over_devices(mlir: Path, options: list[str]) -> tuple[Path, int]:
    """Lower MLIR and split it over devices; the MLIR of all devices' parts, and the peak memory in bytes.

    options: the passes up to and with the splitting one, which gets its input as it takes it for granted.
    """
    *lowering, splitting = options
    lowered, parts = (mlir.with_name(f"{mlir.stem}_{stage}.mlir") for stage in ("tpu", "parts"))
    peak = _run_tool(["tpuc-opt", mlir.name, *lowering, "-o", lowered.name])
    text = graph.order_projections(lowered.read_text(encoding="utf-8"))
    lowered.write_text(graph.pair_groups(text), encoding="utf-8")
    peak = max(peak, _run_tool(["tpuc-opt", lowered.name, splitting, "-o", parts.name]))
    parts.write_text(graph.unpair_groups(parts.read_text(encoding="utf-8")), encoding="utf-8")
    return parts, peak


_SPLITTING_PASS = "--dev-parallel"


def compiler_options(net: str, bmodel: str, settings: dict) -> list[str]:
    """All the passes of model_transform.py and model_deploy.py for one tpuc-opt call, as the wheel defines them."""
    from tpu_mlir.python.utils import mlir_shell

    quantize = settings["quantize"].lower()
    options = [
        *mlir_shell.top_opt_options(),
        *mlir_shell.lowering_options(
            quantize,
            CHIP,
            num_device=settings["num_device"],
            num_core=1,
            weight_name=f"{net}_{CHIP}_{quantize}_tpu_weights.npz",
            q_group_size=settings["q_group_size"],
            addr_mode=settings["addr_mode"],
        ),
        *mlir_shell.tpu_opt_options(settings["quant_input"], settings["quant_output"]),
        *mlir_shell.tpu_ada_options(dynamic=settings["dynamic"], enable_affine=True),
        *mlir_shell.codegen_options(bmodel, model_version="latest"),
    ]
    return shlex.split(" ".join(options))
