import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import artefacts
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


def test_a_corrupted_output_is_not_up_to_date(tmp_path):
    path = tmp_path / "file.bin"
    build(path)
    path.write_text("cOntent")
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
    artefacts.write_json(tmp_path / "record", ["first"] * 100_000)
    with open(path) as file, open(tmp_path / "record") as record:
        assert file.read(5) == "first" and record.read(1) == "["
        build(path, "second")
        artefacts.write_json(tmp_path / "record", [])
        assert file.read() == "first" * 99_999
        assert record.read().count("first") == 100_000


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="No space left"):
        with artefacts.building(tmp_path / "x", kind="t", inputs={}, settings={}):
            with open("/dev/full", "w") as full:
                full.write("x" * 100000)
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


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    code = (
        "import sys\nfrom helpers import artefacts\n"
        "with artefacts.locked(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="taken"), artefacts.locked(tmp_path / "lock", "taken"):
            pytest.fail("two hold it")
        process.kill()
        process.wait()
    with artefacts.locked(tmp_path / "lock", "taken"):
        pass


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_locks_it_goes_on_with_one_warning(tmp_path, preload, error):
    code = (
        "import sys\nfrom helpers import artefacts\n"
        "for busy in (None, 'taken', 'taken'):\n"
        "    with artefacts.locked(sys.argv[1], busy):\n        print('inside')\n"
    )
    environment = preload(f"int flock(int file, int operation) {{ errno = {error}; return -1; }}")
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "inside\n" * 3
    assert done.stderr.count("\n") == 1 and "has no file locks" in done.stderr and str(tmp_path) in done.stderr


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
