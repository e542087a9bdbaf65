"""One run on several hosts: joining, agreeing on what to do next, and ending together.

Hosts talk through JAX's coordination service, which host 0 runs: short texts and barriers, outside the device network.
So they can agree while no program runs, every wait has a name and a deadline, and a dead host can be told from a slow
one. A device collective offers neither: on TPU it waits for a dead host forever.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the client of the coordination service has no public name

from segzero_jax.terminal import lasting, write_line

_HEARTBEAT_S = 30
_DEADLINE_S = 900.0
_LOOK_S = 1.0
_FAREWELL_S = 15.0
# Key prefix under which a host leaves its exit code and the reason.
_LEFT = "segzero/left/"
T = TypeVar("T")
# A deadline for work that may legitimately take hours on one host; if that host dies, the others still end.
WHATEVER_IT_TAKES_S = 30 * 86400.0
# Exit code of a process whose run lost another host.
HOST_LOST = 4


class PodError(ValueError):
    """An environment that does not describe a valid pod; one line."""


class HostLost(RuntimeError):
    """A host did not arrive where the others wait for it; one line names the host and the place."""


class Pod:
    """The hosts of a run, as seen by one of them. All must make the same calls in the same order.

    Attributes:
      index: index of this process.
      count: number of processes, one per host.
      names: host names.
    """

    def __init__(self, index: int = 0, count: int = 1, prog: str = "", advice: str = "") -> None:
        """Use ``join``, or ``ALONE``.

        Args:
          prog: prefix of every line on standard error.
          advice: what to do when a host is lost.
        """
        self.index, self.count = index, count
        self.names = [socket.gethostname()]
        self._prog, self._advice = prog, advice
        self._rounds = 0
        self._leaving = threading.Event()
        self._ending = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, name="pod", daemon=True)
        if count > 1:
            self._client: Any = distributed.global_state.client
            self.names = self.exchange("start", socket.gethostname())
            self._watcher.start()

    @property
    def first(self) -> bool:
        """Whether this host writes files and prints for all."""
        return self.index == 0

    def host(self, index: int) -> str:
        """A host's name in messages."""
        return f"host {index} ({self.names[index]})"

    def exchange(self, what: str, said: str, deadline_s: float = _DEADLINE_S) -> list[str]:
        """Gathers a text from every host, in order of hosts; returns once all have contributed.

        Args:
          what: names the place in the program for messages.
          said: this host's text; a few megabytes at most.
          deadline_s: how long to wait for live hosts; a dead one ends the process much sooner.

        Raises:
          HostLost: some hosts did not arrive.
        """
        if self.count == 1:
            return [said]
        self._rounds += 1
        place = f"segzero/round/{self._rounds}/"
        self._client.key_value_set(f"{place}{self.index}", said)
        try:
            self._client.wait_at_barrier(f"{what} ({self._rounds})", int(deadline_s * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                self._await_verdict()
            here = {key for key, _ in self._client.key_value_dir_get(place)}
            missing = [self.host(i) for i in range(self.count) if f"{place}{i}" not in here]
            who = ", ".join(missing) or "another host"
            raise HostLost(f"{who} did not come to {what!r} within {deadline_s:.0f} s; {self._advice}") from None
        parts = {key.rpartition("/")[2]: value for key, value in self._client.key_value_dir_get(place)}
        # Every host that has come here has read the texts of the last round.
        self._client.key_value_delete(f"segzero/round/{self._rounds - 1}/{self.index}")
        return [parts[str(i)] for i in range(self.count)]

    def difference(self, what: str, found: Mapping[str, str]) -> tuple[str, int, str, str] | None:
        """The first named value that differs between a host and host 0.

        Args:
          what: names the place in the program for messages.
          found: this host's values by name; names that either host lacks are not compared.

        Returns:
          The name, the other host, host 0's value and the other host's value; None if all agree.
        """
        said: list[dict[str, str]] = [json.loads(text) for text in self.exchange(what, json.dumps(dict(found)))]
        for host, theirs in enumerate(said):
            for name in said[0]:
                if theirs.get(name, said[0][name]) != said[0][name]:
                    return name, host, said[0][name], theirs[name]
        return None

    def from_first(self, what: str, ask: Callable[[], T], deadline_s: float = _DEADLINE_S) -> T:
        """Host 0's answer (JSON-serialisable), for what only it can see, such as its files."""
        return json.loads(self.exchange(what, json.dumps(ask() if self.first else None), deadline_s)[0])

    def leave(self, code: int, line: str = "") -> int:
        """Ends this host's part of the run and returns ``code``: 0 waits for all hosts, else the others stop too.

        Args:
          code: the exit code.
          line: why, for standard error and for the other hosts.
        """
        if self.count == 1:
            self._say(line)
            return code
        if code == 0:
            self.exchange("the end", "")
        with self._ending:
            self._client.key_value_set(f"{_LEFT}{self.index}", json.dumps([code, line]))
            self._leaving.set()
            if code or self.first:
                self._say(line)
        # On host 0 the watcher ends when the others have left: without the coordination service they are aborted.
        self._watcher.join(_FAREWELL_S)
        jax.distributed.shutdown()
        return code

    def await_blame(self, error: BaseException) -> None:
        """Waits a while if ``error`` looks like the end of another host; if confirmed, this process ends with it."""
        if self.count > 1 and (isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)):
            self._await_verdict()

    def _await_verdict(self) -> None:
        self._watcher.join(_HEARTBEAT_S + _FAREWELL_S)

    def _watch(self) -> None:
        """Watches for hosts that have died or stopped, and ends this process when one has."""
        everyone = list(range(self.count))
        while True:
            try:
                # Returns when every live host has asked; one that is silent for too long is not waited for.
                live = self._client.get_live_nodes(everyone)
                left = self._client.key_value_dir_get(_LEFT)
            except jax.errors.JaxRuntimeError:
                # This host has left, or host 0 has: JAX ends a process whose coordination service is gone.
                return
            notices = {int(key.rpartition("/")[2]): json.loads(value) for key, value in left}
            stopped = sorted((host, code, line) for host, (code, line) in notices.items() if code)
            dead = [self.host(host) for host in everyone if host not in live and host not in notices]
            if self._leaving.is_set():
                if not self.first:
                    return
                if len(live) == 1:
                    time.sleep(_LOOK_S)  # The last answers of the service are still on their way.
                    return
            elif stopped:
                host, code, line = stopped[0]
                self._end(code, f"{self.host(host)} stopped: {line}")
            elif dead:
                silence = f"no sign of life for {_HEARTBEAT_S} s"
                self._end(HOST_LOST, f"{', '.join(dead)} died ({silence}); {self._advice}")
            self._leaving.wait(_LOOK_S)
            time.sleep(_LOOK_S / 10)

    def _end(self, code: int, line: str) -> None:
        """Ends the process, whatever its other threads wait for, unless it is already leaving."""
        with self._ending:
            if self._leaving.is_set():
                return
            self._say(line)
            lasting(sys.stdout).flush()
            if self.first:
                threading.Timer(_FAREWELL_S, os._exit, [code]).start()
                while len(self._client.get_live_nodes(list(range(self.count)))) > 1:
                    time.sleep(_LOOK_S / 10)
                time.sleep(_LOOK_S)
            else:
                self._client.shutdown()
            os._exit(code)

    def _say(self, line: str) -> None:
        if line:
            write_line(sys.stderr, f"{self._prog}: {line}")


ALONE = Pod()


def join(prog: str, advice: str) -> Pod:
    """Joins this process to the others of its run, if there are any; call it before JAX starts.

    JAX recognises Cloud TPU VMs, GKE (several slices included) and Slurm. Elsewhere, set JAX_COORDINATOR_ADDRESS
    (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      prog: prefix of every line on standard error.
      advice: what to do when a host is lost.

    Raises:
      PodError: the variables are invalid.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and os.environ.get("JAX_PLATFORMS") == "cpu":
        return Pod(prog=prog)
    # ``Pod`` reports a host's death; JAX would abort the others with a stack trace.
    jax.config.update("jax_enable_recoverability", True)
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_HEARTBEAT_S)
    except ValueError as error:
        if address is None and "coordinator_address should be defined" in str(error):
            return Pod(prog=prog)
        raise PodError(f"JAX_COORDINATOR_ADDRESS={address}: {error}") from None
    state = distributed.global_state
    return Pod(state.process_id, state.num_processes, prog, advice)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise PodError(f"{variable}={text}: expected a number")
    return int(text)
