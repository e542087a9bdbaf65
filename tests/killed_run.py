"""A training run that sends itself a signal at a named point, in a process of its own."""

import fcntl
import gc
import importlib
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_reward_server import free_port
from pod_host import write_own_cache

from segzero_jax import pods, train


class Point(NamedTuple):
    """A moment of a run.

    Attributes:
      where: ``module:function`` or ``module:Class.method``, as the run looks it up.
      when: "before" the function, "after" it, or "midway": a file is half written, under the name it is written under.
      call: counted in this process, from 1, over the calls that match.
      path: of the file written, as a glob pattern; for functions of ``jsonl``.
      signals: sent one after the other.
    """

    where: str
    when: str
    call: int
    path: str = "*"
    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)


class Host(NamedTuple):
    """A process of a pod: the coordinator's address, how many there are, and which one it is."""

    address: str
    count: int
    index: int


@contextmanager
def made_once(path: Path) -> Iterator[bool]:
    """Whether this process is the one to make what is to be at ``path``; others wait until it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not path.exists()


# How long a host of these pods may be silent before the others take it for dead.
HEARTBEAT_S = 10


def _ends_at(point: Point, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        is_file = bool(arguments) and isinstance(arguments[0], Path)
        matches = not is_file or arguments[0].match(point.path)
        calls += matches
        if calls != point.call or not matches:
            return function(*arguments, **named)
        if point.when == "midway":
            _write_half(function.__name__, arguments[0])
        result = function(*arguments, **named) if point.when == "after" else None
        for number in point.signals:
            os.kill(os.getpid(), number)
        return result if point.when == "after" else function(*arguments, **named)

    return wrapped


def _write_half(how: str, path: Path) -> None:
    """What a kill leaves of a line that is appended, or of a file that was to take another's place."""
    with (path if how == "append" else path.with_name(path.name + ".tmp")).open("ab") as file:
        file.write(b'{"step": 4, "reward/mean": 3.')
        file.flush()


def arm(point: Point) -> None:
    """Puts the signal in the way of the function."""
    module, _, name = point.where.partition(":")
    owner: Any = importlib.import_module(module)
    *parts, name = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    setattr(owner, name, _ends_at(point, getattr(owner, name)))


def _join_as(host: Host) -> None:
    """Makes this process one of several."""
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), host, strict=True):
        os.environ[f"JAX_{name}"] = str(value)
    pods._HEARTBEAT_S = HEARTBEAT_S
    write_own_cache()


def run(arguments: list[str], cache: str, log: str, point: Point | None, host: Host | None) -> None:
    """The process: trains, and exits with the trainer's code or by a signal."""
    import jax

    gc.disable()  # A tenth of the time until the first step; the process is short-lived.
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # One device is enough, and nothing has asked JAX for devices yet.
    os.environ["XLA_FLAGS"] = re.sub(r"device_count=\d+", "device_count=1", os.environ["XLA_FLAGS"])
    for name, value in {
        "jax_compilation_cache_dir": cache,
        "jax_compilation_cache_max_size": -1,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
        "jax_disable_most_optimizations": True,
    }.items():
        jax.config.update(name, value)
    if host is not None:
        _join_as(host)
    if point is not None:
        arm(point)
    sys.exit(train.main(arguments))


class Processes:
    """Starts runs as processes that are forked from one that has imported everything and computed nothing."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        with pytest.MonkeyPatch.context() as environment:
            # Python 3.11's fork server does not look where its starter does, and is silent about what it did not find.
            environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
            forkserver.ensure_running()

    def start(
        self, arguments: list[str], log: Path, point: Point | None = None, host: Host | None = None
    ) -> BaseProcess:
        process = self._context.Process(target=run, args=(arguments, str(self._cache), str(log), point, host))
        process.start()
        return process

    def exit_code(self, arguments: list[str], log: Path, point: Point | None = None) -> int | None:
        process = self.start(arguments, log, point)
        process.join()
        return process.exitcode

    def exit_codes(
        self, arguments: list[str], logs: Path, count: int, point: Point | None = None, killed: int = 0
    ) -> list[int | None]:
        """Of the hosts of a pod, one of which may come to a point. Their logs are ``logs/INDEX``."""
        address = f"localhost:{free_port()}"
        logs.mkdir(exist_ok=True)
        hosts = [
            self.start(arguments, logs / str(i), point if i == killed else None, Host(address, count, i))
            for i in range(count)
        ]
        for host in hosts:
            host.join()
        return [host.exitcode for host in hosts]
