"""Paths that must be on this machine's disk: ``Path`` would silently turn a bucket into a local folder ``gs:``."""

import re
from pathlib import Path

from segzero_jax.config import ConfigError

# Path reduces two slashes to one. A single letter would be a drive.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")


def is_url(path: object) -> bool:
    """Whether a path is a URL, such as ``gs://bucket/path``."""
    return _URL.match(str(path)) is not None


def local_path(path: str | Path, key: str, instead: str) -> Path:
    """A path on this machine's disk; ``~`` is the home folder.

    Args:
      key: the option or key that the path was given by.
      instead: what to do if a bucket is meant.

    Raises:
      ConfigError: it is a URL.
    """
    if is_url(path):
        raise ConfigError(f"{key}={path}: expected a folder on this machine's disk, got a URL; {instead}")
    return Path(path).expanduser()


def check_folder(path: Path, option: str) -> None:
    """Raises ConfigError if the folder, or one that it would be in, is a file.

    A long command should not find that out at its end.

    Args:
      option: as it was given, ``--out=there``.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"{nearest} is a file"
        raise ConfigError(f"{option}: {what}, expected a folder")


def home_path(text: str) -> Path:
    """A path for argparse; ``~`` is the home folder: in ``--image=~/a.jpg`` the shell does not expand it."""
    return Path(text).expanduser()
