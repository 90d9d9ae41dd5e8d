"""Locks, and files that are whole or not there."""

import subprocess
import sys
import threading

import pytest

from helpers import files
from helpers.errors import UserError


def test_a_file_is_written_anew_where_its_content_differs_by_one_letter(tmp_path):
    for content in (b"first", b"fIrst", b"longer than that"):
        files.write_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content


def test_a_digest_does_not_depend_on_the_order_of_keys():
    assert files.digest_of({"a": 1, "b": [2]}) == files.digest_of({"b": [2], "a": 1})
    assert files.digest_of({"a": 1, "b": [2]}) != files.digest_of({"a": 1, "b": [3]})


def test_who_reads_while_it_is_replaced_reads_the_old_one_whole(tmp_path):
    files.write_json(tmp_path / "record", ["first"] * 100_000)
    with open(tmp_path / "record") as record:
        assert record.read(1) == "["
        files.write_json(tmp_path / "record", [])
        assert record.read().count("first") == 100_000


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    code = (
        "import sys\nfrom helpers import files\n"
        "with files.locked(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="taken"), files.locked(tmp_path / "lock", "taken"):
            pytest.fail("two hold it")
        process.kill()
        process.wait()
    with files.locked(tmp_path / "lock", "taken"):
        pass


def test_who_says_nothing_of_a_lock_that_is_taken_waits_for_it(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path / "lock"):
            order.append("second")

    thread = threading.Thread(target=second)
    with files.locked(tmp_path / "lock"):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("error", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_without_locks_it_goes_on_with_one_warning(tmp_path, preload, error):
    code = (
        "import sys\nfrom helpers import files\n"
        "for busy in (None, 'taken', 'taken'):\n"
        "    with files.locked(sys.argv[1], busy):\n        print('inside')\n"
    )
    environment = preload(f"int flock(int file, int operation) {{ errno = {error}; return -1; }}")
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "inside\n" * 3
    assert done.stderr.count("\n") == 1 and "has no file locks" in done.stderr and str(tmp_path) in done.stderr
