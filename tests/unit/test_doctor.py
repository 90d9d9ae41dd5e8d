"""The doctor, by breaking what it looks at."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from helpers import doctor, machine
from helpers.commands import doctor as report_command
from helpers.doctor import NOT_OK, OK, OPTIONAL, Check
from helpers.errors import UserError

ROOT = Path(doctor.ROOT)


def report(*arguments, **variables):
    """The report of a doctor process: (exit code, {name: check})."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    said = json.loads(done.stdout)
    assert said["ok"] == (done.returncode == 0), done.stderr
    return done.returncode, {check["name"]: check for check in said["checks"]}


def program(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_this_environment_is_well():
    code, checks = report()
    assert code == 0, [check for check in checks.values() if check["state"] == NOT_OK]
    for name in ("python for the wheel", "tpu-mlir", "glibc of the wheel", "cmake", "ninja", "tpuc-opt", "packages"):
        assert checks[name]["state"] == OK
    assert all(check["remedy"] == "" for check in checks.values() if check["state"] == OK)


def test_every_line_that_is_not_ok_names_a_remedy(tmp_path):
    _, checks = report(PATH=str(tmp_path))
    assert all(check["remedy"] for check in checks.values() if check["state"] == NOT_OK)


def test_wheel_that_does_not_start(tmp_path):
    """A wheel of the same name stands in front; its compiler dies as it does under a foreign glibc."""
    wheel = tmp_path / "tpu_mlir"
    program(wheel / "bin", "tpuc-opt", "echo '*** stack smashing detected ***: terminated' >&2; kill -ABRT $$")
    (wheel / "__init__.py").touch()
    (wheel / "lib" / "third_party").mkdir(parents=True)
    code, checks = report(PYTHONPATH=str(tmp_path))
    assert code == 1
    assert checks["tpuc-opt"]["state"] == NOT_OK
    assert checks["tpuc-opt"]["found"] == "dies with -6: *** stack smashing detected ***: terminated"


def test_fix_cures_the_glibc_bundle(tmp_path):
    wheel = tmp_path / "tpu_mlir"
    program(wheel / "bin", "tpuc-opt", "test ! -e $(dirname $0)/../lib/third_party/libm.so.6")
    (wheel / "__init__.py").touch()
    third_party = wheel / "lib" / "third_party"
    third_party.mkdir(parents=True)
    # Older than any host's, so the cure is the same on every machine.
    (third_party / "libc.so.6").write_bytes(b"GNU C Library (test) stable release version 2.1.\n")
    (third_party / "libm.so.6").touch()
    code, checks = report(PYTHONPATH=str(tmp_path))
    assert code == 1 and {checks["glibc of the wheel"]["state"], checks["tpuc-opt"]["state"]} == {NOT_OK}
    code, checks = report("--fix", PYTHONPATH=str(tmp_path))
    assert code == 0 and {checks["glibc of the wheel"]["state"], checks["tpuc-opt"]["state"]} == {OK}


def test_another_sdk_is_named():
    code, checks = report(TPUC_ROOT="/opt/tpu-mlir/install", PPL_PROJECT_ROOT="/opt/tpu-mlir/third_party/ppl")
    check = checks["another TPU-MLIR"]
    assert code == 0 and check["state"] == OPTIONAL
    assert "TPUC_ROOT=/opt/tpu-mlir/install, PPL_PROJECT_ROOT=/opt/tpu-mlir/third_party/ppl" in check["found"]
    assert check["remedy"] == "unset TPUC_ROOT PPL_PROJECT_ROOT"
    _, checks = report(TPUC_ROOT=str(doctor.toolchain.wheel_path()))
    assert "another TPU-MLIR" not in checks


def test_pins(tmp_path):
    def check(text):
        path = tmp_path / "requirements.txt"
        path.write_text(text)
        return doctor.check_pins(path)

    from numpy import __version__ as numpy

    right = check(f"numpy=={numpy}\n    # via somebody\n")
    assert (right.state, right.found) == (OK, "all 1 packages as pinned")
    assert check("NumPy==0.1\n").found == f"NumPy is {numpy}, pinned 0.1"
    many = check("".join(f"nonesuch-{i}==1\n" for i in range(5)))
    assert many.state == NOT_OK and many.remedy == "make setup"
    assert many.found == "nonesuch-0 is missing; nonesuch-1 is missing; nonesuch-2 is missing and 2 more"


def test_pins_of_the_cpu_build_of_torch(tmp_path, monkeypatch):
    class Installed:
        metadata = {"Name": "torch"}
        version = "2.11.0+cpu"

    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [Installed])
    path = tmp_path / "requirements.txt"
    path.write_text("torch==2.11.0\nnvidia-cublas==1\ncuda-toolkit==1\ntriton==3\n")
    assert doctor.check_pins(path).state == OK
    path.write_text("torch==2.12.0\n")
    assert doctor.check_pins(path).state == NOT_OK


def test_no_c_compiler(tmp_path):
    _, checks = report(PATH=str(tmp_path))
    compiler = checks["C compiler"]
    assert compiler["state"] == OPTIONAL and "slower" in compiler["found"] and compiler["remedy"]


def test_gpu(tmp_path):
    program(tmp_path, "nvidia-smi", "echo 'Tesla, 16 GiB'")
    _, checks = report(PATH=str(tmp_path))
    assert checks["GPU"]["state"] == OK and checks["GPU"]["found"].startswith("Tesla, 16 GiB (torch 2")
    program(tmp_path, "nvidia-smi", "echo no driver; exit 9")
    _, checks = report(PATH=str(tmp_path))
    assert checks["GPU"]["state"] == OPTIONAL


def test_program_that_hangs_is_not_waited_for(tmp_path):
    hanging = program(tmp_path, "hang", "exec sleep 60")
    assert "timed out" in doctor._run(str(hanging), seconds=0.2)[0]


def test_empty_placeholder_of_sail(tmp_path):
    (tmp_path / "sophon").mkdir()
    (tmp_path / "sophon" / "__init__.py").touch()
    (tmp_path / "sophon" / "sail.py").touch()
    code, checks = report(PYTHONPATH=str(tmp_path))
    assert code == 0
    assert checks["sophon.sail"]["state"] == OPTIONAL
    assert "placeholder" in checks["sophon.sail"]["found"]
    assert "pip uninstall sophon" in checks["sophon.sail"]["remedy"]
    (tmp_path / "sophon" / "sail.py").unlink()
    (tmp_path / "sophon" / "sail.cpython-310-x86_64-linux-gnu.so").write_bytes(b"\x7fELF")
    _, checks = report(PYTHONPATH=str(tmp_path))
    assert checks["sophon.sail"]["state"] == OK


def test_sail_is_needed_where_there_is_a_chip(monkeypatch):
    for kind in ("absent", "placeholder"):
        monkeypatch.setattr(doctor.sail_package, "sophon_sail", lambda kind=kind: (kind, "somewhere"))
        check = doctor.check_sail(driver=True)
        assert check.state == NOT_OK and "SDK" in check.remedy


def test_driver(tmp_path):
    assert doctor.check_driver(tmp_path).state == OPTIONAL
    (tmp_path / "proc" / "bmsophon").mkdir(parents=True)
    broken = doctor.check_driver(tmp_path)
    assert broken.state == OPTIONAL and "no device" in broken.found and broken.remedy
    (tmp_path / "dev").mkdir()
    for name in ("bm-sophon1", "bm-sophon0", "bmdev-ctl"):
        (tmp_path / "dev" / name).touch()
    driver = doctor.check_driver(tmp_path)
    assert driver.state == OK and driver.found.startswith(f"{tmp_path}/dev/bm-sophon0, {tmp_path}/dev/bm-sophon1")


def test_a_box_with_a_chip_need_not_compile(monkeypatch):
    monkeypatch.setattr(doctor, "chip_devices", lambda root=Path("/"): ["/dev/bm-sophon0"])
    monkeypatch.setattr(doctor.sail_package, "sophon_sail", lambda: ("real", "sail.so"))

    def lost():
        raise UserError("TPU-MLIR is not installed: run `make setup`.")

    monkeypatch.setattr(doctor.toolchain, "wheel_path", lost)
    states = {check.name: check.state for check in doctor.checks()}
    assert states["tpu-mlir"] == OPTIONAL and NOT_OK not in states.values()
    monkeypatch.setattr(doctor.sail_package, "sophon_sail", lambda: ("absent", ""))
    states = {check.name: check.state for check in doctor.checks()}
    assert states["tpu-mlir"] == NOT_OK


def test_too_little_memory_or_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "NEEDED_MEMORY", 1e15)
    monkeypatch.setattr(doctor, "NEEDED_DISK", 1e18)
    for check in (doctor.check_memory(), doctor.check_disk(tmp_path / "not" / "there")):
        assert check.state == NOT_OK and check.remedy
    available, total = machine.memory()
    assert 0 < available <= total


class Installed:
    """The package's distribution, as an editable install leaves it."""

    def __init__(self, folder: object):
        self.url = {"url": f"file://{folder}", "dir_info": {"editable": True}}

    def read_text(self, name: str) -> str:
        return json.dumps(self.url) if name == "direct_url.json" else ""


def test_helpers_in_every_folder(monkeypatch):
    def installed(folder=None):
        if folder is None:
            raise doctor.metadata.PackageNotFoundError
        return Installed(folder)

    for folder, state, found in (
        (None, OPTIONAL, "in this folder only"),
        ("/else%20where", OPTIONAL, "of /else where, another copy"),
        (quote(str(ROOT)), OK, "in every folder"),
    ):
        monkeypatch.setattr(doctor.metadata, "distribution", lambda name, folder=folder: installed(folder))
        check = doctor.check_helpers_importable()
        assert (check.state, check.found) == (state, found)
        assert ("make setup" in check.remedy) == (state != OK)


def test_make_setup_installs_the_package_where_notebooks_find_it():
    code = "import helpers; print(helpers.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == ROOT / "helpers"
    assert doctor.check_helpers_importable().state == OK


def test_plain_report(capsys):
    report_command._print([Check("disk", NOT_OK, "0 GB free", "free some"), Check("CPU", OK, "8 cores")])
    assert capsys.readouterr().out.splitlines() == [
        "NOT OK    disk  0 GB free",
        "                -> free some",
        "OK        CPU   8 cores",
        "1 NOT OK",
    ]


def test_report_on_a_terminal_fits_one_screen():
    """On a terminal the report is a table in colour, without losing a word of what the plain one says."""
    import pty

    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "helpers", "doctor"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "110", "TERM": "xterm-256color"},
        stdout=secondary,
        stderr=secondary,
    )
    os.close(secondary)
    shown = b""
    while True:
        try:
            block = os.read(primary, 4096)
        except OSError:
            break
        shown += block
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[" in text and "tpuc-opt" in text and "all that is needed is there" in text
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("arguments", [["--nonsense"], ["extra"]])
def test_wrong_arguments(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "doctor", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
