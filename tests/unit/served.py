"""A service in a process of its own: `python -m helpers serve`, or one over a runner without an engine."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"

# `serve` as it is, over an engine that answers with 50 words and remembers nothing.
FAKE = f"""
import argparse, sys
sys.path.insert(0, {str(ROOT)!r})
from helpers.commands import serve
from helpers.checkpoint.tokenizer import QwenTokenizer
from tests.unit.fake_runner import FakeRunner
tokenizer = QwenTokenizer.open({str(TINY)!r})
class Forgetful(FakeRunner):
    def generate(self, *args, **settings):
        self.answers.clear()
        return super().generate(*args, **settings)
serve.open_tokenizer = lambda *args: tokenizer
serve.open_engine = lambda *args, **settings: None
serve.QwenRunner = lambda engine: Forgetful(lambda ids: tokenizer.encode("word " * 50), step_s=0.001)
parser = argparse.ArgumentParser()
serve.add_arguments(parser)
serve.run(parser.parse_args(["--model", "tiny", "--system", "", "--port", "0", *sys.argv[1:]]))
"""


class Served:
    """The process; `url` is where it listens, `log` what it has said so far."""

    def __init__(self, command, **environment):
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | environment,
        )
        self.log = []
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on (http://\S+:\d+)", line):
                self.url = found[1]
                break
        else:
            raise AssertionError("".join(self.log))
        self._reader = threading.Thread(target=self.log.extend, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    @classmethod
    def fake(cls, *options, **environment) -> "Served":
        return cls([sys.executable, "-c", FAKE, *options], **environment)

    def _status(self, name):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])

    def resident_bytes(self):
        return self._status("VmRSS")

    def peak_bytes(self):
        return self._status("VmHWM")

    def simulators(self):
        """Process ids of the simulators that it started."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(child) for file in children for child in file.read_text().split()]

    def close(self, number=signal.SIGINT):
        self.process.send_signal(number)
        try:
            return self.process.wait(300)
        finally:
            self.process.kill()
            self._reader.join()
