"""Ports for servers that a test starts."""

from __future__ import annotations

import socket
import sys


class ReservedPort:
    """A free port of 127.0.0.1. Until it is released the system gives it to no connection, and to
    no socket that asks for any port.

    A server that sets SO_REUSEADDR, as sshd and PyTorch's store do, can listen on it nevertheless.
    That is so on Linux; elsewhere the port is only likely to stay free.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self.release()

    def release(self) -> None:
        self._socket.close()
