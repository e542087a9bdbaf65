"""A reward server as a child process: started on a free port, waited for, stopped at the end."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import reward_server
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.reward_client import RewardClient

_PACKAGES = ("torch", "sam2")
_INSTALL = "in a clone, pip install -c constraints.txt -e '.[reward]', then SAM 2 as requirements-sam2.txt says"
_STOP_S = 30.0
_PROBE_S = 1.0
_LOG_LINES = 5


def missing_package() -> str:
    """A line naming the package that a local server lacks and how to install it; empty if none is missing."""
    absent = next((name for name in _PACKAGES if importlib.util.find_spec(name) is None), "")
    return f"{absent} is not installed: {_INSTALL}" if absent else ""


@contextmanager
def local_server(
    model: str = "toy",
    log: str | Path = "reward_server.log",
    startup_timeout_s: float = 300.0,
    if_it_dies: str = "start again",
) -> Iterator[str]:
    """Runs ``python -m reward_server`` beside this process; yields its address once it serves.

    The child stops at the end of the block, and by itself if this process is killed. If a RewardServerError leaves the
    block because the child has died, it is replaced by one with its exit code, the end of its log and what to do.

    Args:
      model: the model to serve: "toy", a hub id or a directory.
      log: file for the child's standard error; overwritten, its directory is made.
      startup_timeout_s: timeout until it serves, including the loading of the model.
      if_it_dies: what the user can do then.

    Raises:
      RewardServerError: it did not start.
      RewardServiceAway: it died later.
    """
    log = Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        child = _start(model, stderr.fileno())
    try:
        address = _wait_until_serving(child, log, startup_timeout_s)
        try:
            yield address
        except RewardServerError:
            if child.poll() is None:
                raise
            raise RewardServiceAway(f"local reward server died ({_end(child, log)}): {if_it_dies}") from None
    finally:
        _stop(child)


def _start(model: str, stderr: int) -> subprocess.Popen[str]:
    # The toy model finishes before threads could be coordinated; any other model needs all threads that PyTorch takes.
    threads = 1 if model == "toy" else 0
    arguments = ["--model", model, "--port", "0", "--threads", str(threads), "--exit-with-parent", str(os.getpid())]
    # The child must import the package from where this process found it.
    home = str(Path(reward_server.__file__).parents[1])
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH", ""), home) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "reward_server", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
        # Ctrl-C in a terminal reaches the whole group; this process decides when its server stops.
        start_new_session=True,
    )


def _wait_until_serving(child: subprocess.Popen[str], log: Path, timeout_s: float) -> str:
    """Waits for the line with the address, then for the health service to report SERVING."""
    assert child.stdout is not None
    deadline = time.monotonic() + timeout_s
    address = ""
    while time.monotonic() < deadline:
        if not address:
            ready, _, _ = select.select([child.stdout], [], [], deadline - time.monotonic())
            line = child.stdout.readline() if ready else ""
            if line:
                address = json.loads(line)["listening"]
            elif ready:
                child.wait(_STOP_S)
        if child.poll() is not None:
            raise RewardServerError(f"local reward server did not start ({_end(child, log)})")
        if address and _serves(address):
            return address
    raise RewardServerError(f"local reward server: not serving after {timeout_s:g} s: see {log}, or give it longer")


def _serves(address: str) -> bool:
    with RewardClient(address, timeout_s=_PROBE_S) as client:
        try:
            client.wait_until_serving(_PROBE_S)
        except RewardServerError:
            return False
        return True


def _end(child: subprocess.Popen[str], log: Path) -> str:
    """How the child ended: its exit code or signal, and the end of its log."""
    code = child.returncode
    said = " | ".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:]) or "nothing"
    return f"{signal.Signals(-code).name if code < 0 else f'exit code {code}'}; {log} ends: {said}"


def _stop(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    assert child.stdout is not None
    child.stdout.close()
