"""The process that holds the simulated chip: serves one engine over a pipe, through the C API of Sophgo's runtime.

Started by simulator.py as a plain file under `python -I`: it imports the standard library only, so it starts in
milliseconds, and nothing that a bmodel does to it reaches the caller. Device memory is addressed as on the chip.

    simulator_worker.py LIBRARIES PIPE_FD PARENT_PID SCRATCH_FOLDER yield|priority|plain

Its first message is whether the library of simulator_yield.c is loaded. Requests are tuples (operation, *arguments),
one answer each: ("ok", value) or ("error", message). Data follows the request of a write and the answer of a read as a
message of its own.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import sys
import threading
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulong, c_void_p
from multiprocessing.connection import Connection

QUIET_SECONDS = 0.05
PARENT_POLL_SECONDS = 0.5
LOG_LIMIT_BYTES = 1 << 20
# bm_data_type_t, bmdef.h
DTYPES = {0: "float32", 1: "float16", 6: "int32", 8: "bfloat16"}
DTYPE_CODES = {name: code for code, name in DTYPES.items()}
ITEM_BYTES = {"float32": 4, "float16": 2, "int32": 4, "bfloat16": 2}


class DeviceMemory(Structure):
    """bm_device_mem_t, bmlib_runtime.h"""

    _fields_ = [("address", c_ulong), ("reserved", c_uint), ("dmabuf", c_int), ("flags", c_uint), ("size", c_uint)]


class Shape(Structure):
    """bm_shape_t, bmdef.h"""

    _fields_ = [("dimensions", c_int), ("sizes", c_int * 8)]

    def as_tuple(self):
        return tuple(self.sizes[: self.dimensions])


class Tensor(Structure):
    """bm_tensor_t, bmdef.h"""

    _fields_ = [("dtype", c_int), ("shape", Shape), ("memory", DeviceMemory), ("store_mode", c_int)]


class Stage(Structure):
    """bm_stage_info_t, bmdef.h"""

    _fields_ = [
        ("input_shapes", POINTER(Shape)),
        ("output_shapes", POINTER(Shape)),
        ("input_memory", POINTER(DeviceMemory)),
        ("output_memory", POINTER(DeviceMemory)),
    ]


class Net(Structure):
    """bm_net_info_t, bmdef.h"""

    _fields_ = [
        ("name", c_char_p),
        ("dynamic", c_bool),
        ("inputs", c_int),
        ("input_names", POINTER(c_char_p)),
        ("input_dtypes", POINTER(c_int)),
        ("input_scales", POINTER(c_float)),
        ("outputs", c_int),
        ("output_names", POINTER(c_char_p)),
        ("output_dtypes", POINTER(c_int)),
        ("output_scales", POINTER(c_float)),
        ("stages", c_int),
        ("stage", POINTER(Stage)),
        ("max_input_bytes", POINTER(c_size_t)),
        ("max_output_bytes", POINTER(c_size_t)),
        ("input_zero_points", POINTER(c_int)),
        ("output_zero_points", POINTER(c_int)),
        ("input_devices", POINTER(c_int)),
        ("output_devices", POINTER(c_int)),
        ("cores", c_int),
        ("addr_mode", c_int),
    ]


class Refused(Exception):
    """Told to the caller; the worker goes on."""


class Simulator:
    def __init__(self, libraries):
        self.bmlib = bmlib = ctypes.CDLL(os.path.join(libraries, "libbmlib.so.0"), mode=ctypes.RTLD_GLOBAL)
        self.bmrt = bmrt = ctypes.CDLL(os.path.join(libraries, "libbmrt.so.1.0"), mode=ctypes.RTLD_GLOBAL)
        tensors = POINTER(Tensor)
        for library, name, result, arguments in (
            (bmlib, "bm_dev_request", c_int, [POINTER(c_void_p), c_int]),
            (bmlib, "bm_malloc_device_byte", c_int, [c_void_p, POINTER(DeviceMemory), c_uint]),
            (bmlib, "bm_memcpy_s2d", c_int, [c_void_p, DeviceMemory, c_void_p]),
            (bmlib, "bm_memcpy_d2s", c_int, [c_void_p, c_void_p, DeviceMemory]),
            (bmlib, "bm_memcpy_d2d_byte", c_int, [c_void_p, *[DeviceMemory, c_size_t] * 2, c_size_t]),
            (bmlib, "bm_thread_sync", c_int, [c_void_p]),
            (bmrt, "bmrt_create", c_void_p, [c_void_p]),
            (bmrt, "bmrt_load_bmodel", c_bool, [c_void_p, c_char_p]),
            (bmrt, "bmrt_get_network_number", c_int, [c_void_p]),
            (bmrt, "bmrt_get_network_names", None, [c_void_p, POINTER(POINTER(c_char_p))]),
            (bmrt, "bmrt_get_network_info", POINTER(Net), [c_void_p, c_char_p]),
            (bmrt, "bmrt_launch_tensor_ex", c_bool, [c_void_p, c_char_p, *[tensors, c_int] * 2, c_bool, c_bool]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.handle = c_void_p()
        self.runtime = None

    def open(self, path):
        """Load a bmodel; return {net: (inputs, outputs, addr_mode, dynamic)}, tensors as (name, shape, dtype, address).

        With addr_mode basic an address is shared with the net's intermediate results.
        """
        if status := self.bmlib.bm_dev_request(ctypes.byref(self.handle), 0):
            raise Refused(f"the simulated device could not be opened (bmlib status {status})")
        self.runtime = self.bmrt.bmrt_create(self.handle)
        if not self.bmrt.bmrt_load_bmodel(self.runtime, os.fsencode(path)):
            raise Refused("Sophgo's runtime refused to load it")
        names = POINTER(c_char_p)()
        self.bmrt.bmrt_get_network_names(self.runtime, ctypes.byref(names))
        return {
            names[k].decode(): self._describe(names[k]) for k in range(self.bmrt.bmrt_get_network_number(self.runtime))
        }

    def _describe(self, name):
        net = self.bmrt.bmrt_get_network_info(self.runtime, name).contents
        stage = net.stage[0]

        def tensors(count, names, dtypes, shapes, memory):
            return [
                (
                    names[k].decode(),
                    shapes[k].as_tuple(),
                    DTYPES.get(dtypes[k], f"bm_data_type_t {dtypes[k]}"),
                    memory[k].address,
                )
                for k in range(count)
            ]

        return (
            tensors(net.inputs, net.input_names, net.input_dtypes, stage.input_shapes, stage.input_memory),
            tensors(net.outputs, net.output_names, net.output_dtypes, stage.output_shapes, stage.output_memory),
            net.addr_mode,
            net.dynamic,
        )

    def allocate(self, size):
        memory = DeviceMemory()
        if status := self.bmlib.bm_malloc_device_byte(self.handle, ctypes.byref(memory), size):
            raise Refused(f"no device memory for {size} more bytes (bmlib status {status})")
        self.write(memory.address, bytes(size))
        return memory.address

    def write(self, address, data):
        self._check(self.bmlib.bm_memcpy_s2d(self.handle, memory_at(address, len(data)), data), "bm_memcpy_s2d")

    def read(self, address, size):
        data = ctypes.create_string_buffer(size)
        self._check(self.bmlib.bm_memcpy_d2s(self.handle, data, memory_at(address, size)), "bm_memcpy_d2s")
        return data

    def copy(self, source, target, size):
        status = self.bmlib.bm_memcpy_d2d_byte(
            self.handle, memory_at(target, size), 0, memory_at(source, size), 0, size
        )
        self._check(status, "bm_memcpy_d2d_byte")

    def run(self, net, inputs, outputs):
        """inputs, outputs: lists of (address, shape, dtype)."""
        sources, targets = tensor_array(inputs), tensor_array(outputs)
        launched = self.bmrt.bmrt_launch_tensor_ex(
            self.runtime, net.encode(), sources, len(inputs), targets, len(outputs), True, False
        )
        if not launched:
            raise Refused(f"Sophgo's runtime could not run {net}")
        self._check(self.bmlib.bm_thread_sync(self.handle), "bm_thread_sync")

    def _check(self, status, call):
        if status:
            raise Refused(f"{call} failed with bmlib status {status}")


def memory_at(address, size):
    return DeviceMemory(address=address, size=size)


def tensor_array(tensors):
    array = (Tensor * len(tensors))()
    for slot, (address, shape, dtype) in zip(array, tensors, strict=True):
        size = ITEM_BYTES[dtype]
        for k, extent in enumerate(shape):
            slot.shape.sizes[k] = extent
            size *= extent
        slot.shape.dimensions = len(shape)
        slot.dtype = DTYPE_CODES[dtype]
        slot.memory = memory_at(address, size)
    return array


def demote_idle_engines():
    """Without the preloaded library: let the engines that no net of a language model uses run only when others wait.

    TPU_SORT is not one of them: the heads' TopK runs on it, and would take seconds where other programs are busy.
    """
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/comm") as file:
            if file.read().strip() in ("TPU_GDE", "TPU_NMS"):
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))


class OneCore:
    """Holds all threads on the core where the caller is, while they compute; the next time it may be another one.

    The simulated chip's engines take turns. On cores of their own those that wait poll, for as much processor time
    as the one that works, and no answer comes sooner: benchmarks/simulator_speed.py. Needs the preloaded library,
    without which the one that works would wait for each poller's time slice.
    """

    def __init__(self, libc):
        self._getcpu = libc.sched_getcpu
        self._allowed = os.sched_getaffinity(0)

    def __enter__(self):
        core = self._getcpu()
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(int(thread), {core})

    def __exit__(self, *_):
        # Only this thread: where it is woken for the next request, the others follow.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, self._allowed)


def exit_with_parent(parent, scratch):
    """End this process soon after the caller's, however that one ended, also in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    end(scratch)


def end(scratch):
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def serve(simulator, connection, set_idle, one_core, scheduling):
    operations = {"open", "allocate", "read", "copy", "run"}
    while True:
        if set_idle and not connection.poll(QUIET_SECONDS):
            set_idle(1)
        operation, *arguments = connection.recv()
        if set_idle:
            set_idle(0)
        if os.fstat(1).st_size > LOG_LIMIT_BYTES:
            os.ftruncate(1, 0)
        try:
            if operation == "write":
                value = simulator.write(*arguments, connection.recv_bytes())
            elif operation in operations:
                with one_core if operation == "run" else contextlib.nullcontext():
                    value = getattr(simulator, operation)(*arguments)
            else:
                raise Refused(f"no operation {operation}")
        except Refused as refusal:
            connection.send(("error", str(refusal)))
            continue
        if operation == "open" and scheduling != "plain" and not set_idle:
            demote_idle_engines()
        if operation == "read":
            connection.send(("ok", None))
            connection.send_bytes(value)
        else:
            connection.send(("ok", value))


def main():
    libraries, pipe, parent, scratch, scheduling = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Line by line: what a process that aborts has in its buffers is lost.
    libc = ctypes.CDLL(None)
    libc.setvbuf(c_void_p.in_dll(libc, "stdout"), None, 1, 0)
    threading.Thread(target=exit_with_parent, args=(int(parent), scratch), daemon=True).start()
    set_idle = getattr(libc, "simulator_idle", None)
    connection = Connection(int(pipe))
    try:
        connection.send(set_idle is not None)
        one_core = OneCore(libc) if set_idle else contextlib.nullcontext()
        serve(Simulator(libraries), connection, set_idle, one_core, scheduling)
    except (EOFError, ConnectionError):
        end(scratch)
    except BaseException:
        # At once: the caller takes the end of the conversation for the end of this process.
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main()
