"""What a piece of work takes: the prediction after its first part, what is measured, and what is refused."""

import os
import subprocess
import sys
import time

import pytest

from helpers import machine
from helpers.cost import Cost, Work, require
from helpers.errors import UserError

MB = 1 << 20


def test_after_the_first_part_the_seconds_are_those_of_this_machine(tmp_path):
    work = Work("The work", tmp_path, {"small": 1.0, "large": 30.0}, 5, 6, start=1.0)
    assert work.before == work.predicted == Cost(32.0, 5, 6)
    said = []
    work.announce("", "", said.append)
    with work:
        time.sleep(0.2)
        work.done("one that was there already")
        assert work.predicted == work.before
        work.done("small")
        first = work.predicted
        work.done("large")
        assert work.predicted == first  # only once
        record = work.record()
    # `small` and what is before it were two seconds of 32.
    assert 16 * 0.2 <= first.seconds < 16 * record["taken"]["seconds"] + 1 and first.memory_bytes == 5
    assert record["before"]["seconds"] == 32 and record["predicted"]["seconds"] == pytest.approx(first.seconds, abs=0.1)
    assert len(said) == 2 and "about 32 s" in said[0] and "small is done" in said[1]


def test_parts_that_run_at_once_take_no_less_than_the_longest(tmp_path):
    assert Work("it", tmp_path, {"a": 1, "b": 1, "c": 2}, 0, 0, at_once=2).before.seconds == 2
    assert Work("it", tmp_path, {"a": 1, "b": 9}, 0, 0, at_once=2).before.seconds == 9


def test_what_is_taken_is_measured_at_its_peak_with_what_other_processes_take(tmp_path):
    (tmp_path / "there").write_bytes(b"-" * 9 * MB)
    code = "import time; held = bytearray(b'-' * (64 << 20)); print(flush=True); time.sleep(60)"
    with Work("The work", tmp_path, {"it": 1.0}, 0, 0) as work:
        (tmp_path / "scratch").write_bytes(b"-" * 5 * MB)
        os.link(tmp_path / "scratch", tmp_path / "the same")
        own = bytearray(b"-" * 32 * MB)
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            while not (work._others >= 64 * MB and work._disk):
                time.sleep(0.05)
            process.kill()
        del own
        (tmp_path / "scratch").unlink()
        (tmp_path / "the same").unlink()
        taken = work.record()["taken"]
    assert taken["disk_bytes"] == 5 * MB and 96 * MB <= taken["memory_bytes"] < 200 * MB


def test_nothing_to_do_needs_nothing_and_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda path: 0)
    said = []
    Work("The work", tmp_path, {}, 10**15, 10**15).announce("", "", said.append)
    assert said == []


@pytest.mark.parametrize("lacking, told", [("memory", "buy more"), ("disk", "delete some")])
def test_what_lacks_is_one_sentence_with_what_to_do(tmp_path, monkeypatch, lacking, told):
    monkeypatch.setattr(machine, f"free_{lacking}", lambda *_: 1_000_000)
    with pytest.raises(UserError, match=rf"The work needs 2.0 GB of {lacking}, 0.001 GB are free.*: {told}\.$"):
        Work("The work", tmp_path, {"it": 1}, 2e9, 2e9).announce("buy more", "delete some")


def test_time_is_never_a_reason_to_refuse(tmp_path):
    Work("The work", tmp_path, {"it": 1e12}, 0, 0).announce("", "")
    require("It", 5, "memory", 5, "nothing")
