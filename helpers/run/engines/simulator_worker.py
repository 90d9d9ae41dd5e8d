"""The process that holds the simulated chip: serves one engine over a pipe, through the C API of Sophgo's runtime.

Started by simulator.py as a plain file under `python -I`: it imports the standard library only, so it starts in
milliseconds, and nothing that a bmodel does to it reaches the caller. Device memory is addressed as on the chip.

    simulator_worker.py LIBRARIES PIPE_FD PARENT_PID

Its first message is whether the library of simulator_yield.c is loaded; the folder in which it was started, with a
libcmodel.so, is not needed after it. A request is a tuple (operation, *arguments), a method of Simulator; its answer is
("ok", what it returns) or ("error", message).
"""

import contextlib
import ctypes
import os
import resource
import sys
import threading
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_size_t, c_uint, c_ulong, c_void_p
from multiprocessing.connection import Connection

QUIET_SECONDS = 0.05
PARENT_POLL_SECONDS = 0.5
LOG_LIMIT_BYTES = 1 << 20
# bm_data_type_t, bmdef.h, and bytes of an element
DTYPES = {"float32": (0, 4), "float16": (1, 2), "int32": (6, 4), "bfloat16": (8, 2)}


class DeviceMemory(Structure):
    """bm_device_mem_t, bmlib_runtime.h"""

    _fields_ = [("address", c_ulong), ("reserved", c_uint), ("dmabuf", c_int), ("flags", c_uint), ("size", c_uint)]


class Shape(Structure):
    """bm_shape_t, bmdef.h"""

    _fields_ = [("dimensions", c_int), ("sizes", c_int * 8)]


class Tensor(Structure):
    """bm_tensor_t, bmdef.h"""

    _fields_ = [("dtype", c_int), ("shape", Shape), ("memory", DeviceMemory), ("store_mode", c_int)]


class Stage(Structure):
    """bm_stage_info_t, bmdef.h"""

    _fields_ = [("shapes", c_void_p * 2), ("inputs", POINTER(DeviceMemory)), ("outputs", POINTER(DeviceMemory))]


class Net(Structure):
    """The beginning of bm_net_info_t, bmdef.h"""

    _fields_ = [
        ("name", c_char_p),
        ("dynamic", c_bool),
        ("inputs", c_int),
        ("input_names_dtypes_scales", c_void_p * 3),
        ("outputs", c_int),
        ("output_names_dtypes_scales", c_void_p * 3),
        ("stages", c_int),
        ("stage", POINTER(Stage)),
    ]


class Refused(Exception):
    """Told to the caller; the worker goes on."""


def refuse(status, function, arguments):
    if status:
        raise Refused(f"{function.__name__} failed with bmlib status {status}")


class Simulator:
    def __init__(self, libraries):
        ctypes.CDLL("libcmodel.so")  # bmlib asks for it by this name
        self.bmlib = bmlib = ctypes.CDLL(os.path.join(libraries, "libbmlib_bm1684x.so.0"), mode=ctypes.RTLD_GLOBAL)
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
            (bmrt, "bmrt_get_network_info", POINTER(Net), [c_void_p, c_char_p]),
            (bmrt, "bmrt_launch_tensor_ex", c_bool, [c_void_p, c_char_p, *[tensors, c_int] * 2, c_bool, c_bool]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            if library is bmlib:
                function.errcheck = refuse
        self.handle = c_void_p()
        self.runtime = None

    def open(self, path):
        self.bmlib.bm_dev_request(ctypes.byref(self.handle), 0)
        self.runtime = self.bmrt.bmrt_create(self.handle)
        if not self.bmrt.bmrt_load_bmodel(self.runtime, os.fsencode(path)):
            raise Refused("Sophgo's runtime refused to load it")

    def addresses(self, name):
        """Of a net's inputs and of its outputs. With addr_mode basic they are shared with intermediate results."""
        net = self.bmrt.bmrt_get_network_info(self.runtime, name.encode()).contents
        stage = net.stage[0]
        sides = (stage.inputs, net.inputs), (stage.outputs, net.outputs)
        return [[memory[k].address for k in range(count)] for memory, count in sides]

    def allocate(self, size):
        memory = DeviceMemory()
        self.bmlib.bm_malloc_device_byte(self.handle, ctypes.byref(memory), size)
        self.write(memory.address, bytes(size))
        return memory.address

    def write(self, address, data):
        self.bmlib.bm_memcpy_s2d(self.handle, memory_at(address, len(data)), data)

    def read(self, address, size):
        data = ctypes.create_string_buffer(size)
        self.bmlib.bm_memcpy_d2s(self.handle, data, memory_at(address, size))
        return data.raw

    def copy(self, source, target, size):
        self.bmlib.bm_memcpy_d2d_byte(self.handle, memory_at(target, size), 0, memory_at(source, size), 0, size)

    def run(self, net, inputs, outputs):
        """inputs, outputs: lists of (address, shape, dtype)."""
        sources, targets = tensor_array(inputs), tensor_array(outputs)
        launched = self.bmrt.bmrt_launch_tensor_ex(
            self.runtime, net.encode(), sources, len(inputs), targets, len(outputs), True, False
        )
        if not launched:
            raise Refused(f"Sophgo's runtime could not run {net}")
        self.bmlib.bm_thread_sync(self.handle)


def memory_at(address, size):
    return DeviceMemory(address=address, size=size)


def tensor_array(tensors):
    array = (Tensor * len(tensors))()
    for slot, (address, shape, dtype) in zip(array, tensors, strict=True):
        slot.dtype, size = DTYPES[dtype]
        for k, extent in enumerate(shape):
            slot.shape.sizes[k] = extent
            size *= extent
        slot.shape.dimensions = len(shape)
        slot.memory = memory_at(address, size)
    return array


@contextlib.contextmanager
def one_core(libc):
    """Hold all threads on the core where the caller is, while they compute; the next time it may be another one.

    The simulated chip's engines take turns. On cores of their own those that wait poll, for as much processor time
    as the one that works, and no answer comes sooner: benchmarks/simulator_speed.py. Needs the preloaded library,
    without which the one that works would wait for each poller's time slice.
    """
    allowed, core = os.sched_getaffinity(0), libc.sched_getcpu()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread), {core})
    try:
        yield
    finally:
        # Only this thread: where it is woken for the next request, the others follow.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def exit_with_parent(parent):
    """End this process soon after the caller's, however that one ended, also in the middle of a run."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(0)


def serve(simulator, connection, libc):
    yields = hasattr(libc, "simulator_idle")
    connection.send(yields)
    while True:
        if yields and not connection.poll(QUIET_SECONDS):
            libc.simulator_idle(1)
        operation, *arguments = connection.recv()
        if yields:
            libc.simulator_idle(0)
        if os.fstat(1).st_size > LOG_LIMIT_BYTES:
            os.ftruncate(1, 0)
        try:
            with one_core(libc) if yields and operation == "run" else contextlib.nullcontext():
                answer = "ok", getattr(simulator, operation)(*arguments)
        except Refused as refusal:
            answer = "error", str(refusal)
        connection.send(answer)


def main():
    libraries, pipe, parent = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Line by line: what a process that aborts has in its buffers is lost.
    libc = ctypes.CDLL(None)
    libc.setvbuf(c_void_p.in_dll(libc, "stdout"), None, 1, 0)
    threading.Thread(target=exit_with_parent, args=(int(parent),), daemon=True).start()
    try:
        serve(Simulator(libraries), Connection(int(pipe)), libc)
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        # At once: the caller takes the end of the conversation for the end of this process.
        sys.excepthook(*sys.exc_info())
        os._exit(1)


if __name__ == "__main__":
    main()
