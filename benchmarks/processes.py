"""Finds and kills the processes that a benchmark has started; run processes outlive the app."""

from __future__ import annotations

import contextlib
import os

import psutil


def processes_of(folder: str) -> list[psutil.Process]:
    """The processes whose command line contains `folder`, which belongs to one benchmark."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or ()
        if any(folder in word for word in words) and process.pid != os.getpid():
            found.append(process)
    return found


def kill_all_of(folder: str) -> None:
    """Kill those processes without a clean end: their files are removed with the folder."""
    for process in processes_of(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
