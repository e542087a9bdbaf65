"""Batches, made ahead: by threads, or in processes of their own, which may die."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import TypeVar

import grain
from absl import flags

from segzero_jax.data.end_with_parent import end_with_parent
from segzero_jax.types import Example

T = TypeVar("T")
# Batches that lie ready; at 840 x 840 pixels one of 16 prompts takes 300 MB.
_AHEAD = 2
# How Grain calls its processes.
_PROCESS = "grain-process-prefetch"
_LOOK_S = 0.5
# Iterators some of whose processes are gone: when Grain closes one, deleted ones too, it first reads what those have
# left, and waits for the rest of it.
_abandoned: list[object] = []


class WorkerLost(RuntimeError):
    """A process that makes batches has ended; one line."""


def _begin_worker(_worker: int, _workers: int) -> None:
    """Of a trainer that is killed nothing stays: Grain's workers would wait for their queue to be emptied, for ever.

    Signals to all processes of a run, as Ctrl-C, are the trainer's to obey: it finishes its step and ends its workers.
    One that obeyed might end in the middle of a message, and whoever reads that waits for its rest.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _start_quiet_tracker() -> None:
    """Starts the process that frees what workers leave in shared memory: batches on their way when a run ends.

    It frees them in any case, and would say of each run with workers that something has leaked.
    """
    before = os.environ.get("PYTHONWARNINGS")
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    os.environ["PYTHONWARNINGS"] = quiet if before is None else f"{before},{quiet}"
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


class Batches(Iterator[T]):
    """An endless iterator over batches, which are made ahead: by threads, or in processes of their own.

    Its position is a number of batches, so it goes on from it exactly with any number of workers and of processes.
    """

    def __init__(self, batches: grain.MapDataset[T], workers: int) -> None:
        self._batches = batches
        self._workers = workers
        self._taken = 0
        self._ahead: grain.DatasetIterator[T] | None = None
        self._processes: set[BaseProcess] = set()

    def __next__(self) -> T:
        if self._ahead is None:
            rest = self._batches[self._taken :].to_iter_dataset(grain.ReadOptions(1, _AHEAD))
            if self._workers:
                flags.FLAGS.mark_as_parsed()  # Grain reads some of its own, and absl refuses that before a parsing.
                _start_quiet_tracker()
                options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
                rest = rest.mp_prefetch(options, _begin_worker)
            self._ahead = iter(rest)
        batch = self._waited_for(self._ahead) if self._workers else next(self._ahead)
        self._taken += 1
        return batch

    def _waited_for(self, ahead: Iterator[T]) -> T:
        """The next batch. Raises WorkerLost where Grain would wait for the rest of a message that nobody writes."""
        made: futures.Future[T] = futures.Future()

        def make() -> None:
            try:
                made.set_result(next(ahead))
            except BaseException as error:  # Whatever it is, it is raised below.
                made.set_exception(error)

        # No pool's thread, which Python would wait for at its end.
        threading.Thread(target=make, name="next batch", daemon=True).start()
        while not futures.wait((made,), _LOOK_S).done:
            self._check_processes()
        # What is wrong with the data comes first. For a process that is gone Grain has a RuntimeError without reason.
        if made.exception() is None or isinstance(made.exception(), RuntimeError):
            self._check_processes()
        return made.result()

    def _check_processes(self) -> None:
        """Raises WorkerLost where one has ended by itself."""
        self._processes |= {one for one in multiprocessing.active_children() if one.name.startswith(_PROCESS)}
        for process in self._processes:
            if process.exitcode:
                how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
                raise WorkerLost(
                    f"a process that makes batches has ended ({how}), as for want of memory or of /dev/shm; the same "
                    "command goes on, with fewer data.workers"
                )

    def get_state(self) -> dict[str, int]:
        """Where the next batch is, fit for JSON."""
        return {"next_index": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to where ``get_state`` was asked."""
        self.close()
        self._taken = state["next_index"]

    def close(self) -> None:
        """Stops making batches; the next one asked for begins anew."""
        if self._ahead is not None:
            if any(process.exitcode for process in self._processes):
                for process in self._processes:
                    process.kill()
                _abandoned.append(self._ahead)
            else:
                self._ahead.close()
            self._ahead = None
            self._processes = set()


def training_batches(
    source: Sequence[Example],
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    collate: Callable[[Sequence[Example]], T] = list,  # type: ignore[assignment]
    workers: int = 0,
) -> Batches[T]:
    """An endless iterator over shuffled batches; every epoch has its own order and uses every example once.

    All processes walk one global order: batch k is its examples [k * batch_size, (k + 1) * batch_size), of which each
    process reads the rows that its devices need.

    Args:
      source: what is sampled from; may be shorter than a batch.
      batch_size: examples per batch over all processes.
      seed: of the order.
      rows: of each batch that are read, all by default.
      collate: makes a batch of examples, ahead of time; for worker processes it must survive pickling.
      workers: processes that make batches, 0 for threads of this one.

    Raises:
      ValueError: no examples.
    """
    if len(source) == 0:
        raise ValueError(f"{getattr(source, 'name', 'source')}: no examples to train on")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size, batch_fn=list)
    wanted = range(batch_size) if rows is None else rows
    batches = order.map(lambda indices: collate([source[int(indices[row])] for row in wanted]))
    return Batches(batches, workers)
