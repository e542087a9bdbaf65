"""Checks that a run can write its checkpoints, and that all its hosts do so in one place.

Each host writes a file there and looks for host 0's. Every host writes a part of a checkpoint: if each has a disk of
its own, no part is a checkpoint, and nothing fails until one is to be read. A place that cannot be written to would be
noticed at the first save, after many steps.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from segzero_jax.checkpoint_paths import checkpoint_directory
from segzero_jax.config import Config, ConfigError
from segzero_jax.local_path import is_url
from segzero_jax.model.weights import StorageError
from segzero_jax.pods import Pod

_REASON_LENGTH = 200


def probe(directory: epath.Path, pod: Pod) -> None:
    """Writes a file, lists the directory, looks for host 0's file, and deletes its own. All hosts do so together.

    Nothing is left behind, and no such file is ever taken for a checkpoint: its name is not a step.

    Raises:
      ConfigError: this host does not see what host 0 has written; one line.
      StorageError: this host cannot do one of these things; one line.
    """
    missing = [] if is_url(directory) else [path for path in (directory, *directory.parents) if not path.exists()]
    # A name that all hosts know and no other probe has.
    name = pod.exchange("checkpoint probe", uuid.uuid4().hex if pod.first else "")[0]
    own, firsts = directory / f"probe-{name}-{pod.index}", directory / f"probe-{name}-0"
    problem: ConfigError | StorageError | None = None
    try:
        try:
            with _doing("written to", directory):
                directory.mkdir(parents=True, exist_ok=True)
                own.write_text(name)
            with _doing("listed", directory):
                # As in a run: Orbax first asks for the bucket's type, which needs a separate permission.
                list(ocp.path.step.standard_name_format().find_all(directory))
        except StorageError as error:
            problem = error
        written = pod.exchange("checkpoint probe written", str(problem or ""))
        # If host 0 could not write its file, host 0 reports that.
        if problem is None and not written[0]:
            problem = _unseen(firsts, directory, pod)
        pod.exchange("checkpoint probe seen", "")
    finally:
        try:
            with _doing("deleted from", directory):
                if own.exists():
                    own.unlink()
        except StorageError as error:
            problem = problem or error
    pod.exchange("checkpoint probe deleted", "")
    for path in missing:
        # Not epath's rmdir, which also removes files that were added meanwhile.
        with contextlib.suppress(OSError):
            os.rmdir(path)
    if problem is not None:
        raise problem


def check_storage(config: Config, pod: Pod) -> None:
    """Checks the checkpoint directory of a run that is about to train. Raises as ``check_shared`` does."""
    directory = checkpoint_directory(config)
    # What a single host has yet to make in run.dir needs no check of its own: the run's lock is written there first.
    if pod.count > 1 or config.run.checkpoint_dir or os.path.lexists(directory):
        check_shared(directory, pod)


def check_shared(directory: epath.Path, pod: Pod) -> None:
    """Raises as ``probe`` does, on all hosts if it fails on any, and then names one of them."""
    if pod.count == 1:
        probe(directory, pod)
        return
    found = ["", ""]
    try:
        probe(directory, pod)
    except ConfigError as error:
        found[0] = str(error)
    except StorageError as error:
        found[1] = str(error)
    said = [json.loads(text) for text in pod.exchange("checkpoint storage", json.dumps(found))]
    for raised, told in ((ConfigError, [text for text, _ in said]), (StorageError, [text for _, text in said])):
        hosts = [host for host in range(pod.count) if told[host]]
        if hosts:
            more = f" and {len(hosts) - 1} more" if len(hosts) > 1 else ""
            raise raised(f"{pod.host(hosts[0])}{more}: {told[hosts[0]]}")


def _unseen(firsts: epath.Path, directory: epath.Path, pod: Pod) -> ConfigError | StorageError | None:
    try:
        with _doing("read", directory):
            if firsts.exists():
                return None
    except StorageError as error:
        return error
    return ConfigError(
        f"{directory}: what {pod.host(0)} writes there is not seen here; run.checkpoint_dir has to be storage that all "
        "hosts share, such as gs://bucket/path"
    )


@contextlib.contextmanager
def _doing(what: str, directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Every store has its own errors; all mean the same here.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:_REASON_LENGTH]}"
        raise StorageError(f"{directory}: cannot be {what}: {reason}") from None
