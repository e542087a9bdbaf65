"""Hosts with a disk each are found out before anything is trained; hosts that share one leave nothing there."""

import os
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest
from etils import epath
from thread_pod import on_hosts

from segzero_jax import config as configs
from segzero_jax.checkpoint_paths import complete_steps
from segzero_jax.config import Config, ConfigError
from segzero_jax.model.weights import StorageError
from segzero_jax.pods import HostLost, Pod
from segzero_jax.run_dir import Beginning, begin
from segzero_jax.shared_storage import check_shared, probe

HOSTS = 4


def started(folder: Path, place: str) -> list[Future[Beginning]]:
    """How a run begins on each host; ``place`` is where its checkpoints go, as that host knows it."""

    def start(pod: Pod) -> Beginning:
        changes = {"run.dir": f"{folder}/run", "run.checkpoint_dir": f"{folder}/{place.format(host=pod.index)}"}
        return begin(configs.replace(Config(), **changes), resume=False, pod=pod)

    return on_hosts(HOSTS, start)


def test_hosts_that_share_a_disk_begin_and_leave_nothing_there(tmp_path: Path) -> None:
    assert [end.result() for end in started(tmp_path, "new/checkpoints")] == [Beginning(None, False)] * HOSTS
    assert list(tmp_path.iterdir()) == []


def test_hosts_with_a_disk_each_all_stop_with_what_to_do(tmp_path: Path) -> None:
    ends = started(tmp_path, "disk{host}/checkpoints")
    for end in ends:
        with pytest.raises(ConfigError) as error:
            end.result()
        assert str(error.value) == (
            f"host 1 (w-1) and 2 more: {tmp_path}/disk1/checkpoints: what host 0 (w-0) writes there is not seen here; "
            "run.checkpoint_dir has to be storage that all hosts share, such as gs://bucket/path"
        )
    assert list(tmp_path.iterdir()) == []


def test_one_host_finds_out_before_it_trains_and_speaks_of_no_host(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in ("file/inside", "file"):
        changes = {"run.dir": f"{tmp_path}/run", "run.checkpoint_dir": f"{tmp_path}/{place}"}
        with pytest.raises(StorageError) as error:
            begin(configs.replace(Config(), **changes), resume=False, pod=Pod())
        assert str(error.value).startswith(f"{tmp_path}/{place}: cannot be written to: ")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("made", [False, True])
def test_one_host_begins_where_it_can_write_and_leaves_nothing_there(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "new/checkpoints"
    if made:
        folder.mkdir(parents=True)
    changes = {"run.dir": f"{tmp_path}/run", "run.checkpoint_dir": str(folder)}
    assert begin(configs.replace(Config(), **changes), resume=False, pod=Pod()) == Beginning(None, False)
    assert [path.name for path in tmp_path.rglob("*")] == (["new", "checkpoints"] if made else [])


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_in_the_run_s_own_is_looked_at_where_it_exists(tmp_path: Path, there: bool) -> None:
    """A link to a disk that is not mounted; without one, the run writes beside it first, with an error of its own."""
    run = tmp_path / "run"
    if there:
        run.mkdir()
        (tmp_path / "file").touch()
        (run / "checkpoints").symlink_to(tmp_path / "file/unmounted")
    config = configs.replace(Config(), **{"run.dir": str(run)})
    with pytest.raises(StorageError, match="checkpoints: cannot be written to: ") if there else nullcontext():
        begin(config, resume=False, pod=Pod())
    assert run.exists() == there


@pytest.mark.parametrize("host", [0, 2])
def test_storage_that_a_host_cannot_write_is_none_of_the_user(tmp_path: Path, host: int) -> None:
    """It may be written later: exit code 7, not 2. What the first one could not write, the others do not miss."""
    (tmp_path / "file").touch()
    places = {host: tmp_path / "file/inside"}
    for end in on_hosts(HOSTS, lambda pod: check_shared(epath.Path(places.get(pod.index, tmp_path)), pod)):
        with pytest.raises(StorageError) as error:
            end.result()
        assert str(error.value).startswith(f"host {host} (w-{host}): {tmp_path}/file/inside: cannot be written to: ")
    assert os.listdir(tmp_path) == ["file"]


def test_storage_that_cannot_be_listed_is_told_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a bucket, listing takes a permission that writing does not."""

    def refuse() -> None:
        raise PermissionError("no permission storage.buckets.get")

    monkeypatch.setattr("segzero_jax.shared_storage.ocp.path.step.standard_name_format", refuse)
    with pytest.raises(StorageError) as error:
        probe(epath.Path(tmp_path), Pod())
    assert str(error.value) == f"{tmp_path}: cannot be listed: PermissionError: no permission storage.buckets.get"
    assert os.listdir(tmp_path) == []


def test_a_file_of_the_probe_is_no_checkpoint_and_goes_with_a_host_that_is_lost(tmp_path: Path) -> None:
    seen: list[str] = []

    class Lonely(Pod):
        def exchange(self, what: str, said: str, deadline_s: float = 0.0) -> list[str]:
            if what == "checkpoint probe written":
                seen.extend(os.listdir(tmp_path))
                assert complete_steps(epath.Path(tmp_path)) == []
                raise HostLost("host 1 did not come")
            return [said, said]

    with pytest.raises(HostLost):
        probe(epath.Path(tmp_path), Lonely())
    assert [name.startswith("probe-") for name in seen] == [True]
    assert os.listdir(tmp_path) == []
