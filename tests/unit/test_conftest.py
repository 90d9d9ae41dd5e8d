"""What tests/conftest.py does to a run of tests: in CI a skip is red, but for hardware."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pytest

def test_right(): pass

@pytest.mark.hardware
@pytest.mark.skipif(True, reason="no chip")
def test_chip(): pass

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""
SKIPS = """
@pytest.mark.skipif(True, reason="no browser")
def test_page(): pass
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "with workers"])
@pytest.mark.parametrize(
    ("skips", "ci", "code"),
    [("", "true", 0), (SKIPS, "true", 1), (SKIPS, "", 0)],
    ids=["only hardware skipped", "another skipped", "another skipped at home"],
)
def test_a_skip_in_ci_is_red_but_for_hardware(skips, ci, code, workers, tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    shutil.copy(Path(__file__).parents[1] / "conftest.py", folder)
    (folder / "test_some.py").write_text(SUITE + skips)
    options = ["-q", "-W", "ignore", "-c", os.devnull, "--rootdir", tmp_path, *workers]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, folder],
        capture_output=True,
        text=True,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.returncode == code, done.stdout
    assert ("skipped in CI for another reason than hardware: " in done.stdout) == bool(code)
    assert ("no browser" in done.stdout) == bool(code)
