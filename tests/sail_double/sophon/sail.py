"""A double of sophon-sail for machines that cannot have it: the calls of its C++ source (3.9.1 to 3.10.7) that an
engine uses, over the simulator's process. It refuses what 3.10.7 refuses, in its words and exception types.

Where the source would read freed or missing memory, this raises AssertionError. SAIL_DOUBLE_DEVICES devices
(1 if unset) stand for the one simulated chip; one EngineLLM can be open at a time. Given several devices it says of a
net's tensors that they are on these devices by turns, and insists on that.
"""

import enum
import math
import os
import weakref

import numpy as np

from helpers.bmodel.bmodel import read_bmodel
from helpers.errors import UserError
from helpers.run.engines.simulator import SimulatorProcess
from helpers.tensors import ADDR_MODES

__version__ = "double"


class Dtype(enum.Enum):
    BM_FLOAT32 = 0
    BM_FLOAT16 = 1
    BM_INT32 = 6
    BM_BFLOAT16 = 8


ITEM_BYTES = {Dtype.BM_FLOAT32: 4, Dtype.BM_FLOAT16: 2, Dtype.BM_INT32: 4, Dtype.BM_BFLOAT16: 2}
NAMES = {Dtype[f"BM_{name.upper()}"]: name for name in ("float32", "float16", "int32", "bfloat16")}
NUMPY = {Dtype.BM_FLOAT32: "f4", Dtype.BM_FLOAT16: "u2", Dtype.BM_INT32: "i4", Dtype.BM_BFLOAT16: "u2"}
# The overloads of update_data; any other array is converted to the first of them.
OVERLOADS = ("f4", "i1", "u1", "i4", "u4", "i2", "u2")


class SailDeviceError(Exception):
    pass


class SailEngineError(Exception):
    pass


class SailTensorError(Exception):
    pass


_simulated: SimulatorProcess | None = None


def get_available_tpu_num():
    return int(os.environ.get("SAIL_DOUBLE_DEVICES", "1"))


def _process():
    assert _simulated is not None, "the double has device memory only while an EngineLLM is open"
    return _simulated


def _ask(*request):
    try:
        return _process().call(*request)
    except UserError as told:
        if request[0] == "run":
            raise SailEngineError("Engine related error!") from told
        raise RuntimeError(str(told)) from told


class Handle:
    def __init__(self, tpu_id):
        if not 0 <= tpu_id < get_available_tpu_num():
            raise SailDeviceError("init device failure")
        self._id = tpu_id

    def get_device_id(self):
        return self._id


class _Memory:
    """What owns device memory: it is freed when the last Tensor that owns it goes."""

    def __init__(self, address):
        self.address = address


class Tensor:
    """Tensor(handle, shape, dtype, own_sys_data=False, own_dev_data=False), Tensor(src, shape, offset, no_copy=True)"""

    def __init__(self, first, shape, third, *rest, **named):
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise TypeError("incompatible constructor arguments: shape is a list of int")
        self._shape = list(shape)
        if isinstance(first, Tensor) and isinstance(third, (int, np.integer)) and third >= 0:
            self._init_view(first, int(third), *rest, **named)
        elif isinstance(first, Handle) and isinstance(third, Dtype):
            self._init_own(first, third, *rest, **named)
        else:
            raise TypeError("incompatible constructor arguments")

    def _init_own(self, handle, dtype, own_sys_data=False, own_dev_data=False):
        self._device, self._dtype = handle.get_device_id(), dtype
        self._system = np.zeros(self._shape, dtype=NUMPY[dtype]) if own_sys_data else None
        own_dev_data = own_dev_data and bool(self._shape) and min(self._shape) > 0
        self._own = _Memory(_ask("allocate", self.nbytes())) if own_dev_data else None
        self._memory = weakref.ref(self._own) if own_dev_data else None
        self._offset = 0

    def _init_view(self, source, offset, no_copy=True):
        self._device, self._dtype, self._own, self._system = source._device, source._dtype, None, None
        if not self._shape or min(self._shape) <= 0:
            raise SailTensorError("invalid shape")
        if source._memory is None:
            raise SailTensorError("invalid Tensor")
        start = offset * ITEM_BYTES[self._dtype]
        if start + self.nbytes() > source.nbytes():
            raise SailTensorError("size out of range")
        if not no_copy:
            raise SailTensorError("not supported")
        if source._system is not None:
            self._system = source._system.reshape(-1)[offset : offset + self.size()].reshape(self._shape)
        self._memory, self._offset = source._memory, source._offset + start

    def _address(self):
        memory = self._memory and self._memory()
        assert memory is not None, "this view outlived the Tensor whose memory it is"
        return memory.address + self._offset

    def shape(self):
        return list(self._shape)

    def dtype(self):
        return self._dtype

    def device_id(self):
        return self._device

    def size(self):
        return math.prod(self._shape)

    def nbytes(self):
        return self.size() * ITEM_BYTES[self._dtype]

    def is_dev_data_valid(self):
        return self._memory is not None

    def is_sys_data_valid(self):
        return self._system is not None

    def update_data(self, data):
        if not isinstance(data, np.ndarray):
            raise TypeError("incompatible function arguments")
        if data.dtype.str[1:] not in OVERLOADS:
            data = data.astype(np.float32)
        if list(data.shape) != self._shape:
            raise SailTensorError("invalid argument")
        wanted = np.dtype(NUMPY[self._dtype])
        only_size = self._dtype in (Dtype.BM_FLOAT16, Dtype.BM_BFLOAT16)
        if data.itemsize != wanted.itemsize or not (only_size or data.dtype == wanted):
            raise SailTensorError("Wrong dtype of input array!")
        if self._system is not None:
            self._system[...] = data.view(wanted)
        elif self._memory is not None:
            _ask("write", self._address(), data.tobytes())
        else:
            raise SailTensorError("invalid Tensor")

    def asnumpy(self):
        if self._system is not None:
            return self._system.copy()
        if self._memory is None:
            raise SailTensorError("invalid Tensor")
        data = _ask("read", self._address(), self.nbytes())
        return np.frombuffer(bytearray(data), dtype=NUMPY[self._dtype]).reshape(self._shape)

    def sync_s2d(self):
        if self._system is not None and self._memory is not None:
            _ask("write", self._address(), self._system.tobytes())

    def sync_d2s(self):
        if self._system is not None and self._memory is not None:
            data = _ask("read", self._address(), self.nbytes())
            self._system[...] = np.frombuffer(data, dtype=NUMPY[self._dtype]).reshape(self._shape)

    def sync_d2d(self, src, offset_src, offset_dst, len):
        if self._dtype != src._dtype:
            raise SailTensorError("mismatch Tensor")
        if self._memory is None or src._memory is None:
            raise SailTensorError("invalid Tensor")
        if offset_src + len > src.size() or offset_dst + len > self.size():
            raise SailTensorError("size out of range")
        assert self._device == src._device, "sync_d2d stays on one device"
        item = ITEM_BYTES[self._dtype]
        offset_src, offset_dst, len = int(offset_src), int(offset_dst), int(len)
        _ask("copy", src._address() + offset_src * item, self._address() + offset_dst * item, len * item)


class EngineLLM:
    """EngineLLM(path, tpu_ids) or EngineLLM(path, flags, tpu_ids)"""

    def __init__(self, bmodel_path, *rest):
        global _simulated
        tpu_ids = rest[-1]
        if not isinstance(bmodel_path, str) or not isinstance(tpu_ids, list):
            raise TypeError("incompatible constructor arguments")
        if not tpu_ids:
            raise SailEngineError("EngineLLM device_ids error!")
        if not os.path.exists(bmodel_path):
            raise SailEngineError("EngineLLM bmodel error!")
        for tpu_id in tpu_ids:
            Handle(tpu_id)
        assert _simulated is None, "the double holds one EngineLLM at a time"
        try:
            described = read_bmodel(bmodel_path)
            process = SimulatorProcess("yield", described.device_bytes)
        except UserError:
            raise SailEngineError("EngineLLM related error!") from None
        try:
            process.call("open", os.path.abspath(bmodel_path))
        except UserError:
            process.close()
            raise SailEngineError("EngineLLM related error!") from None
        self._nets = {}
        for name, net in described.nets.items():
            sides = zip((net.info.inputs, net.info.outputs), process.call("addresses", name), strict=True)
            sides = ([(t.name, t.shape, t.dtype, a) for t, a in zip(*side, strict=True)] for side in sides)
            self._nets[name] = (*sides, ADDR_MODES.index(net.info.addr_mode), net.info.dynamic)
        _simulated = process
        self._ids = tpu_ids
        self._finalizer = weakref.finalize(self, _closed, process)
        self._internal = {
            (net, kind): self._tensors(net, kind, lambda k, tensor: _Memory(tensor[3]))
            for net in self._nets
            for kind in (0, 1)
        }

    def _tensors(self, net, kind, memory):
        made = {}
        for k, described in enumerate(self._nets[net][kind]):
            tensor = Tensor(Handle(self._device(k)), list(described[1]), Dtype[f"BM_{described[2].upper()}"])
            tensor._own = memory(k, described)
            tensor._memory = weakref.ref(tensor._own)
            made[k] = tensor
        return made

    def _net(self, net):
        if net not in self._nets:
            raise IndexError("map::at")
        return self._nets[net]

    def get_device_ids(self):
        return list(self._ids)

    def get_graph_names(self):
        return list(self._nets)

    def get_addr_mode(self, net):
        return self._net(net)[2]

    def get_is_dynamic(self, net):
        return self._net(net)[3]

    def get_stage_num(self, net):
        return 1

    def get_input_num(self, net):
        return len(self._net(net)[0])

    def get_output_num(self, net):
        return len(self._net(net)[1])

    def get_input_name(self, net, index):
        return self._net(net)[0][index][0]

    def get_output_name(self, net, index):
        return self._net(net)[1][index][0]

    def get_input_shape(self, net, index, stage=0):
        return list(self._net(net)[0][index][1])

    def get_output_shape(self, net, index, stage=0):
        return list(self._net(net)[1][index][1])

    def get_input_dtype(self, net, index):
        return Dtype[f"BM_{self._net(net)[0][index][2].upper()}"]

    def get_output_dtype(self, net, index):
        return Dtype[f"BM_{self._net(net)[1][index][2].upper()}"]

    def _device(self, index):
        return self._ids[index % len(self._ids)]

    def get_input_tensor_devid(self, net, index):
        return self._device(index)

    def get_output_tensor_devid(self, net, index):
        return self._device(index)

    def get_input_tensors(self, net, stage=0):
        return self._internal[net, 0] if self.get_addr_mode(net) == 1 else {}

    def get_output_tensors(self, net, stage=0):
        return self._internal[net, 1] if self.get_addr_mode(net) == 1 else {}

    def get_input_tensors_addrmode0(self, net, stage=0):
        self._net(net)
        return self._internal[net, 0]

    def get_output_tensors_addrmode0(self, net, stage=0):
        self._net(net)
        return self._internal[net, 1]

    def create_max_input_tensors(self, net):
        return self._tensors(net, 0, self._allocated)

    def create_max_output_tensors(self, net):
        return self._tensors(net, 1, self._allocated)

    @staticmethod
    def _allocated(index, described):
        name = described[2]
        size = math.prod(described[1]) * ITEM_BYTES[Dtype[f"BM_{name.upper()}"]]
        return _Memory(_ask("allocate", size))

    def process(self, graph_name, input, output, core_list=(0,)):
        described = self._net(graph_name)
        tensors = []
        for infos, given in ((described[0], input), (described[1], output)):
            if not isinstance(given, dict) or not all(isinstance(tensor, Tensor) for tensor in given.values()):
                raise TypeError("incompatible function arguments")
            assert set(given) >= set(range(len(infos))), "an index that is not in the map is a null pointer"
            for k in range(len(infos)):
                assert given[k].device_id() == self._device(k), "the net's part on this device cannot reach this tensor"
            # Whatever the tensor's dtype, the net's is taken; shapes are left to the runtime: it looks at inputs only.
            tensors.append([(given[k]._address(), given[k].shape(), info[2]) for k, info in enumerate(infos)])
        for k, info in enumerate(described[1]):
            needed = math.prod(info[1]) * ITEM_BYTES[Dtype[f"BM_{info[2].upper()}"]]
            assert described[3] or needed <= output[k].nbytes(), "the net would write past the end of this tensor"
        _ask("run", graph_name, *tensors)


def _closed(process):
    global _simulated
    if _simulated is process:
        _simulated = None
    process.close()
