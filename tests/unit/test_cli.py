"""What the command line makes of files and pipes that the system refuses: one sentence, never a traceback."""

import errno
import subprocess
import sys

import pytest

from helpers import cli, patching

STATUS = [sys.executable, "-m", "helpers", "patch", "--status", "--model_path", "models/tiny"]


@pytest.mark.parametrize(
    "error, told",
    [
        (PermissionError(errno.EACCES, "Permission denied", "/there"), "/there: Permission denied. Give yourself"),
        (OSError(errno.EROFS, "Read-only file system", "/there"), "/there: Read-only file system. Give yourself"),
        (OSError(errno.ENOSPC, "No space left on device"), "A file: No space left on device. Free some space"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/x"), "/file/x: Not a directory. A file was found"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/xxx"), "/xxx: File name too long. Give it another"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, error, told):
    def refuse(*_):
        raise error

    monkeypatch.setattr(patching, "status", refuse)
    assert cli.main(["patch", "--status", "--model_path", "models/tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {told}") and len(said.splitlines()) == 1


def test_other_failures_of_the_system_are_ours_to_mend(monkeypatch):
    def refuse(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/there")

    monkeypatch.setattr(patching, "status", refuse)
    with pytest.raises(FileNotFoundError):
        cli.main(["patch", "--status", "--model_path", "models/tiny"])


def test_a_reader_that_has_enough_is_no_error():
    process = subprocess.Popen(STATUS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_an_answer_that_cannot_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        done = subprocess.run(STATUS, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
