"""Paths that have to be on this machine's disk: ``Path`` would quietly make a folder ``gs:`` here of a bucket."""

import re
from pathlib import Path

from segzero_jax.config import ConfigError

# One slash is what Path leaves of two. A single letter would be a drive.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")


def is_url(path: object) -> bool:
    """Whether it names a place as a URL does, ``gs://bucket/path``."""
    return _URL.match(str(path)) is not None


def local_path(path: str | Path, key: str, instead: str) -> Path:
    """A path on this machine's disk, ``~`` being the home folder.

    Args:
      key: the option or key that the path was given by.
      instead: what to do where a bucket is meant.

    Raises:
      ConfigError: it is a URL.
    """
    if is_url(path):
        raise ConfigError(f"{key}={path}: expected a folder on this machine's disk, got a URL; {instead}")
    return Path(path).expanduser()


def check_folder(path: Path, option: str) -> None:
    """Raises ConfigError where a file is in the place of the folder, or of one that it would be in.

    What takes long should not find that out in the end.

    Args:
      option: as it was given, ``--out=there``.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"{nearest} is a file"
        raise ConfigError(f"{option}: {what}, expected a folder")


def home_path(text: str) -> Path:
    """A path for argparse, ``~`` being the home folder: in ``--image=~/a.jpg`` no shell sees it."""
    return Path(text).expanduser()
