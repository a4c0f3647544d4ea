"""A thread that reads files for the screen, so that the event loop never waits for a disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

Job = Callable[[], None]


class ReaderThread:
    """Runs jobs one after another on a thread that starts with the first job."""

    def __init__(self, name: str, failed: Callable[[], None]) -> None:
        """`failed` is called on the thread where a job raises."""
        self._name, self._failed = name, failed
        self._jobs: SimpleQueue[Job | None] | None = None

    def put(self, job: Job) -> None:
        if self._jobs is None:
            self._jobs = SimpleQueue()
            # A daemon: leaving does not wait for a disk that does not answer.
            Thread(target=self._run, args=(self._jobs,), name=self._name, daemon=True).start()
        self._jobs.put(job)

    def close(self, last: Job) -> None:
        """End the thread after `last`, or do nothing when it has not started."""
        if self._jobs is not None:
            self._jobs.put(last)
            self._jobs.put(None)
            self._jobs = None

    def _run(self, jobs: SimpleQueue[Job | None]) -> None:
        while (job := jobs.get()) is not None:
            try:
                job()
            except Exception:
                with suppress(Exception):  # the event loop has been closed
                    self._failed()
