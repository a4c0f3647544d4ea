"""What may be believed on this machine: directories and sockets that nobody else can write to.

Whoever can write to a run's directory could put a socket of their own there and be sent what the
viewer types, or have files removed; so both must belong to this user and to nobody's group.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

from tui_trainer.protocol.errors import UserError

CONNECT_TIMEOUT_S = 5.0


class RunError(UserError):
    """A run that cannot be found, believed or reached."""


def check_directory(path: str | os.PathLike[str]) -> None:
    """Refuse a directory that others can write to or that another user owns. Raises RunError, and
    OSError when it is not there."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise RunError(f"{path} is not a directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise RunError(
            f"{path} belongs to {_user(found.st_uid)}, not to you",
            "attach as the user who started the run",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(
            f"others can write to {path}, so what is in it cannot be trusted",
            f"chmod go-w {path}, or keep runs elsewhere with --runs-dir or $TUI_TRAINER_RUNS_DIR",
        )


def check_socket(path: str | os.PathLike[str]) -> None:
    """Refuse a socket that is not this user's alone. Raises RunError, or OSError for none."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise RunError(f"{path} is not a socket")
    if found.st_uid != os.geteuid():
        raise RunError(
            f"the socket {path} belongs to {_user(found.st_uid)}, not to you",
            "attach as the user who started the run",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(f"others can write to the socket {path}", f"chmod 600 {path}")
    check_directory(Path(path).parent)


def connect_unix(path: str | os.PathLike[str]) -> socket.socket:
    """A connection to the run that listens at `path`, blocking, its other end known to be this
    user's. Raises RunError when it must not be trusted or nobody answers."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        check_socket(path)
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
        peer = peer_user(connection)
        if peer is not None and peer != os.geteuid():
            raise RunError(f"what listens at {path} belongs to {_user(peer)}, not to you")
        connection.settimeout(None)
    except OSError as fault:
        connection.close()
        raise RunError(f"the run does not answer at {path}: {fault.strerror or fault}") from fault
    except RunError:
        connection.close()
        raise
    return connection


def answers(path: str | os.PathLike[str] | None) -> bool:
    """Whether some process listens at this socket, whoever it is."""
    if path is None:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
        return True
    return False


def peer_user(connection: socket.socket) -> int | None:
    """The user id of the process at the other end, where the system tells it."""
    option = getattr(socket, "SO_PEERCRED", None)  # Linux
    if option is None:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _user(number: int) -> str:
    with contextlib.suppress(KeyError, ImportError):
        import pwd

        return pwd.getpwuid(number).pw_name
    return f"user {number}"
