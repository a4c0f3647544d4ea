"""`ssh://[user@]host[:port][/RUN]`: what of it may reach a command line, and what may not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from tui_trainer.session.trust import RunError

SCHEME = "ssh://"
FORM = "the form is ssh://[user@]host[:port][/RUN]"
# ssh hands names to shells (ProxyCommand, Match exec), so nothing passes that a shell would read,
# nor anything that begins with a dash, which would be an option.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,15})?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,63}")
_RUN = re.compile(r"\w[\w.+-]{0,199}")


@dataclass(frozen=True)
class SshAddress:
    """A machine that ssh can reach, and perhaps a run there."""

    host: str
    user: str = ""
    port: int | None = None
    run: str = ""
    """Its name or the beginning of it; "" where it was not said."""

    @property
    def destination(self) -> str:
        """As ssh takes it."""
        return f"{self.user}@{self.host}" if self.user else self.host

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"{SCHEME}{user}{host}{port}" + (f"/{self.run}" if self.run else "")


def parse_address(given: str) -> SshAddress:
    """The parts of an `ssh://` address. Raises RunError when it is none."""
    if not given.isprintable() or " " in given:
        raise RunError(f"{given!r} is no address", FORM)
    try:
        parts = urlsplit(given)
        host, port = parts.hostname or "", parts.port
    except ValueError as fault:
        raise RunError(f"{given} is no address: {fault}", FORM) from fault
    # urlsplit folds the host to lower case, but aliases in ~/.ssh/config are case-sensitive.
    exact = parts.netloc.rpartition("@")[2]
    if not exact.startswith("["):
        host = exact.partition(":")[0]
    if parts.scheme != "ssh" or parts.query or parts.fragment:
        raise RunError(f"{given} is no address of a run", FORM)
    if not (_HOST.fullmatch(host) or (":" in host and _ADDRESS.fullmatch(host))):
        raise RunError(f"{host!r} is not the name of a host" if host else "no host is named", FORM)
    if port == 0:
        raise RunError("port 0 cannot be connected to", FORM)
    if parts.password is not None:
        raise RunError(
            "a password cannot be given in the address", "ssh itself asks for it, or use a key"
        )
    user = unquote(parts.username or "")
    if "@" in parts.netloc and not _USER.fullmatch(user):
        raise RunError(f"{user!r} is not the name of a user", FORM)
    return SshAddress(host, user, port, _run_in(unquote(parts.path)))


def _run_in(path: str) -> str:
    run = path.strip("/")
    if run and not _RUN.fullmatch(run):
        raise RunError(f"{run!r} is not the name of a run", FORM)
    return run
