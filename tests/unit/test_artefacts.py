import os
import platform
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest

from helpers import artefacts, files
from helpers.errors import UserError


def build(path, text="content", inputs=None, settings=None):
    with artefacts.building(path, kind="test", inputs=inputs or {"a": "1"}, settings=settings or {"s": 1}) as partial:
        partial.write_text(text)


def test_an_artefact_is_up_to_date_only_for_the_same_inputs_and_settings(tmp_path):
    path = tmp_path / "file.bin"
    build(path)
    assert artefacts.up_to_date(path, {"a": "1"}, {"s": 1})
    assert not artefacts.up_to_date(path, {"a": "2"}, {"s": 1})
    assert not artefacts.up_to_date(path, {"a": "1"}, {"s": 2})


@pytest.mark.parametrize("tool", ["python", "tpu-mlir", "torch", "onnx", "onnxruntime", "transformers", "numpy"])
def test_what_another_version_of_a_tool_made_is_not_up_to_date(tool, tmp_path, monkeypatch):
    build(tmp_path / "file.bin")
    assert artefacts.up_to_date(tmp_path / "file.bin", {"a": "1"}, {"s": 1})
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0" if name == tool else version(name))
    if tool == "python":
        monkeypatch.setattr(platform, "python_version", lambda: "0.0")
    assert not artefacts.up_to_date(tmp_path / "file.bin", {"a": "1"}, {"s": 1})


def test_a_corrupted_output_is_not_up_to_date(tmp_path):
    path = tmp_path / "file.bin"
    build(path)
    path.write_text("cOntent")
    assert not artefacts.up_to_date(path, {"a": "1"}, {"s": 1})


def test_a_corrupted_file_deep_in_a_folder_is_seen(tmp_path):
    with artefacts.building(tmp_path / "folder", kind="test", inputs={}, settings={}) as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "top").write_text("content")
        (partial / "sub" / "file").write_text("content")
    assert artefacts.up_to_date(tmp_path / "folder", {}, {})
    (tmp_path / "folder" / "sub" / "file").write_text("cOntent")
    assert not artefacts.up_to_date(tmp_path / "folder", {}, {})


def test_a_manifest_that_proves_nothing_is_not_believed(tmp_path):
    path = tmp_path / "file.bin"
    build(path)
    manifest = artefacts.read_manifest(path)
    recorded = manifest["outputs"]["file.bin"]
    near = recorded["sha256"][:-1] + ("0" if recorded["sha256"][-1] != "0" else "1")
    for outputs in ({}, {"file.bin": recorded | {"sha256": near}}):
        files.write_json(artefacts.manifest_path(path), manifest | {"outputs": outputs})
        assert not artefacts.up_to_date(path, {"a": "1"}, {"s": 1})


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.bin"
    build(path, "first")
    with pytest.raises(ZeroDivisionError):
        with artefacts.building(path, kind="test", inputs={}, settings={}) as partial:
            partial.write_text("second")
            raise ZeroDivisionError
    assert path.read_text() == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.bin", "file.bin.json"]


def test_what_was_built_is_moved_into_place_not_copied(tmp_path):
    """A copy would be there in part for a while, for others to read or a kill to leave; and need room twice."""
    file, folder = tmp_path / "net.onnx", tmp_path / "folder"
    for text in ("first", "second"):
        with artefacts.building(file, kind="test", inputs={}, settings={}) as partial:
            partial.write_text(text)
            partial.with_name("net.weights").write_text(text)
            built = [partial.stat().st_ino, partial.with_name("net.weights").stat().st_ino]
        assert [path.stat().st_ino for path in (file, tmp_path / "net.weights")] == built
        with artefacts.building(folder, kind="test", inputs={}, settings={}) as partial:
            partial.mkdir()
            (partial / "part").write_text(text)
            built = [partial.stat().st_ino, (partial / "part").stat().st_ino]
        assert [path.stat().st_ino for path in (folder, folder / "part")] == built


def test_who_reads_while_it_is_replaced_reads_the_old_one_whole(tmp_path):
    path = tmp_path / "file.bin"
    build(path, "first" * 100_000)
    with open(path) as file:
        assert file.read(5) == "first"
        build(path, "second")
        assert file.read() == "first" * 99_999


def test_what_other_code_made_is_not_up_to_date_and_said_once_a_folder(tmp_path, capsys):
    code = artefacts.code_of("artefacts")
    for name in ("a", "b"):
        with artefacts.building(tmp_path / name, kind="test", inputs={}, settings={}, code=code) as partial:
            partial.write_text(name)
    assert artefacts.up_to_date(tmp_path / "a", {}, {}, code) and not capsys.readouterr().err
    other = code | {"artefacts": "0" * 64}
    assert not artefacts.up_to_date(tmp_path / "a", {}, {}, other)
    assert not artefacts.up_to_date(tmp_path / "b", {}, {}, other)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path) in said and "made anew" in said


STEPS = {
    "export.exporting": [
        "export.exporting", "export.modules", "export.tracing", "nets", "checkpoint.modeling", "checkpoint.weights"
    ],
    "compile.jobs": ["compile.frontend", "compile.graph", "compile.jobs", "compile.profile", "compile.worker"],
    "compile.compiling": [
        *("bmodel.model_tool", "compile.compiling", "compile.options", "compile.plan", "compile.profile")
    ],
    "compile.llm_convert": ["compile.llm_convert", "checkpoint.weights", "compile.options", "compile.profile"],
}


@pytest.mark.parametrize("step", STEPS)
def test_code_that_makes_an_artefact_is_among_what_it_was_made_from(step, own_copy):
    code = (
        "import importlib, sys\nstep = importlib.import_module(f'helpers.{sys.argv[1]}')\n"
        "for name in sys.argv[2:]:\n    before = step._CODE\n"
        "    path = name.replace('.', '/')\n"
        "    with open(f'helpers/{path}.py', 'a') as file:\n        file.write('# changed')\n"
        "    assert importlib.reload(step)._CODE != before, f'{name} does not count'\n"
    )
    command = [sys.executable, "-c", code, step, *STEPS[step]]
    done = subprocess.run(command, cwd=own_copy.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_companions_move_in_with_their_file(tmp_path):
    path = tmp_path / "net.onnx"
    with artefacts.building(path, kind="test", inputs={}, settings={}) as partial:
        partial.write_text("graph")
        partial.with_name("net.weights").write_text("weights")
    assert artefacts.up_to_date(path, {}, {})
    (tmp_path / "net.weights").write_text("damaged")
    assert not artefacts.up_to_date(path, {}, {})


def test_a_folder_replaces_the_previous_one_whole(tmp_path):
    folder = tmp_path / "folder"
    for names in (["a", "b"], ["c"]):
        with artefacts.building(folder, kind="test", inputs={}, settings={}) as partial:
            partial.mkdir()
            for name in names:
                (partial / name).write_text(name)
    assert sorted(p.name for p in folder.iterdir()) == ["c", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "file.bin"
    code = (
        "import sys, time\nfrom helpers import artefacts\n"
        "with artefacts.building(sys.argv[1], kind='t', inputs={}, settings={}) as partial:\n"
        "    partial.write_text('half')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not path.exists()
    build(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.bin", "file.bin.json"]


def test_two_processes_that_build_one_artefact_leave_each_other_alone(tmp_path):
    path = tmp_path / "file.bin"
    code = (
        "import sys\nfrom helpers import artefacts\n"
        "with artefacts.building(sys.argv[1], kind='t', inputs={}, settings={}) as partial:\n"
        "    print('ready', flush=True)\n    sys.stdin.read()\n    partial.write_text('theirs')\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        build(path, "ours")
        assert path.read_text() == "ours"
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert path.read_text() == "theirs" and artefacts.up_to_date(path, {}, {})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_names_what_was_to_be_written(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught:
        with artefacts.building(tmp_path / "x", kind="t", inputs={}, settings={}):
            with open("/dev/full", "w") as full:
                full.write("x" * 100000)
    assert caught.value.filename == str(tmp_path / "x") and "Free some space" in files.remedy(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_is_not_json_says_so(tmp_path):
    path = tmp_path / "file.bin"
    build(path)
    artefacts.manifest_path(path).write_text("{")
    with pytest.raises(UserError, match="not a readable manifest"):
        artefacts.read_manifest(path)
    assert not artefacts.up_to_date(path, {"a": "1"}, {"s": 1})


def test_seconds_are_measured(tmp_path):
    started = time.monotonic()
    with artefacts.building(tmp_path / "x", kind="t", inputs={}, settings={}) as partial:
        inside = time.monotonic()
        partial.write_text("x")
        while time.monotonic() < inside + 0.05:
            pass
        inside = time.monotonic() - inside
    assert inside <= artefacts.read_manifest(tmp_path / "x")["seconds"] + 0.001 <= time.monotonic() - started + 0.002


@pytest.mark.parametrize("text", ["null", "[]", '{"outputs": 3}', '{"outputs": {"a": "b"}}', '{"tokenizer": 3}'])
def test_json_that_is_no_manifest_says_so(tmp_path, text):
    path = tmp_path / "file.bin"
    build(path)
    artefacts.manifest_path(path).write_text(text)
    with pytest.raises(UserError, match="not a readable manifest"):
        artefacts.read_manifest(path)
    assert not artefacts.up_to_date(path, {"a": "1"}, {"s": 1})


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text("mine")
    with pytest.raises(UserError, match="is a folder"):
        build(folder)
    assert [(p.name, p.read_text()) for p in folder.iterdir()] == [("manifest.json", "mine")]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_on_another_disk_stays_there_and_the_link_to_it(tmp_path, there):
    disk, link = tmp_path / "disk" / "folder", tmp_path / "out" / "folder"
    (disk if there else disk.parent).mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk)
    for text in ("first", "second"):
        with artefacts.building(link, kind="test", inputs={"a": text}, settings={}) as partial:
            partial.mkdir()
            (partial / "net").write_text(text)
        assert link.is_symlink() and (disk / "net").read_text() == text
        assert artefacts.up_to_date(link, {"a": text}, {})
        assert [path.name for path in (*link.parent.iterdir(), *disk.parent.iterdir())] == ["folder"] * 2
