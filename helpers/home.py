"""What libraries take for granted and a container lacks: a user with a name, and a home that can be written to."""

import os
import pwd
import stat
import tempfile


def provide() -> None:
    """Set, for this process and its children, the variables that stand in for what the machine does not have.

    USER where neither the environment nor the system names the user (PyTorch asks). HOME where there is none that can
    be written to: a folder of this user's below the temporary one, kept from one command to the next.
    """
    if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = str(os.getuid())
    home = os.environ.get("HOME", os.path.expanduser("~"))
    if os.path.isabs(home) and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK):
        return
    try:
        os.environ["HOME"] = _stand_in()
    except OSError:  # nowhere to write to at all: whoever needs a home says so
        pass


def _stand_in() -> str:
    folder = os.path.join(tempfile.gettempdir(), f"qwen-bm1684x-home-{os.geteuid()}")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return folder
    return tempfile.mkdtemp(prefix="qwen-bm1684x-home-")  # that name is somebody else's
