"""Ending what a benchmark has started: run processes outlive the app on purpose."""

from __future__ import annotations

import contextlib
import os

import psutil


def processes_of(folder: str) -> list[psutil.Process]:
    """Those whose command line names this folder, which a benchmark has made for itself."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if any(folder in word for word in words) and process.pid != os.getpid():
            found.append(process)
    return found


def kill_all_of(folder: str) -> None:
    """End them at once: what they have made goes with the folder."""
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
