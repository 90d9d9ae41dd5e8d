"""What holds for the repository as a whole, and what a newcomer types first."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.notebook.checks import check_source

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = re.compile(r"""(registry *= *"|index-url[ =]|"resolved": *"|https://[^ "]+/(?:simple|packages)/)""")
# A developer's or a CI machine's own folders; a reader has none of them.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+|opt/(?:pypi|wheels))/")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name and (ROOT / name).is_file()]


def text_files() -> list[tuple[Path, str]]:
    files = []
    for path in tracked():
        try:
            files.append((path, path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    assert files
    return files


def found(pattern: re.Pattern) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in text_files()
        for match in pattern.finditer(text)
    ]


def test_no_registry_address():
    assert REGISTRY.search("--index-" + "url https://example.org")
    assert found(REGISTRY) == []


def test_no_machine_path():
    assert MACHINE_PATH.search("see /ro" + "ot/x") and not MACHINE_PATH.search("a/work/b ../home/x/")
    assert found(MACHINE_PATH) == []


NOTEBOOKS = tracked("*.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_as_committed(path):
    """What git has of it: a reader may run and save the file."""
    place = f":{path.relative_to(ROOT)}"
    shown = subprocess.run(["git", "show", place], cwd=ROOT, capture_output=True, text=True, check=True)
    notebook = nbformat.reads(shown.stdout, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None]
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    if path.parent == ROOT / "notebooks":
        assert check_source(notebook) == []


def test_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "-q", "--output-format=concise", *tracked("*.py", "*.ipynb")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "" and done.returncode == 0


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_readme_names_only_targets_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", readme))
    assert {"run", "test"} <= named <= targets()


def test_every_target_is_listed_by_make_alone():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listed.splitlines()} == targets()


@pytest.fixture
def ci(tmp_path):
    """Runs .ci/run over a Makefile of ours, on a machine that has only some programs; (exit code, what it printed)."""
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "id", "make", "curl", "cc", "echo"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "apt-get").write_text('#!/bin/bash\necho "apt-get $*" >&2\n')
    (programs / "apt-get").chmod(0o755)

    def ran(run: str, test: str, *more: str) -> tuple[int, str]:
        for name in more:
            (programs / name).symlink_to("/bin/true")
        (tmp_path / "Makefile").write_text(f"run:\n\t@echo walks; {run}\ntest:\n\t@echo tests $$CI; {test}\n")
        done = subprocess.run(
            [programs / "bash", tmp_path / ".ci" / "run"],
            cwd="/",
            env={"PATH": str(programs)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return ran


def test_ci_walks_the_notebooks_and_then_tests(ci):
    assert ci("true", "true", "chromium", "parallel") == (0, "walks\ntests true\n")


@pytest.mark.parametrize(("run", "test"), [("exit 1", "true"), ("true", "exit 1")])
def test_ci_is_red_where_one_of_the_commands_is(ci, run, test):
    code, said = ci(run, test, "chromium", "parallel")
    assert code == 2 and said.startswith("walks\n") and ("tests" in said) == (run == "true")


def test_ci_installs_what_the_tests_need_and_says_so(ci):
    code, said = ci("true", "true")
    assert code == 0
    if os.geteuid() == 0:
        assert said.startswith("ci: apt-get install chromium parallel\napt-get update -qq\napt-get install -y")
    else:
        assert "chromium parallel are not installed, and this is not root on Debian" in said


def pins() -> dict[str, str]:
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def test_closure_has_what_requirements_name():
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines())
    named = [Requirement(line) for line in lines if line]
    assert len(named) > 20
    wrong = [str(r) for r in named if not r.specifier.contains(pins().get(canonicalize_name(r.name), "0.0"))]
    assert wrong == []


def test_closure_is_only_pins():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    other = [line for line in lines if line and not re.match(r" *#|[\w.-]+==[\w.!+-]+$", line)]
    assert other == []


def test_closure_has_a_pin_for_all_that_is_needed():
    from importlib import metadata

    # The closure leaves out pycocotools on purpose (setup.sh says why) and is made for Linux on x86-64.
    missing = set()
    for name in pins():
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # the CPU build of torch needs no CUDA package
        for line in needed:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(requirement.name)} - set(pins())
    assert missing == {"pycocotools"}


def test_bug_report_asks_for_the_doctor():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yaml").read_text(encoding="utf-8"))
    doctor = next(part for part in form["body"] if part.get("id") == "doctor")
    assert "make doctor" in doctor["attributes"]["description"] and doctor["validations"]["required"]


def test_conda_takes_the_same_closure():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert "python=3.10" in environment["dependencies"]
    assert {"pip": ["-r requirements.txt", "-e ."]} in environment["dependencies"]


# setup.sh, with a uv that only writes down what it is asked

STUB_UV = """#!/bin/bash
echo "$@" >>{log}
case "$1" in
  --version) echo uv 0 ;;
  python) [ "$2" = find ] && [ -n "{python}" ] && echo {python} ;;
  venv) rm -rf .venv; mkdir -p .venv/bin
        printf '#!/bin/bash\nh=${{0%%/*}}/../helpers\n[ -e "$h" ] && export PYTHONPATH=$(cat "$h")\n' >.venv/bin/python
        printf 'exec {python} "$@"\n' >>.venv/bin/python
        chmod +x .venv/bin/python ;;
  pip) case "$*" in *--editable*) pwd >.venv/helpers ;; *) {install} ;; esac ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with setup.sh, a stub of uv and a stub of the doctor; call it to run setup.sh."""
    folder = tmp_path / "clone"
    (folder / "helpers").mkdir(parents=True)
    for name in ("setup.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "helpers" / "__init__.py").touch()
    doctor = folder / "helpers" / "__main__.py"
    doctor.write_text("")
    tools = tmp_path / "bin"
    tools.mkdir()
    # A GPU, so that nothing asks PyTorch's index; and no Python 3.10 but the one that the stub of uv names.
    for name, body in (("nvidia-smi", "exit 0"), ("python3.10", "exit 1")):
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    log = tmp_path / "log"

    def run(install="true", python=sys.executable, sick=False, home=str(tmp_path)):
        log.write_text("")
        doctor.write_text("raise SystemExit(1)" if sick else "")
        (tools / "uv").write_text(STUB_UV.format(log=log, python=python, install=install))
        (tools / "uv").chmod(0o755)
        environment = {**os.environ, "PATH": f"{tools}:/usr/bin:/bin", "HOME": home}
        for name in ("PYENV_ROOT", "CONDA_PREFIX", *(["HOME"] if home is None else [])):
            environment.pop(name, None)
        done = subprocess.run(["./setup.sh"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        lines = log.read_text().splitlines()
        asked = [line.split()[0] for line in lines if "--editable" not in line]
        assert not asked or done.returncode or "--editable ." in lines[-1]  # the helpers themselves come last
        return done, [word for word in asked if word in ("venv", "pip")]

    run.folder = folder
    return run


def test_setup_then_nothing_to_do(clone):
    done, asked = clone()
    assert (done.returncode, asked) == (0, ["venv", "pip"]), done.stderr
    done, asked = clone()
    assert (done.returncode, asked, done.stdout + done.stderr) == (0, [], "")


def test_setup_in_a_copy_of_the_folder_installs_the_copys_helpers(clone):
    clone()
    (clone.folder / ".venv" / "helpers").write_text(str(clone.folder.parent / "elsewhere"))
    assert clone()[1] == ["pip"]
    assert clone()[1] == []


@pytest.mark.parametrize("home", [None, "", "/proc/nobody"])
def test_setup_without_a_home(clone, home):
    """As in a container whose user is a number only."""
    done, asked = clone(home=home)
    assert (done.returncode, asked) == (0, ["venv", "pip"]), done.stderr
    assert (clone.folder / ".tools" / "home").is_dir()


def test_setup_installs_into_the_same_environment_when_the_pins_change(clone):
    clone()
    with open(clone.folder / "requirements.txt", "a") as file:
        file.write("extra==1.0\n")
    assert clone()[1] == ["pip"]
    assert clone()[1] == []


def test_setup_killed_half_way_is_built_anew(clone):
    done, _ = clone(install="kill -9 $PPID; sleep 1")
    assert done.returncode != 0
    assert clone()[1] == ["venv", "pip"]
    assert clone()[1] == []


def test_setup_takes_the_cpu_build_of_torch_where_its_index_answers(clone, tmp_path):
    for name, status in (("nvidia-smi", 1), ("timeout", 0)):  # no GPU, and the look at the index succeeds
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\nexit {status}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert clone()[1] == ["venv", "pip"]
    assert "--torch-backend cpu -r .venv/requirements-cpu.txt" in (tmp_path / "log").read_text()
    kept = (clone.folder / ".venv" / "requirements-cpu.txt").read_text()
    assert "\ntorch==" in kept and not re.search("^(nvidia|cuda|triton)", kept, re.MULTILINE)
    # It answered, and then did not deliver: PyPI's build is taken.
    (clone.folder / ".venv" / ".installed").unlink()
    done, asked = clone(install="[[ $* != *torch-backend* ]]")
    assert (done.returncode, asked) == (0, ["pip", "pip"])
    assert "-r requirements.txt" in (tmp_path / "log").read_text()


def test_setup_whose_python_is_gone_is_built_anew(clone):
    clone()
    (clone.folder / ".venv" / "bin" / "python").unlink()
    assert clone()[1] == ["venv", "pip"]


def test_setup_with_a_sick_environment_is_not_done(clone):
    assert clone(sick=True)[0].returncode != 0
    done, asked = clone()
    assert (done.returncode, asked) == (0, ["pip"])


def test_setup_that_cannot_install_says_so(clone):
    done, _ = clone(install="echo 'error: no such package' >&2; exit 1")
    assert done.returncode != 0 and "no such package" in done.stderr
    assert clone()[1] == ["venv", "pip"]


def test_setup_without_a_python(clone):
    done, asked = clone(python="")
    assert done.returncode == 2 and asked == []
    assert "error: no Python 3.10 was found" in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="it is root that JupyterLab refuses")
def test_jupyterlab_starts_for_root(tmp_path):
    command = ["make", "-o", "setup", "lab", "ARGS=--no-browser --port=0 --ip=127.0.0.1"]
    environment = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        said = ""
        for line in process.stderr:
            said += line
            if "is running at" in line:
                os.killpg(process.pid, signal.SIGKILL)
    assert "is running at" in said, said
