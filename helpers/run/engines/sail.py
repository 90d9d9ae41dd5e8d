"""The chip: sophon-sail's `EngineLLM` behind the engine's interface. PCIe cards and SoC, one device or several.

The calls used are those of sophon-sail 3.9.1 to 3.10.7 as its C++ source has them; its `.pyi` stubs differ in places.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from helpers.bmodel.bmodel import runnable_bmodel
from helpers.errors import UserError
from helpers.run.engines.base import DeviceTensor, Engine, NetMemory
from helpers.run.sail_package import sophon_sail
from helpers.tensors import ADDR_MODES, HOST_DTYPE, NetInfo, TensorInfo

# sail.Dtype's names are bm_data_type_t's.
SAIL_DTYPES = {f"BM_{name.upper()}": name for name in HOST_DTYPE}
# Public sources before it (3.9.0) have EngineLLM, but no views of tensors.
OLDEST = "3.9.1"
SDK = "it comes with Sophgo's SDK (sophon-sail), not from PyPI"


def load_sail() -> ModuleType:
    """The module sophon.sail. Raises UserError where it is absent, PyPI's placeholder, or cannot be loaded."""
    state, where = sophon_sail()
    if state == "absent":
        raise UserError(f"sophon.sail is not installed: {SDK}.")
    if state == "placeholder":
        raise UserError(
            f"The installed `sophon` is PyPI's empty placeholder ({where}), not Sophgo's: pip uninstall it. "
            f"sophon.sail is needed; {SDK}."
        )
    try:
        sail = importlib.import_module("sophon.sail")
    except (ImportError, OSError) as error:
        raise UserError(
            f"sophon.sail ({where}) cannot be loaded ({error}): install the driver and libsophon of the same SDK "
            "release, and have their lib folders in LD_LIBRARY_PATH."
        ) from error
    return sail


def count_devices(sail: ModuleType) -> int:
    """Number of chips that the driver shows. Raises UserError where there is none."""
    try:
        count = sail.get_available_tpu_num()
    except Exception as error:
        raise UserError(
            f"No Sophon device: the driver does not answer ({error}). Is it loaded (ls /dev/bm-sophon*, bm-smi)?"
        ) from error
    if count < 1:
        raise UserError("No Sophon device: sophon.sail is installed and counts 0 chips. Is the driver loaded (bm-smi)?")
    return count


class SailEngine(Engine):
    """A bmodel on one chip or several. devid: the chips' numbers, as many as the bmodel was compiled for.

    Raises UserError where sail, the driver or a device is missing, or the bmodel cannot be loaded on them.
    """

    name = "chip"
    kind_of_time = "measured"

    def __init__(self, bmodel: str | os.PathLike, devid: Sequence[int] = (0,)):
        self._sail = sail = load_sail()
        count = count_devices(sail)
        if missing := [number for number in devid if not 0 <= number < count]:
            raise UserError(f"There is no device {missing[0]}: this machine has {count}, from 0. Choose with --devid.")
        ids = ",".join(map(str, devid))
        if len(set(devid)) != len(devid) or not devid:
            raise UserError(f"--devid {ids}: name each device once.")
        described = runnable_bmodel(bmodel, len(devid))
        self._lock = threading.Lock()
        self._closed = False
        with self._told(f"sophon.sail could not load {bmodel} on device {ids}", devid):
            self._handles = [sail.Handle(number) for number in devid]
            self._llm = sail.EngineLLM(str(bmodel), list(devid))
            nets, own_memory = self._describe(tuple(devid))
        super().__init__(devid, nets, own_memory, described.device_bytes)
        if "libcmodel" in Path("/proc/self/maps").read_text():  # sail was built against the simulator's libraries
            self.kind_of_time = "simulator wall"
        self._check_views()

    def _check_views(self) -> None:
        """Raise UserError where sail is too old to make views, now and not in the middle of the first answer."""
        memory = self.allocate((1,), "int32").memory
        try:
            self._sail.Tensor(memory, [1], 0)
        except TypeError:
            self.close()
            raise UserError(
                "This sophon.sail makes no views of tensors, and keys and values are written through them: install "
                f"sophon-sail {OLDEST} or newer."
            ) from None

    @contextlib.contextmanager
    def _told(self, subject: str, devid: Sequence[int] = ()) -> Iterator[None]:
        """One call of sail at a time; its exception becomes a UserError: `subject`, state of devices, what it says."""
        with self._lock:
            if self._closed:
                raise UserError("This engine is closed: open the bmodel again.")
            try:
                yield
            except Exception as error:  # sail raises a dozen types, some of them unregistered
                raise UserError(f"{subject}{self._state(devid)}: {error}.") from error

    def _state(self, devid: Sequence[int]) -> str:
        """What the devices are and how much memory they have, for a message; sail itself only says that it failed."""
        parts = []
        with contextlib.suppress(Exception):
            for number in devid:
                chip, (total, used) = self._sail.Handle(number).get_target(), self._sail.get_dev_stat(number)[:2]
                parts.append(f"{number} is a {chip} with {total - used} of {total} MB free")
        return f" ({', '.join(parts)})" if parts else ""

    def _describe(self, devid: tuple[int, ...]) -> tuple[dict[str, NetInfo], NetMemory]:
        nets, own_memory = {}, {}
        for net in self._llm.get_graph_names():
            addr_mode = ADDR_MODES[self._llm.get_addr_mode(net)]
            sides = []
            for side in ("input", "output"):
                infos = []
                for k in range(self._ask(side, "num", net)):
                    name, dtype = self._ask(side, "name", net, k), SAIL_DTYPES[self._ask(side, "dtype", net, k).name]
                    device = devid.index(self._ask(side, "tensor_devid", net, k))
                    infos.append(TensorInfo(name, tuple(self._ask(side, "shape", net, k)), dtype, device))
                if addr_mode == "io_alone":
                    tensors = self._ask(side, "tensors", net)
                    for k, info in enumerate(infos):
                        own_memory[net, f"{side}s", k] = DeviceTensor(info.shape, info.dtype, info.device, tensors[k])
                sides.append(tuple(infos))
            nets[net] = NetInfo(net, *sides, addr_mode, self._llm.get_is_dynamic(net))
        return nets, own_memory

    def _ask(self, side: str, field: str, net: str, *index: int) -> object:
        return getattr(self._llm, f"get_{side}_{field}")(net, *index)

    def _allocate(self, shape: tuple[int, ...], dtype: str, device: int) -> object:
        with self._told(f"No device memory for {dtype} {list(shape)}", [self.devices[device]]):
            code = getattr(self._sail.Dtype, f"BM_{dtype.upper()}")
            return self._sail.Tensor(self._handles[device], list(shape), code, False, True)

    def _view(self, tensor: DeviceTensor, offset_elements: int, shape: tuple[int, ...]) -> object:
        with self._told(f"No view {list(shape)} of {list(tensor.shape)}"):
            return self._sail.Tensor(tensor.memory, list(shape), offset_elements)

    def _write(self, tensor: DeviceTensor, values: np.ndarray) -> None:
        with self._told(f"Could not write a tensor {list(tensor.shape)}"):
            tensor.memory.update_data(values)
            # On a SoC the host sees the memory itself, through its cache; elsewhere this does nothing.
            tensor.memory.sync_s2d()

    def _read(self, tensor: DeviceTensor) -> np.ndarray:
        with self._told(f"Could not read a tensor {list(tensor.shape)}"):
            tensor.memory.sync_d2s()
            return tensor.memory.asnumpy()

    def _copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        with self._told(f"Could not copy a tensor {list(source.shape)}"):
            target.memory.sync_d2d(source.memory, 0, 0, source.count)

    def _run(self, net: str, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
        with self._told(f"The chip could not run {net}"):
            self._llm.process(net, *({k: t.memory for k, t in enumerate(tensors)} for tensors in (inputs, outputs)))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._net_memory.clear()
            self._llm = None
            self._handles = []
