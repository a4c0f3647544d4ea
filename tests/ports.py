"""Ports for servers that a test starts."""

from __future__ import annotations

import socket

HOST = "127.0.0.1"


class ReservedPort:
    """A free port of this machine. Until it is released the system gives it to no connection, and
    to no socket that asks for any port.

    A server that sets SO_REUSEADDR, as sshd and PyTorch's store do, can listen on it nevertheless.
    Where the system does not let it, as outside of Linux, the port is only likely to stay free.
    """

    def __init__(self) -> None:
        self._socket = _reusing(0)
        self.number: int = self._socket.getsockname()[1]
        try:
            with _reusing(self.number) as server:
                server.listen()
        except OSError:
            self.release()

    def release(self) -> None:
        self._socket.close()


def _reusing(port: int) -> socket.socket:
    made = socket.socket()
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
    except OSError:
        made.close()
        raise
    return made
