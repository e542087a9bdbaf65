"""Hosts of a pod as threads of this process, for what they agree on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from segzero_jax.pods import Pod

T = TypeVar("T")


class ThreadPod(Pod):
    """One host of several that meet at a barrier of threads."""

    def __init__(self, index: int, count: int, barrier: threading.Barrier, board: dict[int, str]) -> None:
        super().__init__()
        self.index, self.count = index, count
        self.names = [f"w-{host}" for host in range(count)]
        self._barrier, self._board = barrier, board

    def exchange(self, what: str, said: str, deadline_s: float = 20.0) -> list[str]:
        self._board[self.index] = said
        self._barrier.wait(deadline_s)
        heard = [self._board[host] for host in range(self.count)]
        self._barrier.wait(deadline_s)
        return heard


def on_hosts(count: int, act: Callable[[Pod], T]) -> list[Future[T]]:
    """What ``act`` gives, or raises, on every host; all have ended."""
    barrier, board = threading.Barrier(count), dict[int, str]()
    with ThreadPoolExecutor(count) as pool:
        return [pool.submit(act, ThreadPod(host, count, barrier, board)) for host in range(count)]
