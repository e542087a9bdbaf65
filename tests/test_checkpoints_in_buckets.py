"""Checkpoints in a bucket: committed by a file, not by a name, and reached by libraries with errors of their own."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.path import gcs_utils

from segzero_jax import asking, checkpoint, checkpoint_paths, manifest
from segzero_jax import config as configs
from segzero_jax.checkpoint import CheckpointError, Checkpoints, SaveError, StorageError
from segzero_jax.checkpoint_paths import complete_steps, locate, parsing
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.run_dir import Beginning, look

COMMITTED = "commit_success.txt"
IDENTITY = Identity("reference", None)


class HttpError(Exception):
    """As ``gcsfs.retry.HttpError``, google.auth's and aiohttp's: neither OSError nor ValueError."""


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Orbax and we take for one of a bucket, in an Orbax that does what it does there."""
    monkeypatch.setattr(gcs_utils, "is_gcs_path", lambda path: True)
    for module in (checkpoint, checkpoint_paths):
        monkeypatch.setattr(module, "is_url", lambda path: True)
    with jax.set_mesh(make_mesh("1x1")):
        yield tmp_path / "bucket"


@pytest.fixture
def config(tmp_path: Path, bucket: Path) -> Config:
    return configs.replace(Config(), **{"run.dir": str(tmp_path / "run"), "run.checkpoint_dir": str(bucket)})


def state(step: int) -> TrainState:
    return TrainState({"w": jnp.full(3, float(step))}, {}, jnp.int32(step))  # type: ignore[arg-type]


def save(checkpoints: Checkpoints, step: int, config: Config) -> None:
    checkpoints.save(step, state(step), {"next_index": step}, config, IDENTITY)
    checkpoints.wait()


def killed_before_the_commit(config: Config, step: int) -> None:
    """What stands there when a run is killed behind its manifest: all of the checkpoint, but for the last file."""
    with Checkpoints(config.run.checkpoint_dir) as checkpoints:
        save(checkpoints, step, config)
    folder = Path(config.run.checkpoint_dir) / str(step)
    assert (folder / manifest.ITEM / "manifest.json").is_file()
    (folder / COMMITTED).unlink()


def test_a_first_checkpoint_that_was_not_committed_is_none(config: Config, bucket: Path) -> None:
    killed_before_the_commit(config, 2)
    assert complete_steps(epath.Path(bucket)) == []
    assert locate(bucket) is locate(bucket / "2") is None
    assert look(config, resume=False) == (Beginning(None, False), [])
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)
        assert checkpoints.newest() == (1, [])
        assert not (bucket / "2").exists(), "what a killed run left goes"
    assert (bucket / "1" / COMMITTED).is_file()
    assert look(config, resume=True)[0] == Beginning(1, False)
    assert locate(bucket) == (epath.Path(bucket), None)


@pytest.mark.parametrize("up", [False, True])
def test_a_checkpoint_may_be_copied_from_a_bucket_to_a_disk_and_back(
    config: Config, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, up: bool
) -> None:
    """On one side contents have checksums, on the other lengths alone are known."""
    of_a_bucket = lambda path: "" if str(path).startswith(str(bucket)) else digest(path)  # noqa: E731
    digest = manifest._digest
    monkeypatch.setattr(manifest, "_digest", of_a_bucket)
    places = (tmp_path / "disk", bucket) if up else (bucket, tmp_path / "disk")
    with Checkpoints(places[0]) as checkpoints:
        save(checkpoints, 2, config)
    shutil.copytree(*places)
    with Checkpoints(places[1], read_only=True) as checkpoints:
        assert checkpoints.newest() == (2, [])
        (file,) = (places[1] / "2" / "policy").glob("manifest.ocdbt")
        file.write_bytes(file.read_bytes()[:-1])
        assert "policy/manifest.ocdbt: " in checkpoints.damage(2)


def test_a_later_one_that_was_not_committed_is_passed_over(config: Config, bucket: Path) -> None:
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)
    killed_before_the_commit(config, 2)
    assert look(config, resume=True) == (Beginning(1, False), [])
    with Checkpoints(bucket) as checkpoints:
        restored = checkpoints.restore(1, state(0), config, IDENTITY)
        np.testing.assert_array_equal(restored.state.params["w"], np.ones(3))  # type: ignore[index]


def test_whoever_asks_a_run_is_given_what_was_committed(
    config: Config, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(config.run.dir)
    run.mkdir()
    (run / "config.yaml").write_text(configs.to_yaml(config))
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)
    killed_before_the_commit(config, 2)
    assert asking.find_checkpoint(str(run)) == f"{bucket}/1"
    named = tmp_path / "checkpoints"
    bucket.rename(named)
    assert asking.find_checkpoints([str(named)]) == [f"{named}/1"]
    monkeypatch.setattr(asking, "complete_steps", {epath.Path("gs://bucket/run/checkpoints"): [1, 3]}.__getitem__)
    assert asking.find_checkpoints(["gs://bucket/run/checkpoints"]) == [
        "gs://bucket/run/checkpoints/1",
        "gs://bucket/run/checkpoints/3",
    ]


@pytest.mark.parametrize("place", ["finalize", "save"])
def test_a_save_that_the_bucket_refuses_costs_that_save_alone(
    place: str, config: Config, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)

        def refused(*_: Any, **__: Any) -> None:
            raise HttpError("Internal error, 503")

        with monkeypatch.context() as patch:
            patch.setattr(manifest.ManifestHandler, place, refused)
            with pytest.raises(SaveError, match="bucket: HttpError: Internal error, 503"):
                save(checkpoints, 2, config)
        assert [path.name for path in bucket.iterdir()] == ["1"], "nothing half-written stays"
        save(checkpoints, 2, config)
        assert checkpoints.newest() == (2, [])


def test_a_bucket_that_stays_away_fails_the_save_that_could_not_be_cleared_away_either(
    config: Config, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)

        def away(*_: Any, **__: Any) -> None:
            raise HttpError("Cannot connect to host")

        with monkeypatch.context() as patch:
            patch.setattr(manifest.ManifestHandler, "finalize", away)
            patch.setattr(type(epath.Path(bucket)), "iterdir", away)
            with pytest.raises(SaveError, match="bucket: HttpError: Cannot connect to host"):
                save(checkpoints, 2, config)
        save(checkpoints, 3, config)
        assert checkpoints.newest() == (3, [])


@pytest.mark.parametrize("place", ["is_dir", "open", "read_text"])
def test_a_bucket_that_cannot_be_read_now_has_no_damage(
    place: str, config: Config, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a start from nothing nor a step back: the run ends, and its checkpoints stay."""
    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)

    def away(*_: Any, **__: Any) -> None:
        raise HttpError("Cannot connect to host")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path(bucket)), place, away)
        with pytest.raises(StorageError, match=r"cannot be read now \(HttpError: Cannot connect.*nothing was changed"):
            look(config, resume=False)
    assert look(config, resume=True) == (Beginning(1, False), [])


def test_a_lost_connection_is_no_content_that_cannot_be_parsed(
    config: Config, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorStore raises ValueError for both; on a disk there is no connection."""

    def away(*_: Any, **__: Any) -> None:
        raise ValueError("UNAVAILABLE: could not resolve host")

    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)
        monkeypatch.setattr(checkpoints._manager, "restore", away)
        with pytest.raises(StorageError, match="UNAVAILABLE: could not resolve host"):
            checkpoints.restore(1, state(0), config, IDENTITY)
    with pytest.raises(StorageError), parsing(epath.Path(bucket)):
        away()
    monkeypatch.setattr(checkpoint_paths, "is_url", lambda path: False)
    with (
        pytest.raises(CheckpointError, match="bucket: cannot be read: UNAVAILABLE") as error,
        parsing(epath.Path(bucket)),
    ):
        away()
    assert not isinstance(error.value, StorageError)


def test_an_error_of_the_devices_is_none_of_the_bucket(
    config: Config, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with Checkpoints(bucket) as checkpoints:
        save(checkpoints, 1, config)
        monkeypatch.setattr(checkpoints._manager, "restore", broken)
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoints.restore(1, state(0), config, IDENTITY)
