"""The simulator engine and the choice of engine, on a real bmodel and the real simulator."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import machine
from helpers.bmodel import bmodel
from helpers.errors import UserError
from helpers.run import sail_package
from helpers.run.engines import on_each_bmodel, open_engine, simulator
from helpers.run.engines import sail as sail_engine
from tests.engine_bmodel import ROOT, build
from tests.engine_contract import PAST, STATES, EngineContract, bf16, run_cache
from tests.engine_nets import WIDTH
from tests.sail_contract import SailContract


@pytest.fixture(scope="session")
def bmodels():
    return build()


class TestSimulator(EngineContract):
    @pytest.fixture
    def open_it(self, bmodels):
        return lambda mode: open_engine(bmodels[mode], engine="simulator")


def process_of(engine) -> int:
    return engine._worker._process.pid


# No machine is so slow or busy that what comes at all comes later; what never comes is waited for so long.
PATIENCE = 300


def lives(pid: int) -> bool:
    """Whether a process that is not our child runs (one that nobody has waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    """Whether such a process ends."""
    deadline = time.monotonic() + PATIENCE
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not lives(pid)


def in_background(engine):
    """Runs `cache` over and over in a thread, which is at it; the thread, and where its exception will be."""
    inputs = [engine.input_tensor("cache", k) for k in range(2)]
    outputs = [engine.output_tensor("cache", k) for k in range(2)]
    failure, ran = [], threading.Event()

    def work():
        try:
            while True:
                engine.run("cache", inputs, outputs)
                ran.set()
        except UserError as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ran.wait(PATIENCE)
    return thread, failure


@pytest.mark.parametrize("engine", ["simulator", "chip"])
def test_a_file_is_read_once_and_what_it_takes_on_the_device_is_known(bmodels, sail, monkeypatch, engine):
    described = bmodel.read_bmodel(bmodels["io_alone"])
    reads, module = [], {"simulator": simulator, "chip": sail_engine}[engine]
    monkeypatch.setattr(module, "runnable_bmodel", lambda path, devices: reads.append(path) or described)
    with open_engine(bmodels["io_alone"], engine=engine) as opened:
        assert opened.device_bytes == described.device_bytes > described.weight_bytes > 0
    assert reads == [bmodels["io_alone"]]


# --- the process dies


def test_killed_in_the_middle_of_a_run(bmodels):
    with open_engine(bmodels["io_alone"], engine="simulator") as engine:
        thread, failure = in_background(engine)
        os.kill(process_of(engine), signal.SIGKILL)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert "ended with SIGKILL, most likely because the machine ran out of memory" in str(failure[0])
        with pytest.raises(UserError, match="SIGKILL"):
            engine.allocate((1,), "int32")
    with open_engine(bmodels["io_alone"], engine="simulator") as engine:
        run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])


def test_out_of_device_memory_is_told(bmodels):
    with open_engine(bmodels["io_alone"], engine="simulator") as engine:
        for _ in range(3):
            engine.allocate((16 << 20,), "int32")
        with pytest.raises(UserError, match=r"The simulator stopped: .* last words: Memory exhausted") as caught:
            for _ in range(20):
                engine.allocate((16 << 20,), "int32")
        assert "\n" not in str(caught.value)


def test_the_runtimes_last_words_are_told(bmodels, monkeypatch):
    for name in ("FIRMWARE_BYTES", "RUNTIME_BYTES"):
        monkeypatch.setattr(simulator, name, 0)
    with pytest.raises(UserError) as caught:
        open_engine(bmodels["io_alone"], engine="simulator")
    assert "The runtime's last words: Memory exhausted: cannot find a slot." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_make_the_runtime_abort(bmodels, tmp_path):
    """The description of the file is whole, so that it is loaded; the firmware and instructions in it are not."""
    whole = bytearray(bmodels["io_alone"].read_bytes())
    half = len(whole) // 50
    whole[half:] = bytes(len(whole) - half)
    broken = tmp_path / "broken.bmodel"
    broken.write_bytes(whole)
    try:
        with open_engine(broken, engine="simulator") as engine:
            pid = process_of(engine)
            run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
    except UserError as error:
        assert "\n" not in str(error)
    else:
        # It may also compute nonsense; then it must still let itself be closed.
        assert gone(pid)


@pytest.mark.parametrize(
    "content, said",
    [(b"", "it is empty"), (b"not a bmodel" * 100, "is not a bmodel"), (None, "No such file"), ("half", "is cut off")],
)
def test_files_that_are_no_bmodel(bmodels, tmp_path, content, said):
    file = tmp_path / "a.bmodel"
    if content == "half":
        content = bmodels["basic"].read_bytes()[:100_000]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        open_engine(file, engine="simulator")


def test_a_file_that_only_the_runtime_finds_bad(bmodels, tmp_path, monkeypatch):
    """Should the file pass our own reading, the runtime's abort still ends in one sentence."""
    described = bmodel.read_bmodel(bmodels["basic"])
    file = tmp_path / "a.bmodel"
    file.write_bytes(bmodels["basic"].read_bytes()[:3_000])
    monkeypatch.setattr(simulator, "runnable_bmodel", lambda path, devices: described)
    with pytest.raises(UserError, match=r"a\.bmodel could not be opened: .* The runtime's last words: .*FATAL.*broken"):
        open_engine(file, engine="simulator")


def test_refusals_before_anything_starts(bmodels, monkeypatch):
    described = bmodel.read_bmodel(bmodels["basic"])
    for change, said in (
        ({"device_num": 2}, r"compiled for 2 device\(s\) and was given 1.*--devid 0,1"),
        ({"chip": "BM1688"}, "for the chip BM1688, BM1684X is needed"),
    ):
        monkeypatch.setattr(bmodel, "read_bmodel", lambda path, c=change: dataclasses.replace(described, **c))
        with pytest.raises(UserError, match=said):
            open_engine(bmodels["basic"], engine="simulator")
    monkeypatch.setattr(bmodel, "read_bmodel", lambda path: described)
    monkeypatch.setattr(machine, "free_memory", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"needs about 0\.0 GB of memory .* 0\.0 GB are free"):
        open_engine(bmodels["basic"], engine="simulator")


# --- nothing is left behind

CALLER = """
import os, sys, time
from helpers.run.engines import open_engine
from tests.engine_contract import *
engine = open_engine(sys.argv[1], engine="simulator")
inputs = [engine.input_tensor("cache", k) for k in range(2)]
outputs = [engine.output_tensor("cache", k) for k in range(2)]
engine.run("cache", inputs, outputs)
print(engine._worker._process.pid, flush=True)
"""


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary files are."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def caller(bmodels, code):
    """A process that opens an engine and goes on with `code`; it and its worker's pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER + code, str(bmodels["io_alone"])],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("code", ["time.sleep(3600)", "while True: engine.run('cache', inputs, outputs)"])
def test_the_worker_ends_when_its_caller_is_killed(bmodels, scratch, code):
    process, worker = caller(bmodels, code)
    assert lives(worker)
    process.kill()
    process.communicate()
    assert gone(worker)
    assert os.listdir(scratch) == []


def test_the_worker_ends_though_another_process_holds_the_pipe(bmodels, scratch):
    """The caller's forked children inherit its end of the pipe: that the pipe is closed cannot be waited for."""
    code = """
if child := os.fork():
    print(child, flush=True)
else:
    os.close(1)
    os.close(2)
time.sleep(3600)
"""
    process, worker = caller(bmodels, code)
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.communicate()
        assert gone(worker) and lives(child)
        assert os.listdir(scratch) == []
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("code", ["", "raise SystemExit(3)", "engine.close()"])
def test_the_worker_ends_when_its_caller_ends(bmodels, scratch, code):
    process, worker = caller(bmodels, code)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (3 if "3" in code else 0)
    assert gone(worker)
    assert os.listdir(scratch) == []


def test_ctrl_c_leaves_the_engine_of_use(bmodels):
    code = """
engine.write(inputs[0], bf16(STATES, 1)[0])
engine.write(inputs[1], bf16(PAST, 2)[0])
interrupted = 0
while interrupted < 5:
    try:
        print("running", flush=True)
        while True:
            engine.run("cache", inputs, outputs)
            engine.read(inputs[1])
    except KeyboardInterrupt:
        interrupted += 1
assert (engine.read(inputs[1]) == bf16(PAST, 2)[0]).all()
engine.run("cache", inputs, outputs)
print("went on", flush=True)
"""
    process, worker = caller(bmodels, code)
    for k in range(5):
        assert process.stdout.readline() == "running\n"
        time.sleep(0.05 + 0.013 * k)  # now here, now there in the conversation
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the whole group
    out, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (0, "went on\n"), errors
    assert gone(worker)


def test_close_does_not_wait_for_a_run(bmodels):
    engine = open_engine(bmodels["basic"], engine="simulator")
    thread, failure = in_background(engine)
    pid = process_of(engine)
    os.kill(pid, signal.SIGSTOP)  # a run that never ends
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    thread.join(PATIENCE)
    assert "closed" in str(failure[0])
    assert not Path(f"/proc/{pid}").exists()


def test_an_engine_that_is_forgotten_is_closed(bmodels):
    engine = open_engine(bmodels["basic"], engine="simulator")
    pid = process_of(engine)
    del engine
    assert gone(pid)


def test_a_forked_copy_of_the_caller_leaves_the_engine_alone(bmodels):
    code = """
import os, sys
child = os.fork()
if child == 0:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
engine.run("cache", inputs, outputs)
engine.close()
"""
    process, worker = caller(bmodels, code)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert gone(worker)


# --- the simulator's threads


def answers(file, scheduling):
    """Outputs of all nets, as bytes; decode-like use with rows written into the cache."""
    found = []
    with simulator.SimulatorEngine(file, scheduling) as engine:
        assert engine.scheduling == scheduling
        cache = engine.input_tensor("cache", 1)
        states, target = engine.input_tensor("cache", 0), engine.output_tensor("cache", 0)
        engine.write(cache, bf16(PAST, 1)[0])
        for row in range(3):
            engine.write(states, bf16(STATES, 100 + row)[0])
            engine.run("cache", [states, cache], [target, engine.view(cache, row * WIDTH, STATES)])
            found += [engine.read(target).tobytes(), engine.read(cache).tobytes()]
        logits, token = engine.output_tensor("logits", 0), engine.output_tensor("greedy_head", 0)
        engine.copy(target, engine.view(engine.input_tensor("logits", 0), 0, STATES))
        engine.run("logits", [engine.input_tensor("logits", 0)], [logits])
        engine.run("greedy_head", [logits], [token])
        found += [engine.read(logits).tobytes(), engine.read(token).tobytes()]
    return found


@pytest.mark.parametrize("mode", ["basic", "io_alone"])
def test_outputs_are_the_same_bits_however_the_threads_are_scheduled(bmodels, mode):
    plain = answers(bmodels[mode], "plain")
    assert len(set(plain)) == len(plain)
    assert answers(bmodels[mode], "yield") == plain


def yields(engine) -> bool:
    """Whether the library is in the simulator's process, and its engine says nothing else."""
    # What the loader gives up amid its work stays mapped, but for its code.
    maps = [line.split() for line in Path(f"/proc/{process_of(engine)}/maps").read_text().splitlines()]
    loaded = any("x" in permissions and "simulator_yield" in " ".join(name) for _, permissions, *name in maps)
    assert (engine.scheduling == "yield") == loaded == ("do not yield" not in engine.reason)
    run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
    return loaded


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """add(name, script): a program; all that the PATH has."""
    folder = tmp_path / "programs"
    folder.mkdir()
    real = shutil.which("cc")
    monkeypatch.setenv("PATH", str(folder))

    def add(name, script):
        (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{script.format(cc=real)}\n")
        (folder / name).chmod(0o755)
        return folder / name

    return add


def test_without_a_compiler_it_is_slow_and_says_so(bmodels, programs):
    with open_engine(bmodels["basic"], engine="simulator") as engine:
        assert not yields(engine)
        assert engine.reason == (
            "simulator: asked for (many times slower than it could be: its threads do not yield. No C compiler (cc) "
            "was found: install one)"
        )


CROSS = """
{cc} "$@" || exit
while [ "$1" != -o ]; do shift; done
printf '\\x28' | dd of="$2" bs=1 seek=18 conv=notrunc status=none  # e_machine: ARM
"""


@pytest.mark.parametrize(
    "script, said",
    [
        (CROSS, "The library is not loaded: ERROR: ld.so: object './simulator_yield.so'"),
        ("echo 'a.c:1: error: on purpose' >&2; exit 1", "could not build it: a.c:1: error: on purpose"),
        ("exit 3", "could not build it: it ended with code 3"),
        ("exec sleep 3600", "timed out after 5 seconds"),
    ],
)
def test_a_compiler_that_is_of_no_use_is_named(bmodels, programs, monkeypatch, script, said):
    if "sleep" in script:
        monkeypatch.setattr(simulator, "COMPILER_SECONDS", 5)
    monkeypatch.setenv("CC", f"{programs('other-cc', script)} -O1")
    with open_engine(bmodels["basic"], engine="simulator") as engine:
        assert not yields(engine)
        assert said in engine.reason and "\n" not in engine.reason


def test_the_named_compiler_is_taken(bmodels, programs, monkeypatch):
    compiler = programs("other-cc", 'exec {cc} "$@"')
    monkeypatch.setenv("CC", f"{compiler} -O1")
    with open_engine(bmodels["basic"], engine="simulator") as engine:
        assert yields(engine)


@pytest.mark.parametrize("name", ["with space", "with:colon", "with;semicolon", "mit-ü", "with$dollar"])
def test_any_name_of_a_folder(bmodels, monkeypatch, tmp_path, name):
    """The system's loader splits its variables at spaces, colons and semicolons, and replaces $ORIGIN."""
    (tmp_path / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", None)
    with open_engine(bmodels["basic"], engine="simulator") as engine:
        assert yields(engine)
    assert os.listdir(tmp_path / name) == []


# From a read-only one Python goes on to the next of its folders for temporary files.
DISKS = {"noexec": "noexec", "without room for the library": "size=20k", "read-only": "ro"}


@pytest.mark.parametrize("disk", DISKS)
def test_a_temporary_disk_that_is_full_or_runs_nothing(bmodels, tmp_path, disk):
    code = """
from tests.unit.test_engines import *
with open_engine(sys.argv[1], engine="simulator") as engine:
    print(yields(engine))
"""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount += [f'mount -t tmpfs -o {DISKS[disk]} tmpfs {folder} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk of their own")
    done = subprocess.run(
        [*mount, sys.executable, "-c", code, bmodels["basic"]],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{disk == 'read-only'}\n"), done.stderr


@pytest.mark.parametrize("script, said", [("raise SystemExit(3)", "ended with code 3"), ("open('/no')", "code 1")])
def test_a_process_that_does_not_start_is_told(bmodels, monkeypatch, tmp_path, script, said):
    (tmp_path / "worker.py").write_text(script)
    monkeypatch.setattr(simulator, "WORKER", tmp_path / "worker.py")
    with pytest.raises(UserError, match=f"process could not be started: its process {said}|{said}"):
        open_engine(bmodels["basic"], engine="simulator")


def test_chip_threads_share_a_core_and_the_next_run_may_take_another(bmodels):
    with simulator.SimulatorEngine(bmodels["basic"], "yield") as engine:
        run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
        main = process_of(engine)
        threads = [int(task.name) for task in Path(f"/proc/{main}/task").iterdir()]
        cores = {thread: os.sched_getaffinity(thread) for thread in threads}
        assert cores.pop(main) == os.sched_getaffinity(0)
        assert len(cores) > 4 and len(set.union(*cores.values())) == 1


def threads_of(engine) -> list[tuple[str, str, int]]:
    """State ("R" computes, "S" sleeps), name and processor time in ticks of each of the chip's threads."""
    found = []
    for task in Path(f"/proc/{process_of(engine)}/task").iterdir():
        head, _, tail = (task / "stat").read_text().rpartition(")")
        name, fields = head.partition("(")[2], tail.split()
        if name.startswith("TPU_") or name == "CORE_MAIN":
            found.append((fields[0], name, int(fields[11]) + int(fields[12])))
    return found


def test_nobody_computes_while_nobody_asks(bmodels):
    with simulator.SimulatorEngine(bmodels["basic"], "yield") as engine:
        expected = run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
        # A thread that polls is never asleep for long: the same picture so often is no chance.
        deadline, same, before = time.monotonic() + PATIENCE, 0, None
        while same < 30:
            assert time.monotonic() < deadline, before
            time.sleep(0.02)
            now = threads_of(engine)
            asleep = len(now) > 4 and {state for state, *_ in now} == {"S"}
            same, before = same + 1 if asleep and now == before else 0, now
        for found, wanted in zip(run_cache(engine, bf16(STATES)[0], bf16(PAST)[0]), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


# --- sophon-sail, by its double

DOUBLE = ROOT / "tests" / "sail_double"


@pytest.fixture
def sail(monkeypatch):
    """`import sophon.sail` finds the double, in this process and its children."""

    def forget():
        for name in [name for name in sys.modules if name == "sophon" or name.startswith("sophon.")]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(str(DOUBLE))
    yield monkeypatch
    forget()


class TestSailDouble(EngineContract):
    @pytest.fixture
    def open_it(self, bmodels, sail):
        return lambda mode: open_engine(bmodels[mode], engine="chip")


class TestSailDoubleCalls(SailContract):
    @pytest.fixture
    def sail(self, sail):
        import sophon.sail

        return sophon.sail


def test_auto_takes_the_chip_where_there_is_one(bmodels, sail):
    sail.setenv("SAIL_DOUBLE_DEVICES", "4")
    with open_engine(bmodels["io_alone"], devid=(2,)) as engine:
        assert (engine.name, engine.kind_of_time, engine.devices) == ("chip", "measured", (2,))
        assert engine.reason == "chip, device 2: sophon.sail finds a device"
        assert {info.device for net in engine.nets.values() for info in net.inputs} == {0}
        run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])


@pytest.mark.parametrize("mode", ["basic", "io_alone"])
def test_tensors_are_where_the_nets_parts_are(bmodels, sail, mode):
    """Two devices: no two-device bmodel can be run here, so the double spreads the tensors of one for one."""
    sail.setenv("SAIL_DOUBLE_DEVICES", "4")
    described = dataclasses.replace(bmodel.read_bmodel(bmodels["basic"]), device_num=2)
    sail.setattr(bmodel, "read_bmodel", lambda path: described)
    with open_engine(bmodels[mode], engine="chip", devid=(2, 3)) as engine:
        assert engine.devices == (2, 3)
        assert [info.device for info in engine.nets["cache"].inputs] == [0, 1]
        states, past = (engine.input_tensor("cache", k) for k in range(2))
        assert (states.device, past.device, states.memory.device_id(), past.memory.device_id()) == (0, 1, 2, 3)
        row = engine.view(past, WIDTH, STATES)
        assert row.device == 1
        expected = run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
        engine.run("cache", [states, past], [engine.output_tensor("cache", 0), row])
        np.testing.assert_array_equal(engine.read(row), expected[1])
        with pytest.raises(UserError, match="stays on one device .* the source is .* on 0, the target .* on 1"):
            engine.copy(states, row)
        with pytest.raises(UserError, match=r"outputs\[1\] .* on device 1; .* on device 0 was given"):
            engine.run("cache", [states, past], [engine.output_tensor("cache", 0), states])
        elsewhere = engine.allocate(PAST, "bfloat16", device=1)
        engine.copy(past, elsewhere)
        engine.run("cache", [states, elsewhere], [engine.output_tensor("cache", k) for k in range(2)])


@pytest.mark.parametrize(
    "devid, said",
    [
        ((4,), r"There is no device 4: this machine has 4, from 0"),
        ((-1,), r"There is no device -1"),
        ((1, 1), r"name each device once"),
        ((), r"name each device once"),
        ((0, 1), r"compiled for 1 device\(s\) and was given 2: name as many chips \(--devid 0\)"),
    ],
)
def test_devices_that_cannot_be_taken(bmodels, sail, devid, said):
    sail.setenv("SAIL_DOUBLE_DEVICES", "4")
    with pytest.raises(UserError, match=said):
        open_engine(bmodels["basic"], engine="chip", devid=devid)


def test_no_driver(bmodels, sail):
    sail.setenv("SAIL_DOUBLE_DEVICES", "0")
    with pytest.raises(UserError, match="counts 0 chips"):
        open_engine(bmodels["basic"], engine="chip")
    import sophon.sail

    def no_driver():
        raise sophon.sail.SailDeviceError("bm_dev_getcount failed")

    sail.setattr(sophon.sail, "get_available_tpu_num", no_driver)
    with pytest.raises(UserError, match="No Sophon device: the driver does not answer"):
        open_engine(bmodels["basic"], engine="chip")
    with open_engine(bmodels["basic"]) as engine:
        assert engine.reason.startswith("simulator: No Sophon device")


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "PyPI's empty placeholder"),
        ("import no_such_library", "cannot be loaded.*LD_LIBRARY_PATH"),
        ("raise OSError('libbmrt.so.1.0: cannot open shared object file')", "cannot be loaded.*libbmrt"),
        ("get_available_tpu_num = lambda: 1\nHandle = int", r"could not load .* has no attribute 'EngineLLM'"),
    ],
)
def test_a_sail_that_is_none(bmodels, sail, tmp_path, content, said):
    (tmp_path / "sophon").mkdir()
    (tmp_path / "sophon" / "__init__.py").touch()
    (tmp_path / "sophon" / "sail.py").write_text(content)
    sail.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=said):
        open_engine(bmodels["basic"], engine="chip")


@pytest.mark.parametrize("kind", ["absent", "placeholder", "real"])
def test_sophon_placeholder_is_told_from_the_real_one(tmp_path, monkeypatch, kind):
    folder = tmp_path / "sophon"
    if kind != "absent":
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / ("sail.py" if kind == "placeholder" else "sail.cpython-310-x86_64-linux-gnu.so")).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *[p for p in sys.path if "site-packages" not in p]])
    monkeypatch.delitem(sys.modules, "sophon", raising=False)
    sail_package.importlib.invalidate_caches()
    assert sail_package.sophon_sail()[0] == kind


def test_a_sail_that_is_too_old(bmodels, sail):
    import sophon.sail

    def before_views(tensor, first, *arguments, make=sophon.sail.Tensor.__init__):
        if isinstance(first, sophon.sail.Tensor):
            raise TypeError("incompatible constructor arguments")
        make(tensor, first, *arguments)

    sail.setattr(sophon.sail.Tensor, "__init__", before_views)
    with pytest.raises(UserError, match=r"makes no views .* install sophon-sail 3\.9\.1 or newer\.$"):
        open_engine(bmodels["io_alone"], engine="chip")


def test_what_sail_cannot_load_is_told(bmodels, sail):
    import sophon.sail

    def refuses(*arguments):
        raise sophon.sail.SailEngineError("EngineLLM related error!")

    sail.setattr(sophon.sail, "EngineLLM", refuses)
    sail.setattr(sophon.sail.Handle, "get_target", lambda handle: "BM1688", raising=False)
    sail.setattr(sophon.sail, "get_dev_stat", lambda device: [16000, 15000, 0], raising=False)
    said = r"could not load .* on device 0 \(0 is a BM1688 with 1000 of 16000 MB free\): EngineLLM related error!"
    with pytest.raises(UserError, match=said):
        open_engine(bmodels["basic"], engine="chip")


# What a box with a chip cannot install. An import that is found but fails, as where it is installed for another Python.
BLOCKED = """
import importlib.abc, importlib.machinery, sys
blocked = ("torch", "torchvision", "transformers", "onnx", "onnxruntime", "tpu_mlir", "matplotlib", "psutil")
class Refuse(importlib.abc.Loader):
    def create_module(self, spec):
        raise ImportError(f"{spec.name} is not to be imported here")
    def exec_module(self, module):
        pass
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in blocked and (spec := importlib.machinery.PathFinder.find_spec(name, path)):
            spec.loader = Refuse()
            return spec
sys.meta_path.insert(0, Finder())
for name in blocked:
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} could be imported")
"""


@pytest.mark.parametrize("engine", ["chip", "simulator"])
def test_an_engine_runs_without_torch_and_the_tool_chain(bmodels, engine):
    code = """
from helpers.run.engines import open_engine
import helpers.run.generation, helpers.checkpoint.tokenizer, helpers.chat.session
from tests.engine_contract import bf16, run_cache, STATES, PAST
with open_engine(sys.argv[1], engine=sys.argv[2]) as engine:
    run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])
    print(engine.name)
assert not set(blocked) & set(sys.modules), set(blocked) & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, str(bmodels["io_alone"]), engine],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(DOUBLE)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{engine}\n"), done.stderr


# --- the choice


def test_auto_names_what_it_took_and_why(bmodels):
    with open_engine(bmodels["basic"]) as engine:
        assert (engine.name, engine.kind_of_time) == ("simulator", "simulator wall")
        assert engine.reason.startswith("simulator: sophon.sail is not installed")


@pytest.mark.parametrize(
    "wanted, said",
    [
        ({"engine": "chip"}, "sophon.sail is not installed"),
        ({"engine": "gpu"}, "no engine 'gpu'"),
        ({"engine": "simulator", "devid": (1,)}, "The simulator has one device, number 0"),
        ({"devid": (2, 3)}, "--devid 2,3 needs chips"),
    ],
)
def test_engines_that_are_not_there(bmodels, wanted, said):
    with pytest.raises(UserError, match=said):
        open_engine(bmodels["basic"], **wanted)


# --- several bmodels


def meet(barrier, engine):
    """Outputs of one run, begun when all who meet have an engine."""
    barrier.wait(PATIENCE)
    return run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])


def test_simulators_run_side_by_side(bmodels):
    barrier = threading.Barrier(2)
    found = on_each_bmodel(bmodels, lambda mode, engine: meet(barrier, engine))
    assert list(found) == list(bmodels)
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_memory_holds_one_simulator_they_take_turns(bmodels, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 20)
    assert simulator.simulators_at_once(list(bmodels.values())) == 1


def test_a_chip_takes_one_bmodel_after_the_other(bmodels, sail):
    running = []

    def work(mode, engine):
        running.append(mode)
        time.sleep(0.1)
        assert running == [mode] and engine.name == "chip"
        return running.pop()

    assert on_each_bmodel(bmodels, work) == {mode: mode for mode in bmodels}


def test_a_failure_ends_the_others(bmodels):
    barrier = threading.Barrier(2)

    def work(mode, engine):
        meet(barrier, engine)
        if mode == "basic":
            raise ValueError("on purpose")
        while True:
            run_cache(engine, bf16(STATES)[0], bf16(PAST)[0])

    with pytest.raises(ValueError, match="on purpose"):
        on_each_bmodel(bmodels, work)
    with pytest.raises(UserError, match="no engine 'gpu'"):
        on_each_bmodel(bmodels, work, engine="gpu")
