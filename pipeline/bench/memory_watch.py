"""Peak resident memory of this process and of the worker processes below it (Ray's, or a spawned pool's)."""

from __future__ import annotations

import threading

import psutil


class MemoryWatch:
    """Samples the resident memory of this process and of the worker processes below it, every 20 ms."""

    def __init__(self) -> None:
        self._own = self._worker = self._all = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def peaks(self) -> dict[str, float]:
        return {"driver_mb": self._own / 1e6, "worker_mb": self._worker / 1e6, "all_mb": self._all / 1e6}

    def _watch(self) -> None:
        this = psutil.Process()
        while not self._ended.wait(0.02):
            own = this.memory_info().rss
            workers = []
            for child in this.children(recursive=True):
                try:
                    command = " ".join(child.cmdline())
                    if command.startswith("ray::") or "spawn_main" in command:
                        workers.append(child.memory_info().rss)
                except psutil.Error:  # gone meanwhile
                    continue
            self._own, self._worker = max(self._own, own), max(self._worker, *workers, 0)
            self._all = max(self._all, own + sum(workers))
