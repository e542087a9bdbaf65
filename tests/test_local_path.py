"""What is taken for a path on this machine's disk, and what for a URL."""

from pathlib import Path

import pytest

from segzero_jax.config import ConfigError
from segzero_jax.local_path import is_url, local_path


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "gs:/bucket/run", Path("gs://bucket/run"), "s3://b", "file:///run"]
)
def test_a_url_is_none_also_when_pathlib_has_had_it(path: str | Path) -> None:
    assert is_url(path)
    with pytest.raises(ConfigError) as error:
        local_path(path, "--out", "copy it")
    assert str(error.value) == f"--out={path}: expected a folder on this machine's disk, got a URL; copy it"


@pytest.mark.parametrize("path", ["runs/toy", "/runs/a:b/c", "./gs:/bucket", "C:/runs", "a:b", "~/runs", ""])
def test_a_path_is_one(path: str) -> None:
    assert local_path(path, "--out", "copy it") == Path(path).expanduser()
