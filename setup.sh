#!/usr/bin/env bash
# Builds .venv without conda: uv (fetched if absent), a Python 3.10, the pinned closure, the cure of the wheel.
# Nothing to do: returns at once. Killed half-way: the next run builds it anew. `--lock` renews requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# The user of a container may have no home: uv keeps its cache, and the Python that it fetches, in one.
[ -d "${HOME:-}" ] && [ -w "$HOME" ] || { export HOME=$PWD/.tools/home && mkdir -p "$HOME"; }

venv=.venv
python=$venv/bin/python
stamp=$venv/.installed   # hash of the requirements.txt that is installed, whole
begun=$venv/.installing  # there from the first package to the last: a package may be half there

die() { printf 'error: %s\n' "$*" >&2; exit 2; }
say() { printf 'setup: %s\n' "$*" >&2; }

[ "$(uname -sm)" = "Linux x86_64" ] ||
  die "this is $(uname -sm); the TPU-MLIR wheel is built for Linux x86_64. To run a finished bmodel on a board, see README.md."

runs() { [ -n "$1" ] && "$1" -c "import sys, ssl, ctypes; sys.exit(sys.version_info[:2] != (3, 10))" >/dev/null 2>&1; }

# Whether it is these helpers that the environment has: the folder may have been moved or copied.
ours() {
  (cd / && "$OLDPWD/$python" -c "import helpers, pathlib, sys; sys.exit(not pathlib.Path(helpers.__file__).samefile(sys.argv[1]))" \
    "$OLDPWD/helpers/__init__.py") >/dev/null 2>&1
}

fresh() { [ -f "$stamp" ] && [ ! -e "$begun" ] && [ "$(cat "$stamp")" = "$1" ] && runs "$python" && ours; }

# uv: one that runs (a pyenv shim may answer "command not found"), else one in .tools, by any Python that has pip.
find_uv() {
  local candidate
  for candidate in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" .tools/uv/bin/uv; do
    "$candidate" --version >/dev/null 2>&1 && { echo "$candidate"; return; }
  done
  for candidate in python3 python /usr/bin/python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python; do
    "$candidate" -m pip --version >/dev/null 2>&1 || continue
    say "fetching uv into .tools with $candidate"
    rm -rf .tools/uv
    PIP_ROOT_USER_ACTION=ignore "$candidate" -m pip install --quiet --disable-pip-version-check --target .tools/uv uv >&2 || continue
    .tools/uv/bin/uv --version >/dev/null 2>&1 && { echo .tools/uv/bin/uv; return; }
  done
  die "no uv, and no Python whose pip could fetch it: install uv (docs.astral.sh/uv) or use conda (environment.yml)."
}

# The Python beneath, where the one that was found is of an environment: that may be the one to be replaced.
base_of() { "$1" -c "import sys; print(getattr(sys, '_base_executable', sys.executable))"; }

find_python() {
  local candidate
  for candidate in \
    "$("$uv" python find 3.10 --system --no-python-downloads 2>/dev/null || true)" \
    "$(command -v python3.10 || true)" \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python \
    "${CONDA_PREFIX:-/nonexistent}"/bin/python3.10 \
    "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge}/{,envs/*/}bin/python3.10; do
    runs "$candidate" && { base_of "$candidate"; return; }
  done
  say "no Python 3.10 on this machine: uv fetches one"
  "$uv" python install 3.10 >&2 && candidate=$("$uv" python find 3.10 --system) && runs "$candidate" && { echo "$candidate"; return; }
  die "no Python 3.10 was found (uv, PATH, pyenv, conda) and uv could not fetch one: install it with your system's" \
    "packages or pyenv, or use conda: conda env create -f environment.yml"
}

# PyTorch's CPU build is a tenth of PyPI's, which is the CUDA build; a GPU is of use where the notebooks ask PyTorch.
torch_cpu_answers() {
  nvidia-smi >/dev/null 2>&1 && return 1
  timeout 120 "$1" -c '
import sys, urllib.request
with urllib.request.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=20) as page:
    wanted = "torch-" + sys.argv[1] + "%2Bcpu-cp310"
    sys.exit(wanted.encode() not in page.read())
' "$(sed -n 's/^torch==//p' requirements.txt)" >/dev/null 2>&1
}

# The closure is complete, so what a package says it needs is not looked up again. On a terminal uv shows its
# progress; in a log its two hundred lines of names would hide the rest.
packages() {
  local command=("$uv" pip install --python "$python" --no-deps --only-binary :all: --compile-bytecode "$@")
  if [ -t 2 ]; then
    "${command[@]}"
  else
    "${command[@]}" 2>&1 | { grep -v '^ [+~-] ' >&2 || true; }
  fi
}

packages_with_cpu_torch() {
  torch_cpu_answers "$python" || return 1
  say "torch: the CPU build"
  grep -vE '^(nvidia-|cuda-|triton==)' requirements.txt >"$venv/requirements-cpu.txt"
  packages --torch-backend cpu -r "$venv/requirements-cpu.txt"
}

install() {
  if [ -e "$begun" ] || ! runs "$python"; then
    base=$(find_python)
    say "a new $venv from $base"
    "$uv" venv --quiet --clear --python "$base" "$venv"
  fi
  rm -f "$stamp"
  touch "$begun"
  packages_with_cpu_torch || {
    say "torch: PyPI's build (there is a GPU, or PyTorch's CPU index does not answer)"
    packages -r requirements.txt
  }
  packages --no-build-isolation --editable .
  rm -f "$begun"
  "$python" -m helpers doctor --fix
  echo "$1" >"$stamp"
}

case "${1:-}" in
  --lock)
    uv=$(find_uv)
    # pycocotools has no wheel, so it would ask every machine for a C compiler; only the wheel's COCO scoring uses it.
    UV_CUSTOM_COMPILE_COMMAND="make lock" "$uv" pip compile --quiet requirements.in --output-file requirements.txt \
      --override <(echo "pycocotools ; sys_platform == 'never'") \
      --python-version 3.10 --python-platform x86_64-manylinux_2_31
    ;;
  "")
    wanted=$(sha256sum requirements.txt | cut -d ' ' -f 1)
    fresh "$wanted" && exit 0
    uv=$(find_uv)
    install "$wanted"
    ;;
  *) die "usage: ./setup.sh [--lock]" ;;
esac
