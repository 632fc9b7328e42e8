"""Starting to write a file's pages to disk while more are produced, so that the fsync at its end has little left to do."""

from __future__ import annotations

import os
from threading import Condition, Thread

FLUSH_BYTES = 128 << 20


class BackgroundFlush:
    """Calls fdatasync on a descriptor whenever another 128 MiB have been written to it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._condition = Condition()
        self._waiting_bytes = 0
        self._closed = False
        self._error: OSError | None = None
        self._thread: Thread | None = None

    def written(self, nbytes: int) -> None:
        """Count bytes that were written; safe from several threads."""
        with self._condition:
            self._waiting_bytes += nbytes
            if self._waiting_bytes >= FLUSH_BYTES:
                if self._thread is None:
                    self._thread = Thread(target=self._run, name="flush", daemon=True)
                    self._thread.start()
                self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._waiting_bytes >= FLUSH_BYTES)
                if self._closed:
                    return
                self._waiting_bytes = 0
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._error = error
                return

    def close(self) -> None:
        """Wait for the thread; raises the error that a flush met, which a later fsync might not see again."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
