import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import doctor, toolchain
from helpers.errors import UserError


@pytest.fixture
def sick_wheel(tmp_path):
    folder = tmp_path / "lib" / "third_party"
    folder.mkdir(parents=True)
    (folder / "libc.so.6").write_bytes(
        b"\x7fELF...GNU C Library (Ubuntu GLIBC 2.35-0ubuntu3.1) stable release version 2.35.\n"
    )
    for name in ("libm.so.6", "libpthread.so.0", "libopenblas.so.0"):
        (folder / name).write_bytes(b"\x7fELF")
    return tmp_path


def glibc_there(wheel):
    return sorted(p.name for p in (wheel / "lib" / "third_party").iterdir() if p.name in toolchain.GLIBC_FILES)


def test_cure_moves_the_bundled_glibc_aside_only_under_a_newer_one(sick_wheel, monkeypatch):
    monkeypatch.setattr(toolchain, "host_glibc", lambda: (2, 35))
    assert toolchain.cure(sick_wheel) == []
    assert len(glibc_there(sick_wheel)) == 3
    monkeypatch.setattr(toolchain, "host_glibc", lambda: (2, 36))
    assert len(toolchain.cure(sick_wheel)) == 3
    assert glibc_there(sick_wheel) == []
    assert (sick_wheel / "lib/third_party/libopenblas.so.0").exists()
    assert toolchain.glibc_state(sick_wheel) == ("aside", True, "host 2.36, bundle 2.35 aside")
    assert toolchain.cure(sick_wheel) == []
    monkeypatch.setattr(toolchain, "host_glibc", lambda: (2, 35))
    assert toolchain.cure(sick_wheel) == []


def test_cure_brings_the_bundle_back_on_an_older_machine(sick_wheel, monkeypatch):
    monkeypatch.setattr(toolchain, "host_glibc", lambda: (2, 41))
    toolchain.cure(sick_wheel)
    monkeypatch.setattr(toolchain, "host_glibc", lambda: (2, 31))
    toolchain.cure(sick_wheel)
    assert len(glibc_there(sick_wheel)) == 3


def test_doctor_is_what_importing_the_wheel_sets():
    show = "import tpu_mlir, os, json; print(json.dumps(dict(os.environ)))"
    env = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "ignore"}
    imported = json.loads(
        subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True).stdout
    )
    ours = toolchain.environment(threads=2)
    for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
        wheel_folders = [p for p in imported[name].split(os.pathsep) if "tpu_mlir" in p and os.path.isdir(p)]
        ours_of_it = [p for p in ours[name].split(os.pathsep) if os.path.isdir(p)]
        missing = {os.path.realpath(p) for p in wheel_folders} - {os.path.realpath(p) for p in ours_of_it}
        assert not missing, name
    for name in imported.keys() - {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", *env, "LC_CTYPE"}:
        assert os.path.realpath(ours[name]) == os.path.realpath(imported[name]), name
    assert ours["OMP_NUM_THREADS"] == "2"


def test_another_sdk_is_not_passed_on_and_this_pythons_programs_are_found(monkeypatch):
    monkeypatch.setenv("TPUC_ROOT", "/checkout/install")
    monkeypatch.setenv("PPL_CACHE_PATH", "/elsewhere")
    monkeypatch.setenv("PATH", "/checkout/bin:/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/checkout/python:/mine")
    ours = toolchain.environment()
    assert "PPL_CACHE_PATH" not in ours and Path(ours["TPUC_ROOT"]).samefile(toolchain.wheel_path())
    assert "checkout" not in ours["PATH"] + ours["PYTHONPATH"]
    assert ours["PATH"].endswith(":/nowhere") and ours["PYTHONPATH"].endswith(":/mine")
    for program in ("cmake", "ninja"):
        assert Path(shutil.which(program, path=ours["PATH"])).parent.samefile(Path(sys.executable).parent)


def test_a_path_is_plain_where_no_tool_takes_a_character_for_its_own():
    assert toolchain.is_plain("/pfad/深圳/a-b_c.d,e+f=g@h%i/1")
    for character in " '\"\\&();:$#*?!|<>\n":
        assert not toolchain.is_plain(f"/home/a{character}b"), character


def test_a_folder_that_allows_no_programs_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert toolchain.plain_parent() == str(tmp_path)
    allowed = os.statvfs(tmp_path)
    refused = os.statvfs_result([*allowed[:8], allowed.f_flag | os.ST_NOEXEC, allowed[9]])
    monkeypatch.setattr(os, "statvfs", lambda path: refused if path == str(tmp_path) else allowed)
    assert toolchain.plain_parent() != str(tmp_path)


def test_the_library_that_builds_kernels_has_no_lock_of_everybodys():
    for locks in (True, False):
        code = toolchain.own_kernel_library(locks).read_bytes()
        assert b"/tmp/ppl_" not in code and (b"\0flock\0" in code) == locks


@pytest.mark.parametrize("program", ["cmake", "ninja"])
def test_a_program_that_is_not_there_is_named(monkeypatch, program):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == program else which(name, **where))
    with pytest.raises(UserError, match=f"{program} is not on the PATH"):
        toolchain.require()


def test_every_process_of_a_user_goes_the_same_plain_way_to_a_path(tmp_path):
    (tmp_path / "a b").mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom helpers import toolchain\nprint(toolchain.plain(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a b")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    link, again = (subprocess.check_output(command, env=environment, text=True).strip() for _ in range(2))
    assert link == again
    assert " " not in link and Path(link).samefile(tmp_path / "a b")
    assert len(list(tmp_path.glob("qwen-bm1684x-toolchain-*"))) == 1


def test_health_is_good_here_and_does_not_import_the_wheel():
    code = (
        "import sys; from helpers import doctor, toolchain; toolchain.require()\n"
        "bad = [c for c in doctor.check_toolchain() if c.state == doctor.NOT_OK]\n"
        "assert not bad, bad\n"
        "assert not {'tpu_mlir', 'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_wheel_is_one_sentence(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="make setup"):
        toolchain.require()
    assert any(check.state == doctor.NOT_OK and check.name == "tpu-mlir" for check in doctor.check_toolchain())


def test_another_program_named_parallel_is_not_gnu_parallel(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get install parallel"):
        toolchain.require_parallel()
    fake = tmp_path / "parallel"
    fake.write_text("#!/bin/sh\necho moreutils\n")
    fake.chmod(0o755)
    with pytest.raises(UserError, match="GNU parallel, which is not installed"):
        toolchain.require_parallel()
    fake.write_text("#!/bin/sh\necho GNU parallel 20221122\n")
    assert toolchain.require_parallel() == "GNU parallel 20221122"


def test_warnings_that_are_errors_here_do_not_end_the_wheels_programs(monkeypatch):
    """Importing the wheel warns of pkg_resources."""
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    command = [sys.executable, "-c", "import tpu_mlir"]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0
    subprocess.run(command, env=toolchain.environment(), check=True)
