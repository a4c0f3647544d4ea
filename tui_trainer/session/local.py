"""Connecting to a run on this machine, by its directory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tui_trainer.config.spec import find_socket
from tui_trainer.session.registry import look_at
from tui_trainer.session.stream import Connect, NotYet, RunGone, Stream, Unreachable
from tui_trainer.session.trust import RunError, check_directory, check_socket, peer_user

CONNECT_SECONDS = 3.0


def connector(directory: str | os.PathLike[str]) -> Connect:
    """For `LiveSession`: connects to the run whose directory this is, for as long as it lives."""
    run = Path(directory).absolute()

    def connect() -> Stream:
        path = find_socket(run)
        try:
            check_directory(run)
            if path is None:
                raise NotYet("waiting for the run to listen")
            return connect_unix(path)
        except NotYet:
            _check_alive(run)
            raise
        except RunError as fault:
            raise RunGone(fault.message, fault.hint) from fault
        except OSError as fault:
            raise RunGone(f"there is no run in {run}: {fault.strerror}") from fault

    return connect


def _check_alive(directory: Path) -> None:
    run = look_at(directory)
    if run is None:
        raise RunGone(f"there is no run in {directory}")
    if not run.live:
        raise RunGone(f"{run.name} is not running: it has {run.state}", run.note, run.state)


def connect_unix(path: Path) -> Stream:
    """A stream to the socket at `path`, if it is this user's.

    Raises NotYet when nobody listens there, Unreachable when the run does not accept now, RunGone
    when the socket or its listener must not be trusted.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(CONNECT_SECONDS)
    try:
        check_socket(path)
        client.connect(str(path))
        if peer_user(client) not in (None, os.geteuid()):
            raise RunGone(f"what listens at {path} belongs to another user")
        return Stream.of_socket(client)
    except (FileNotFoundError, ConnectionRefusedError) as fault:
        client.close()
        raise NotYet("waiting for the run to listen") from fault
    except OSError as fault:
        client.close()
        reason = "it does not answer" if isinstance(fault, TimeoutError) else fault.strerror
        raise Unreachable(f"cannot connect to the run: {reason}", str(path)) from fault
    except RunError as fault:
        client.close()
        raise RunGone(fault.message, fault.hint) from fault
    except RunGone:
        client.close()
        raise
