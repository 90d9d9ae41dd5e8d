"""What libraries take for granted and a container lacks: a user with a name, and a home that can be written to."""

import contextlib
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
    if not (os.path.isabs(home) and os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)):
        with contextlib.suppress(OSError):  # nowhere to write to at all: whoever needs a home says so
            os.environ["HOME"] = private_folder(tempfile.gettempdir(), "home")


def private_folder(parent: str, name: str) -> str:
    """A folder of this user's in one that is everybody's, kept from one command to the next; made where it is not.

    A new one where that name is somebody else's: what is kept in such folders is run.
    """
    folder = os.path.join(parent, f"qwen-bm1684x-{name}-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return folder
    return tempfile.mkdtemp(prefix=f"qwen-bm1684x-{name}-", dir=parent)
