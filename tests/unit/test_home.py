"""A user without a name, and without a home that can be written to: usual in containers, here with user id 12345."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import home

ROOT = Path(__file__).resolve().parents[2]
NUMBER = 12345
# As themselves in a namespace where they have that number, or, as root, as a stranger.
WAYS = (
    ["unshare", "--user", f"--map-user={NUMBER}", f"--map-group={NUMBER}"],
    ["setpriv", f"--reuid={NUMBER}", f"--regid={NUMBER}", "--clear-groups"],
)
WHO = "import os, pwd; print(os.getuid()); pwd.getpwuid(os.getuid())"


def becomes_nobody(way) -> bool:
    try:
        done = subprocess.run([*way, sys.executable, "-c", WHO], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return False
    return done.stdout == f"{NUMBER}\n" and "uid not found" in done.stderr


@pytest.fixture(scope="module")
def way():
    for way in WAYS:
        if becomes_nobody(way):
            return way
    pytest.skip("neither unshare nor setpriv may run this Python as another user here")


@pytest.fixture
def nobody(way, tmp_path):
    """run(*command, home=None): a Python command of that user's in a copy of the repository that is theirs."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("helpers", "models", "notebooks", "patches"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("requirements.txt", "requirements-device.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "tmp").mkdir()
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o555)
    # The stranger may come in, and have the copy.
    for place in [tmp_path, *tmp_path.parents][:3]:
        place.chmod(place.stat().st_mode | 0o711)
    if way[0] == "setpriv":
        subprocess.run(["chown", "-R", f"{NUMBER}:{NUMBER}", folder], check=True)
    homes = {"none": None, "missing": sealed / "home", "unwritable": sealed, "empty": ""}

    def run(*command, home="none", check=True):
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}
        environment["TMPDIR"] = str(folder / "tmp")
        if homes[home] is not None:
            environment["HOME"] = str(homes[home])
        done = subprocess.run(
            [*way, sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert not check or done.returncode == 0, done.stderr
        return done

    run.folder = folder
    return run


HOMES = pytest.mark.parametrize("home", ["none", "missing", "unwritable", "empty"])


@HOMES
def test_the_checkpoints_code_is_imported_and_the_libraries_find_a_home(nobody, home):
    code = (
        "import getpass, matplotlib.pyplot, IPython.paths, jupyter_core.paths, torch, os\n"
        "from helpers.checkpoint.modeling import load_modeling\n"
        "load_modeling('models/tiny')\n"
        "getpass.getuser()\n"
        "os.makedirs(jupyter_core.paths.jupyter_runtime_dir())\n"
        "print(matplotlib.get_cachedir(), IPython.paths.get_ipython_dir())"
    )
    done = nobody("-c", "import helpers\n" + code, home=home)
    assert done.stderr == ""
    # Kept from one command to the next, and for nobody else.
    places = {line.split("/.")[0] for line in done.stdout.split()}
    assert len(places) == 1, done.stdout
    status = os.lstat(places.pop())
    assert stat.S_IMODE(status.st_mode) == 0o700
    again = nobody("-c", "import helpers, IPython.paths; print(IPython.paths.get_ipython_dir())", home=home)
    assert again.stdout.strip() == done.stdout.split()[1]


@pytest.mark.slow
def test_patch_export_and_a_notebook(nobody):
    nobody("-m", "helpers", "patch", "--model_path", "models/tiny", "--out", "patched", "--seq_length", "64")
    nobody("-m", "helpers", "export", "--model_path", "patched", "--out", "onnx", "--seq_length", "64")
    assert (nobody.folder / "onnx" / "block_0.onnx").exists()
    nobody("-m", "helpers", "doctor", check=False)
    nobody("-m", "helpers", "notebooks", "--only", "00")


@pytest.mark.slow
@pytest.mark.parametrize("home", ["none", "unwritable"])
def test_chat_has_the_fast_simulator(nobody, bmodel_tiny, home):
    shutil.copy(bmodel_tiny, nobody.folder / "tiny.bmodel")
    command = ["chat", "--model", "tiny.bmodel", "--tokenizer", "models/tiny", "--engine", "simulator"]
    done = nobody("-m", "helpers", *command, "--question", "Hello, how are you?", home=home)
    assert "I am fine, thank you." in done.stdout
    code = "from helpers.run.engines import open_engine; print(open_engine('tiny.bmodel').scheduling)"
    assert nobody("-c", code, home=home).stdout == "yield\n"


def test_a_user_with_a_name_and_a_home_keeps_both(tmp_path):
    code = "import os; before = dict(os.environ); import helpers; assert before == dict(os.environ)"
    environment = {"HOME": str(tmp_path), "USER": "somebody", "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.parametrize("foreign", ["link", "open", "file", "others"])
def test_a_folder_of_somebody_elses_is_not_taken_for_a_home(monkeypatch, tmp_path, foreign):
    """Anybody may make a folder of that name below /tmp, and what libraries keep there is run."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"qwen-bm1684x-home-{os.geteuid()}"
    if foreign == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    elif foreign == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777 if foreign == "open" else 0o700)
    if foreign == "others":
        if os.geteuid():
            pytest.skip("only root can give a folder away")
        os.chown(place, NUMBER, NUMBER)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    monkeypatch.setenv("USER", "somebody")
    home.provide()
    taken = Path(os.environ["HOME"])
    assert taken != place and taken.parent == tmp_path and stat.S_IMODE(taken.stat().st_mode) == 0o700
