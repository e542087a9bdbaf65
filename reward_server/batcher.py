"""The queue between calls and devices: bounded, first in, first out, handed out in batches.

Calls submit items and wait for a future; a device's thread takes a batch of the queued items. Cancelled and overdue
items are dropped when their turn comes. TF Serving's batching guide explains the two knobs
(https://github.com/tensorflow/serving/blob/master/tensorflow_serving/batching/README.md).
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Bounds of the retry delay given to a refused caller, in seconds.
_SOONEST_S, _LATEST_S = 0.05, 5.0


class NotServedError(Exception):
    """The item will not reach a device."""


class QueueFullError(NotServedError):
    """The queue is full; retry after ``retry_after_s`` seconds."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting, the queue is full")
        self.retry_after_s = retry_after_s


class TooLateError(NotServedError):
    """The deadline passed before the item's turn."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before its turn came")


class ClosedError(NotServedError):
    """The queue is closed: the server is stopping, or its device is dead."""


@dataclass(eq=False)
class Ticket(Generic[Item, Result]):
    """An item in the queue.

    Attributes:
      deadline: the time after which the result is not needed, by ``time.monotonic()``.
      future: the result. Cancelling it removes the item from the queue, unless a device has it already.
      enqueued, taken: times by ``time.monotonic()``.
      batch: size of the batch in which it was taken.
    """

    item: Item
    deadline: float
    future: "Future[Result]" = field(default_factory=Future)
    enqueued: float = field(default_factory=time.monotonic)
    taken: float = 0.0
    batch: int = 0


class Batcher(Generic[Item, Result]):
    """A bounded queue that any number of threads fill and empty.

    Args:
      max_batch: maximum number of items in a batch.
      max_delay_s: how long the first item of an incomplete batch waits for others. The time counts from arrival, so
        it adds no latency while the devices are busy.
      max_waiting: maximum number of items in the queue, including those still being prepared.
    """

    def __init__(self, max_batch: int, max_delay_s: float, max_waiting: int) -> None:
        self.max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._max_waiting = max_waiting
        self._waiting: deque[Ticket[Item, Result]] = deque()
        self._reserved = 0
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._seconds_per_item = _SOONEST_S

    def __len__(self) -> int:
        """The number of places taken: items that wait, and those still being prepared."""
        return len(self._waiting) + self._reserved

    @contextmanager
    def reserve(self, deadline: float) -> Iterator[None]:
        """Reserves a place while an item is prepared and submitted, so that no prepared item finds the queue full.

        Raises:
          ClosedError, TooLateError, QueueFullError: on entry, before anything is prepared.
        """
        with self._changed:
            self._check(deadline)
            self._check_room()
            self._reserved += 1
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= 1

    def submit(self, item: Item, deadline: float, reserved: bool = False) -> Ticket[Item, Result]:
        """Queues an item.

        Args:
          deadline: the time after which the result is not needed, by ``time.monotonic()``.
          reserved: whether this caller holds a place by ``reserve``.

        Raises:
          ClosedError, TooLateError, QueueFullError: the item is not queued.
        """
        with self._changed:
            self._check(deadline)
            if not reserved:
                self._check_room()
            ticket: Ticket[Item, Result] = Ticket(item, deadline)
            self._waiting.append(ticket)
            # A waiting thread reacts only to the first and the last item of a batch.
            if len(self._waiting) == 1 or len(self._waiting) >= self.max_batch:
                self._changed.notify()
            return ticket

    def take(self) -> list[Ticket[Item, Result]]:
        """Waits for a batch and returns it; returns an empty list once the queue is closed and empty."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed is not None:
                        return []
                    self._changed.wait()
                    continue
                patience = self._waiting[0].enqueued + self._max_delay_s - time.monotonic()
                if len(self._waiting) < self.max_batch and patience > 0 and self._closed is None:
                    self._changed.wait(patience)
                elif batch := self._next_batch():
                    # Wake another thread for the remaining items: it may not have been notified of them.
                    if self._waiting:
                        self._changed.notify()
                    return batch

    def finished(self, batch: Sequence[Ticket[Item, Result]], seconds: float) -> None:
        """Updates the estimated time per item, from which the retry delay of a full queue is computed."""
        self._seconds_per_item += 0.2 * (seconds / len(batch) - self._seconds_per_item)

    def close(self, reason: str, drop: bool = False) -> None:
        """Closes the queue to new items; waiting items are still handed out, or dropped with ClosedError."""
        with self._changed:
            self._closed = self._closed or reason
            dropped = list(self._waiting) if drop else []
            if drop:
                self._waiting.clear()
            self._changed.notify_all()
        for ticket in dropped:
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(ClosedError(reason))

    def _check(self, deadline: float) -> None:
        if self._closed is not None:
            raise ClosedError(self._closed)
        if deadline <= time.monotonic():
            raise TooLateError

    def _check_room(self) -> None:
        if len(self) >= self._max_waiting:
            self._waiting = deque(ticket for ticket in self._waiting if not self._drop(ticket))
        if len(self) >= self._max_waiting:
            delay = min(max(self._seconds_per_item * len(self), _SOONEST_S), _LATEST_S)
            raise QueueFullError(len(self), delay)

    def _next_batch(self) -> list[Ticket[Item, Result]]:
        batch: list[Ticket[Item, Result]] = []
        while self._waiting and len(batch) < self.max_batch:
            ticket = self._waiting.popleft()
            if not self._drop(ticket) and ticket.future.set_running_or_notify_cancel():
                batch.append(ticket)
        now = time.monotonic()
        for ticket in batch:
            ticket.taken, ticket.batch = now, len(batch)
        return batch

    @staticmethod
    def _drop(ticket: Ticket[Item, Result]) -> bool:
        """Whether the ticket is cancelled or overdue; an overdue one gets TooLateError."""
        if ticket.deadline <= time.monotonic() and ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(TooLateError())
        return ticket.future.done()
