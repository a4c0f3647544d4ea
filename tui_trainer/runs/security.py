"""Decides which directories and sockets of runs can be trusted, and connects to trusted sockets.

A user who can write to a run's directory could put their own socket there and read what a viewer
sends, or have files removed. So directories and sockets must belong to this user, and no other
user may write to them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

from tui_trainer.runs.errors import NotListening, RunError, Unreachable

CONNECT_TIMEOUT_S = 5.0


def check_directory(path: str | os.PathLike[str]) -> None:
    """Raises RunError for a directory that others can write to or that another user owns, and
    OSError where there is none."""
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise RunError(f"{path} is not a directory")
    if found.st_uid not in (os.geteuid(), 0):
        raise RunError(
            f"{path} belongs to {_user_name(found.st_uid)}, not to you",
            "attach as the user who started the run",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(
            f"others can write to {path}, so what is in it cannot be trusted",
            f"chmod go-w {path}, or keep runs elsewhere with --runs-dir or $TUI_TRAINER_RUNS_DIR",
        )


def check_socket(path: str | os.PathLike[str]) -> None:
    """Raises RunError for a socket that another user owns or can write to, and OSError where there
    is none."""
    found = os.lstat(path)
    if not stat.S_ISSOCK(found.st_mode):
        raise RunError(f"{path} is not a socket")
    if found.st_uid != os.geteuid():
        raise RunError(
            f"the socket {path} belongs to {_user_name(found.st_uid)}, not to you",
            "attach as the user who started the run",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RunError(f"others can write to the socket {path}", f"chmod 600 {path}")
    check_directory(Path(path).parent)


def connect_unix(path: str | os.PathLike[str]) -> socket.socket:
    """A blocking connection to the run that listens at `path`, as this user.

    Raises NotListening, Unreachable, or RunError when the socket or its listener cannot be trusted.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        check_socket(path)
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
        connection.settimeout(None)
        peer = peer_user(connection)
        if peer is not None and peer != os.geteuid():
            raise RunError(f"what listens at {path} belongs to {_user_name(peer)}, not to you")
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connection.close()
        raise NotListening(f"nothing listens at {path}") from error
    except OSError as error:
        connection.close()
        reason = error.strerror or error
        raise Unreachable(f"the run does not answer at {path}: {reason}") from error
    except RunError:
        connection.close()
        raise
    return connection


def answers(path: str | os.PathLike[str] | None) -> bool:
    """Whether any process, of this user or another, listens at this socket."""
    if path is None:
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
        return True
    return False


def peer_user(connection: socket.socket) -> int | None:
    """The user id of the process at the other end of a Unix socket; None on systems that do not
    provide it, where only the mode of the socket's directory protects the connection."""
    option = getattr(socket, "SO_PEERCRED", None)  # Linux
    if option is None or connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def _user_name(number: int) -> str:
    with contextlib.suppress(KeyError, ImportError):
        import pwd

        return pwd.getpwuid(number).pw_name
    return f"user {number}"
