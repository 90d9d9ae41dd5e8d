"""What the command line makes of files and pipes that the system refuses: one sentence, never a traceback."""

import errno
import os
import subprocess
import sys

import pytest

from helpers import cli
from helpers.patching import patching

HELPERS = [sys.executable, "-m", "helpers"]
STATUS = [*HELPERS, "patch", "--status", "--model_path", "models/tiny"]


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


COMMANDS = {
    "doctor": [*HELPERS, "doctor"],
    "fetch": [*HELPERS, "fetch", "--source", "models/tiny", "--out", "{tmp}/fetched"],
    "patch": [*HELPERS, "patch", "--model_path", "models/tiny", "--out", "{tmp}/patched", "--seq_length", "64"],
    "help": [*HELPERS, "compile", "--help"],
}
OUTCOMES = {"doctor": (0, 1), "fetch": (0,), "patch": (0,), "help": (0,)}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_stream_is_no_error(tmp_path, command, closed):
    """As a service manager or a script may start a command."""
    told = tmp_path / "told"
    words = [word.format(tmp=tmp_path) for word in COMMANDS[command]]
    script = f'exec "$@" {closed}' if "2>&-" in closed else f'exec "$@" {closed} 2>"{told}"'
    done = subprocess.run(["bash", "-c", script, "bash", *words], stdin=subprocess.DEVNULL, check=False)
    assert done.returncode in OUTCOMES[command]
    assert "Traceback" not in (told.read_text() if told.exists() else "")


def test_a_file_does_not_get_the_number_of_a_closed_stream():
    """What is then printed would be written into it."""
    code = "import sys; from helpers import cli; cli._run = lambda argv: print(open('README.md').fileno() > 2) or 0; "
    script = f'exec "{sys.executable}" -c "{code} sys.exit(cli.main([]))" <&- 2>&-'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n")


@pytest.mark.parametrize("command", [STATUS, COMMANDS["doctor"], COMMANDS["help"]])
def test_a_reader_that_has_enough_is_no_error(command):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_an_answer_that_cannot_be_written_is_no_success():
    with open("/dev/full", "w") as full:
        done = subprocess.run(STATUS, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"]])
def test_python_without_docstrings_is_told_what_to_do(arguments):
    command = [sys.executable, "-m", "helpers", *arguments]
    environment = os.environ | {"PYTHONOPTIMIZE": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "unset PYTHONOPTIMIZE" in done.stderr
