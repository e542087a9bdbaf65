"""Locating the files of a model or data set: inside the package, in a directory, or on the Hugging Face hub."""

import functools
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

TOY = Path(__file__).parent / "assets" / "toy_policy"
# Configuration, tokenizer and licence; _MODEL adds the weights, but not their copies in other formats.
_SETTINGS = ("*.json", "*.jinja", "*.txt", "LICENSE*")
_MODEL = ("*.safetensors", *_SETTINGS)
_TABLES = ("*.parquet",)
_COMMIT = re.compile("[0-9a-f]{40}")
# A trailing slash, which shell completion adds, is not part of the id.
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]*[\w.-]))?/?")


# Status codes of a hub that is overloaded or under maintenance.
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class HubError(ValueError):
    """A hub id's files are not available; the message is one line."""


class HubAway(HubError):
    """The files may be available later: the hub is out of reach, overloaded, or the disk is full."""


def model_directory(path: str | Path, *, weights: bool = True) -> Path:
    """The directory that a ``model.path`` refers to; does not check that it holds a model.

    Args:
      path: "toy" for the model inside the package; a directory; or, if there is no such directory, a hub id
        ``organisation/name`` or ``organisation/name@revision``. Its files are downloaded once into the hub's cache on
        this host (``HF_HOME``); with ``HF_HUB_OFFLINE=1`` only the cache is used.
      weights: whether the weights are needed too; without them a download takes seconds.

    Raises:
      HubError: the cache has no such model, and the hub has none either or must not be asked.
      HubAway: the cache has no such model, and the hub cannot be reached now.
    """
    match = as_hub_id(path)
    if match:
        settings = _download(match["repo"], match["revision"], "model", _SETTINGS)
        # Weights from the same commit as the settings, even if another has been pushed since.
        commit = settings.name if _COMMIT.fullmatch(settings.name) else None
        return _download(match["repo"], match["revision"], "model", _MODEL, commit) if weights else settings
    return TOY if str(path) == "toy" else Path(path).expanduser()


def data_directory(source: str | Path) -> Path:
    """The directory that the source of a data set refers to; does not check that it exists.

    Args:
      source: a directory or, if there is no such directory, a hub id whose parquet files are downloaded once.

    Raises:
      HubError, HubAway: as in ``model_directory``.
    """
    match = as_hub_id(source)
    return _download(match["repo"], match["revision"], "dataset", _TABLES) if match else Path(source).expanduser()


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a Hugging Face checkpoint: "toy", a directory with config.json, or a hub id."""
    return as_hub_id(path) is not None or (model_directory(path) / "config.json").is_file()


def repository(path: str) -> str:
    """A hub id without its revision; a local path unchanged."""
    match = as_hub_id(path)
    return match["repo"] if match else path


def as_hub_id(path: str | Path) -> re.Match[str] | None:
    """``repo`` and ``revision`` (may be None) of a path that looks like a hub id and does not exist locally."""
    match = _HUB_ID.fullmatch(str(path))
    return None if match is None or Path(path).exists() else match


@functools.cache  # A run reads a model several times: ask the hub once and keep the revision.
def _download(repo: str, revision: str | None, kind: str, wanted: tuple[str, ...], commit: str | None = None) -> Path:
    try:
        at = commit or revision
        return Path(snapshot_download(repo, repo_type=kind, revision=at, allow_patterns=list(wanted)))
    except (OSError, ValueError, HTTPError) as error:
        asked = repo if revision is None else f"{repo}@{revision}"
        aside = ", 'toy'," if kind == "model" else ""
        failure = HubAway if _may_pass(error) else HubError
        raise failure(
            f"{asked}: no such directory, and the Hugging Face hub gave no such {kind} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); expected a directory{aside} or a hub id "
            "that is in the cache or can be reached"
        ) from None


def _may_pass(error: Exception) -> bool:
    """Whether the error may be temporary, as opposed to a refusal by the hub."""
    # The library reports an unreachable hub as "not in the cache either".
    if isinstance(error, EntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled | RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", None) in _BUSY
    return isinstance(error, OSError | HTTPError)
