"""Work in a process of its own, which does not outlive the one that began it (Linux)."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable

from helpers.errors import UserError

# <sys/prctl.h>
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies. For children of processes without threads."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def fork(function: Callable[[], object]) -> int:
    """Run a function in a child; the child's process id. Its status is 0, or 1 where it has printed what was raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    status = 1
    try:
        die_with_parent()
        if os.getppid() == parent:
            function()
            status = 0
    except UserError as error:
        print(f"error: {error}")
    except SystemExit:
        pass  # Who raised it has printed why.
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(name: str, function: Callable[[], object]) -> int:
    """Run a function in a child and wait; its peak memory in bytes. name: of what it does, for messages.

    Raises SystemExit where it failed; why is printed by then.
    """
    _, status, usage = os.wait4(fork(function), 0)
    if (code := os.waitstatus_to_exitcode(status)) < 0:
        print(f"error: {name} was ended by {signal.Signals(-code).name}", flush=True)
    if code:
        sys.exit(1)
    return usage.ru_maxrss * 1024
