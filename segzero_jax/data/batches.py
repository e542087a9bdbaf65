"""Prefetched batches, made by threads or by worker processes, whose death is detected."""

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
from segzero_jax.data.pipeline import DataError
from segzero_jax.types import Example

T = TypeVar("T")
# Number of prefetched batches; at 840 x 840 pixels, one of 16 prompts takes 300 MB.
_AHEAD = 2
# The name of Grain's worker processes.
_PROCESS = "grain-process-prefetch"
_LOOK_S = 0.5
# Iterators that lost a worker process, kept alive for ever: on closing or deleting one, Grain would read the unfinished
# message of the lost worker and wait for its rest.
_abandoned: list[object] = []


class WorkerLost(RuntimeError):
    """A worker process has died; the message is one line."""


def _begin_worker(_worker: int, _workers: int) -> None:
    """Makes a worker end with the trainer, and not on signals.

    If the trainer is killed, Grain's workers would wait for ever for their queue to be emptied. Signals to all
    processes of a run, such as Ctrl-C, are handled by the trainer: it finishes its step and ends its workers. A worker
    that ended by itself might do so in the middle of a message, and the trainer would wait for the rest.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _start_quiet_tracker() -> None:
    """Starts Python's resource tracker, which frees batches left in shared memory when a run ends, without warnings.

    It frees them in any case, but would report a leak for every run with workers.
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
    """An endless iterator over batches, prefetched by threads or by worker processes.

    Its state is the number of batches taken, so it resumes exactly with any number of workers and of processes.
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
                flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which must be parsed first.
                _start_quiet_tracker()
                options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1)
                rest = rest.mp_prefetch(options, _begin_worker)
            self._ahead = iter(rest)
        batch = self._waited_for(self._ahead) if self._workers else next(self._ahead)
        self._taken += 1
        return batch

    def _waited_for(self, ahead: Iterator[T]) -> T:
        """The next batch. Raises WorkerLost if a worker died, where Grain could wait for its message for ever."""
        made: futures.Future[T] = futures.Future()

        def make() -> None:
            try:
                made.set_result(next(ahead))
            except BaseException as error:  # Raised again below.
                made.set_exception(error)

        # Not a pool's thread, since Python would wait for that at exit.
        threading.Thread(target=make, name="next batch", daemon=True).start()
        while not futures.wait((made,), _LOOK_S).done:
            self._check_processes()
        # Errors in the data take precedence. For a lost process Grain raises a RuntimeError without a reason.
        if made.exception() is None or isinstance(made.exception(), RuntimeError):
            self._check_processes()
        return made.result()

    def _check_processes(self) -> None:
        """Raises WorkerLost if a worker process has died."""
        self._processes |= {one for one in multiprocessing.active_children() if one.name.startswith(_PROCESS)}
        for process in self._processes:
            if process.exitcode:
                how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
                raise WorkerLost(
                    f"a process that makes batches has ended ({how}), perhaps out of memory or of /dev/shm; the same "
                    "command goes on, with fewer data.workers"
                )

    def get_state(self) -> dict[str, int]:
        """The position of the next batch, as JSON-serialisable values."""
        return {"next_index": self._taken}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to the position returned by ``get_state``."""
        self.close()
        self._taken = state["next_index"]

    def close(self) -> None:
        """Stops prefetching; the next request for a batch starts it again."""
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

    All processes follow one global order: batch k is its examples [k * batch_size, (k + 1) * batch_size), of which each
    process reads the rows that its devices need.

    Args:
      source: the examples; may be shorter than a batch.
      batch_size: examples per batch over all processes.
      seed: seed of the order.
      rows: the rows of each batch to read, by default all.
      collate: makes a batch of examples, ahead of time; with worker processes it must be picklable.
      workers: number of worker processes; 0 uses threads of this process.

    Raises:
      DataError: there are no examples.
    """
    if len(source) == 0:
        raise DataError(f"{getattr(source, 'name', 'source')}: no examples to train on")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().batch(batch_size, batch_fn=list)
    wanted = range(batch_size) if rows is None else rows
    batches = order.map(lambda indices: collate([source[int(indices[row])] for row in wanted]))
    return Batches(batches, workers)
