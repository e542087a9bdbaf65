"""Locations of checkpoints, on a disk or in a bucket, and the errors of reading there."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from segzero_jax import config as configs
from segzero_jax import manifest
from segzero_jax.config import Config, ConfigError
from segzero_jax.local_path import is_url
from segzero_jax.model.weights import CheckpointError, StorageError

_FOLDER = "checkpoints"
_REASON_LENGTH = 200


def storage_path(path: str | Path | epath.Path) -> epath.Path:
    """An absolute path, on a disk or in a bucket."""
    given = epath.Path(path).expanduser()
    # A bucket's path is absolute; resolving it would make it a local one.
    return given if is_url(given) else given.resolve()


def checkpoint_directory(config: Config) -> epath.Path:
    """A run's checkpoint directory: ``run.checkpoint_dir``, or the one inside ``run.dir``."""
    return epath.Path(config.run.checkpoint_dir or f"{config.run.dir}/{_FOLDER}").expanduser()


def locate(path: str | Path | epath.Path) -> tuple[epath.Path, int | None] | None:
    """The checkpoint directory that a path refers to, and the step if it names one; None if there is no such directory.

    Args:
      path: a run directory, even if its checkpoints are in ``run.checkpoint_dir``; a directory of checkpoints; or one
        of its steps. Local or ``gs://``.

    Raises:
      StorageError, ConfigError: as ``complete_steps``.
    """
    directory = epath.Path(path).expanduser()
    if directory.name.isdigit() and directory.parent.name == _FOLDER:
        return directory.parent, int(directory.name)
    with reading(directory):
        own = directory / _FOLDER
        steps = complete_steps(own) if own.is_dir() else []
        try:
            config = configs.load(str(directory / "config.yaml")) if (directory / "config.yaml").is_file() else None
        except ConfigError:
            if not steps:
                raise
            config = None  # Of another version: the checkpoints tell for themselves.
        # Only run.checkpoint_dir is trusted: the run.dir of a copied or renamed run may now be another run's.
        elsewhere = [checkpoint_directory(config)] if config and config.run.checkpoint_dir else []
        found = {own: steps} | {place: complete_steps(place) for place in elsewhere}
        newest = {place: saved[-1] for place, saved in found.items() if saved}
        if newest:
            return max(newest, key=newest.__getitem__), None
        if config:
            place = (*elsewhere, own)[0]
            return (place, None) if place.is_dir() else None
        if own.is_dir():
            return own, None
        if directory.name.isdigit() and _is_complete(directory):
            return directory.parent, int(directory.name)
        return (directory, None) if directory.is_dir() and complete_steps(directory) else None


def complete_steps(directory: epath.Path) -> list[int]:
    """The steps of a directory's complete checkpoints, whose files are not checked for damage.

    Raises:
      StorageError: the directory cannot be read now.
      ConfigError: the package that reads such a location is not installed.
    """
    with reading(directory):
        if not directory.is_dir():
            return []
        return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and _is_complete(path))


def refuse_unfinished(directory: epath.Path) -> None:
    """Raises CheckpointError if a directory without checkpoints has part of one, for example from an interrupted copy.

    No step up to that one could be saved beside it. Leftovers of failed saves do not count: they are known and removed.
    """
    with reading(directory):
        found = directory.iterdir() if directory.is_dir() else ()
        parts = [path for path in found if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)]
    if parts:
        raise CheckpointError(f"{parts[0]}: is an incomplete checkpoint; delete it, or copy it completely")


def _is_complete(checkpoint: epath.Path) -> bool:
    """Whether this is one of our checkpoints, and committed: in a bucket its name exists from the first file on."""
    return (checkpoint / manifest.ITEM).is_dir() and ocp.utils.is_checkpoint_finalized(checkpoint)


@contextlib.contextmanager
def reading(where: epath.Path) -> Iterator[None]:
    """Raises temporary errors of a store as StorageError; errors in its content pass unchanged.

    Raises ConfigError if the package that reads such a store is not installed.
    """
    passing: tuple[type[Exception], ...] = (Exception,) if is_url(where) else (OSError,)
    try:
        yield
    except (CheckpointError, ConfigError, jax.errors.JaxRuntimeError):
        raise
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot be read without a further package ({in_short(error)}); for gs://, .venv/bin/pip install "
            "-c constraints.txt -e '.[tpu]' brings it"
        ) from None
    except passing as error:
        raise StorageError(f"{where}: cannot be read now ({in_short(error)}); nothing was changed") from None


@contextlib.contextmanager
def parsing(checkpoint: epath.Path) -> Iterator[None]:
    """Like ``reading``, but raises CheckpointError for content that Orbax cannot parse.

    For commands that only read. Not in training, where a ValueError may also be the end of another host (Gloo's), and
    not from a bucket, where TensorStore raises it for a lost connection.
    """
    unparsable: tuple[type[Exception], ...] = () if is_url(checkpoint) else (ValueError, KeyError)
    with reading(checkpoint):
        try:
            yield
        except (CheckpointError, ConfigError):
            raise
        except unparsable as error:
            raise CheckpointError(f"{checkpoint}: cannot be read: {in_short(error)}") from error


def in_short(error: Exception) -> str:
    # TensorStore's message starts with its source location, then gives the system's error, and ends with its spec.
    reason = " ".join(str(error).partition(" [tensorstore_spec=")[0].split())
    reason = reason if len(reason) <= _REASON_LENGTH else f"… {reason[-_REASON_LENGTH:]}"
    return reason if reason and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
