"""What is saved is what is restored: bits, position, and on whatever mesh."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from full_disk import no_file_above
from tiny import DIMS, hf_config, random_policy

from segzero_jax import config as configs
from segzero_jax.checkpoint import (
    Checkpoints,
    SaveError,
    StorageError,
    _why_not_saved,
    run_difference,
)
from segzero_jax.checkpoint_paths import checkpoint_directory, locate, refuse_unfinished, storage_path
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState, initial_state, make_optimizer
from segzero_jax.identity import Identity, fingerprint
from segzero_jax.mesh import make_mesh
from segzero_jax.model import save_hf
from segzero_jax.model.weights import CheckpointError
from segzero_jax.run_dir import look, open_run
from segzero_jax.saved_policy import load_policy

DATA = {"next_index": 48}
ITEMS = ("policy", "optimizer", "run", "manifest")
IDENTITY = Identity("0123456789abcdef", "ab" * 32, sam2_dtype="bfloat16")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf_config()))
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(random_policy(seed=5), DIMS, model, dtype=np.float32)
    return configs.replace(Config(), **{"model.path": str(model), "run.dir": str(tmp_path / "run")})


def make_state(config: Config, seed: int) -> TrainState:
    return initial_state(random_policy(seed=seed), make_optimizer(config.train, freeze_vision=False))


def folder(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints"


def leaves(tree: object) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def save(config: Config, steps: tuple[int, ...], keep: int = 2) -> TrainState:
    with jax.set_mesh(make_mesh("4x4")), Checkpoints(folder(config), keep) as checkpoints:
        for step in steps:
            state = make_state(config, seed=step)
            checkpoints.save(step, state, DATA, config, IDENTITY)
        checkpoints.wait()
    return state


@pytest.mark.parametrize("mesh", ["1x1", "2x2", "4x4"])
def test_bits_and_position_come_back_on_another_mesh_and_from_there(config: Config, mesh: str) -> None:
    saved = save(config, (3,))
    with jax.set_mesh(make_mesh(mesh)), Checkpoints(folder(config)) as checkpoints:
        like = make_state(config, seed=0)
        restored = checkpoints.restore(3, like, config, IDENTITY)
        assert (restored.step, restored.data) == (3, DATA)
        for got, want in zip(leaves(restored.state), leaves(saved), strict=True):
            np.testing.assert_array_equal(got, want)
        placed = [leaf.sharding for leaf in jax.tree.leaves(restored.state.params)]
        assert placed == [leaf.sharding for leaf in jax.tree.leaves(like.params)]
        checkpoints.save(4, restored.state, DATA, config, IDENTITY)
        checkpoints.wait()
    with jax.set_mesh(make_mesh("4x4")), Checkpoints(folder(config)) as checkpoints:
        back = checkpoints.restore(4, make_state(config, seed=0), config, IDENTITY)
        for got, want in zip(leaves(back.state), leaves(saved), strict=True):
            np.testing.assert_array_equal(got, want)


def test_old_checkpoints_go_and_the_newest_is_taken(config: Config) -> None:
    saved = save(config, (1, 2, 3))
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config), read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 3]
        policy, dims, found = load_policy(config.run.dir, np.float32)
    assert dims == DIMS
    assert found == config
    for got, want in zip(leaves(policy), leaves(saved.params), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_step_can_be_named(config: Config) -> None:
    save(config, (1, 2))
    with jax.set_mesh(make_mesh("1x1")):
        policy, _, _ = load_policy(Path(config.run.dir) / "checkpoints" / "1", np.float32)
        for got, want in zip(leaves(policy), leaves(random_policy(seed=1)), strict=True):
            np.testing.assert_array_equal(got, want)
        with pytest.raises(CheckpointError, match="no complete checkpoint there"):
            load_policy(Path(config.run.dir) / "checkpoints" / "7", np.float32)


def test_another_configuration_is_refused_by_its_keys(config: Config) -> None:
    save(config, (1,))
    other = configs.replace(config, **{"train.lr": 1.0, "grpo.kl_coef": 0.5, "train.steps": 999})
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        with pytest.raises(CheckpointError, match=r"\(grpo\.kl_coef, train\.lr differ\)"):
            checkpoints.restore(1, make_state(config, seed=0), other, IDENTITY)
        longer = configs.replace(config, **{"train.steps": 999})
        assert checkpoints.restore(1, make_state(config, seed=0), longer, IDENTITY).step == 1


def test_a_run_may_go_on_for_longer_and_elsewhere_and_all_else_makes_it_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = set(configs.all_keys())
    monkeypatch.setattr(configs, "differing_keys", lambda *_: sorted(every))
    another_run = set(run_difference(Config(), Config()).removesuffix(" differ").split(", "))
    assert another_run < every
    assert every - another_run == {
        *("mesh", "run.dir", "run.checkpoint_dir", "model.path", "model.remat", "data.dir", "data.workers"),
        *("reward.server", "reward.local_model", "reward.timeout_s", "reward.missing", "reward.checkpoint_after_s"),
        *("reward.patience_s", "reward.ca_file", "reward.cert_file", "reward.key_file", "reward.token_file"),
        *("reward.tls_name", "train.steps", "train.micro_batch_size", "train.checkpoint_every"),
        *("train.keep_checkpoints", "train.keep_best", "eval.every", "eval.examples", "eval.samples"),
        *("watch.max_skipped", "watch.alarm_after", "watch.entropy_floor", "watch.kill_after_s"),
    }


def test_nothing_to_resume_from_is_said(config: Config, tmp_path: Path) -> None:
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(tmp_path / "empty") as checkpoints:
        with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
            checkpoints.newest()
        with pytest.raises(CheckpointError, match="expected a run directory"):
            load_policy(tmp_path / "nowhere", np.float32)


def test_what_a_killed_run_left_half_written_goes(config: Config) -> None:
    save(config, (1,))
    directory = Path(config.run.dir) / "checkpoints"
    half = directory / "2.orbax-checkpoint-tmp"
    shutil.copytree(directory / "1", half)
    (half / "commit_success.txt").unlink(missing_ok=True)
    with jax.set_mesh(make_mesh("1x1")):
        load_policy(config.run.dir, np.float32)
        assert half.exists(), "a look changes nothing"
        with Checkpoints(folder(config)) as checkpoints:
            assert checkpoints.steps == [1]
            assert checkpoints.restore(1, make_state(config, seed=0), config, IDENTITY).step == 1
    assert not half.exists()


def test_the_state_may_be_donated_as_soon_as_it_is_being_saved(config: Config) -> None:
    with jax.set_mesh(make_mesh("4x4")), Checkpoints(folder(config)) as checkpoints:
        state = make_state(config, seed=1)
        checkpoints.save(1, state, DATA, config, IDENTITY)
        jax.tree.map(lambda x: x.delete(), state)
        checkpoints.wait()
        restored = checkpoints.restore(1, make_state(config, seed=0), config, IDENTITY)
        for got, want in zip(leaves(restored.state.params), leaves(random_policy(seed=1)), strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_checkpoint_of_another_model_is_refused(config: Config) -> None:
    save(config, (1,))
    other = hf_config(intermediate_size=256)
    (Path(config.model.path) / "config.json").write_text(json.dumps(other))
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError) as error:
        load_policy(config.run.dir, np.float32)
    assert "blocks/down_fd/value has shape (2, 128, 64), model.path has (2, 256, 64)" in str(error.value)


def test_a_directory_without_a_complete_checkpoint_says_so(config: Config) -> None:
    (Path(config.run.dir) / "checkpoints").mkdir(parents=True)
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError, match="no complete checkpoint there"):
        load_policy(config.run.dir, np.float32)


def test_weights_are_cast_for_inference(config: Config) -> None:
    save(config, (1,))
    with jax.set_mesh(make_mesh("1x1")):
        for path in (config.run.dir, config.model.path):
            policy, _, _ = load_policy(path, jnp.bfloat16)
            assert {leaf.dtype for leaf in jax.tree.leaves(policy)} == {jnp.dtype("bfloat16")}


def files(checkpoint: Path) -> list[Path]:
    """All that a restored run depends on, the manifest included; not the marks that Orbax leaves of its commits."""
    described = [path for item in ITEMS[:-1] for path in (checkpoint / item).rglob("*") if path.is_file()]
    return [*sorted(described), checkpoint / "manifest" / "manifest.json"]


@pytest.mark.parametrize("harm", ["bit flipped", "cut short", "gone"])
def test_any_damage_to_any_file_is_found_and_the_step_before_is_taken(config: Config, harm: str) -> None:
    save(config, (1, 2))
    assert {path.relative_to(folder(config) / "2").parts[0] for path in files(folder(config) / "2")} == set(ITEMS)
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        for step in (1, 2):
            assert checkpoints.damage(step) == ""
        for number, path in enumerate(files(folder(config) / "2")):
            content = path.read_bytes()
            if harm == "bit flipped":
                place = number * 7919 % max(len(content), 1)
                changed = content[:place] + bytes([content[place] ^ 1 << number % 8]) + content[place + 1 :]
                path.write_bytes(changed if content else b"more")
            elif harm == "cut short":
                path.write_bytes(content[: len(content) // 2] if content else b"more")
            else:
                path.unlink()
            step, damaged = checkpoints.newest()
            assert step == 1, path
            (line,) = damaged
            name = path.relative_to(folder(config) / "2")
            assert line.startswith(f"checkpoint {folder(config)}/2 is damaged ({name}: ") or name.parts[0] == "manifest"
            path.write_bytes(content)
        assert checkpoints.newest() == (2, [])


def test_a_run_goes_on_from_the_step_before_a_damaged_one_and_saves_it_anew(config: Config) -> None:
    save(config, (1, 2))
    with jax.set_mesh(make_mesh("1x1")):
        arrays = [path for path in files(folder(config) / "2") if "policy" in path.parts]
        os.truncate(max(arrays, key=os.path.getsize), 100)
        with pytest.raises(CheckpointError, match=r"checkpoints/2: is damaged \(policy/.* 100 bytes, expected .* 1$"):
            load_policy(config.run.dir, np.float32)
        with Checkpoints(folder(config)) as checkpoints:
            step, _ = checkpoints.newest()
            state = checkpoints.restore(step, make_state(config, seed=0), config, IDENTITY).state
            assert checkpoints.steps == [1]
            for got, want in zip(leaves(state), leaves(make_state(config, seed=1)), strict=True):
                np.testing.assert_array_equal(got, want)
            checkpoints.save(2, state, DATA, config, IDENTITY)
            checkpoints.wait()
            assert checkpoints.newest() == (2, [])


def test_a_host_that_could_not_write_its_part_costs_that_save_alone(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Orbax's barrier raises on all hosts then; anything else of the devices is no matter of saving."""
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        state = make_state(config, seed=1)
        late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: set_value_start::3")
        broken = jax.errors.JaxRuntimeError("INTERNAL: the device is gone")
        for error, expected in ((late, SaveError), (broken, jax.errors.JaxRuntimeError)):

            def wait(error: Exception = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(checkpoints._manager, "wait_until_finished", wait)
                with pytest.raises(expected, match=r"not all hosts have written|the device is gone"):
                    checkpoints.save(1, state, DATA, config, IDENTITY)
        checkpoints.save(1, state, DATA, config, IDENTITY)
        checkpoints.wait()
        assert checkpoints.newest() == (1, [])


def test_what_a_host_itself_could_not_write_is_said_though_it_waited_for_the_others() -> None:
    """Orbax's barrier follows in a ``finally``, and its end is what is raised."""
    late = jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: set_value_start::3")
    late.__context__ = ValueError("OUT_OF_RANGE: no space left on device [tensorstore_spec='...']")
    assert _why_not_saved(late) == "OUT_OF_RANGE: no space left on device"


def test_a_part_of_a_checkpoint_is_not_taken_for_one_that_is_saved(config: Config) -> None:
    """Orbax counts it by its number, and would save nothing up to there."""
    (folder(config) / "150" / "policy").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="150: is an incomplete checkpoint; delete it, or copy it completely"):
        look(config, resume=False)
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        with pytest.raises(SaveError, match="holds 150, an incomplete checkpoint; delete it"):
            checkpoints.save(50, make_state(config, seed=1), DATA, config, IDENTITY)
        shutil.rmtree(folder(config) / "150")
    save(config, (50,))
    assert look(config, resume=False)[0].step == 50


def test_folders_of_no_step_are_no_part_of_a_checkpoint(config: Config) -> None:
    """Not even what a save left that was killed, which Orbax removes."""
    for name in ("best", "150.orbax-checkpoint-tmp"):
        (folder(config) / name / "policy").mkdir(parents=True)
    refuse_unfinished(epath.Path(folder(config)))


@pytest.mark.parametrize("name", ["manifest/manifest.json", "policy/manifest.ocdbt"])
def test_files_that_cannot_be_read_for_now_are_no_damage(
    config: Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The step before would be taken instead, and this one deleted."""
    save(config, (1, 2))
    path, error = folder(config) / "2" / name, OSError(errno.EACCES, "Permission denied")
    assert path.is_file()
    kind = type(epath.Path(path))
    opens = kind.open

    def refused(self: epath.Path, *args: Any, **options: Any) -> Any:
        if str(self) == str(path):
            raise error
        return opens(self, *args, **options)

    monkeypatch.setattr(kind, "open", refused)
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        with pytest.raises(StorageError, match=r"checkpoints/2: cannot be read now \(.*Permission denied.*nothing was"):
            checkpoints.newest()
        error = OSError(errno.EIO, "Input/output error")  # a disk that has lost it
        step, (line,) = checkpoints.newest()
    assert step == 1
    assert f"2 is damaged ({name}: Input/output error)" in line


def test_when_all_are_damaged_each_is_named(config: Config) -> None:
    save(config, (1, 2))
    for step in ("1", "2"):
        (folder(config) / step / "manifest" / "manifest.json").write_text("{}")
    with (
        jax.set_mesh(make_mesh("1x1")),
        Checkpoints(folder(config)) as checkpoints,
        pytest.raises(CheckpointError) as error,
    ):
        checkpoints.newest()
    for step in ("1", "2"):
        assert f"checkpoints/{step} is damaged (manifest/manifest.json: its content has changed)" in str(error.value)


def test_another_reference_or_sam_2_is_refused(config: Config) -> None:
    save(config, (1,))
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        like = make_state(config, seed=0)
        for identity, expected in (
            (
                IDENTITY._replace(reference="feedface00000000"),
                "has fingerprint 0123456789abcdef, model.path=.* has feed",
            ),
            (
                IDENTITY._replace(sam2="cd" * 32),
                "came from SAM 2 checkpoint abababababab in bfloat16, .* SAM 2 checkpoint cdcdcd",
            ),
            (
                IDENTITY._replace(sam2=None),
                r"came from SAM 2 checkpoint abababababab in bfloat16, reward\.server=local means no SAM 2",
            ),
            # A server that is back without its GPU.
            (
                IDENTITY._replace(sam2_dtype="float32"),
                "abababababab in bfloat16, .* means SAM 2 checkpoint abababababab in float32; resume with the same",
            ),
        ):
            with pytest.raises(CheckpointError, match=expected):
                checkpoints.restore(1, like, config, identity)


def test_other_data_are_refused_by_the_split_and_older_checkpoints_go_on_with_any(config: Config) -> None:
    data = {"mugs/train": "ab" * 32, "mugs/val": "cd" * 32}
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        state = make_state(config, seed=0)
        for step, identity in ((1, IDENTITY), (2, IDENTITY._replace(data=data))):
            checkpoints.save(step, state, DATA, config, identity)
        checkpoints.wait()
        run = json.loads((folder(config) / "1/run/metadata").read_text())
        del run["identity"]["data"], run["identity"]["sam2_dtype"]
        (folder(config) / "1/run/metadata").write_text(json.dumps(run))
        assert checkpoints.restore(2, state, config, IDENTITY._replace(data=dict(reversed(data.items())))).step == 2
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(2, state, config, IDENTITY._replace(data=data | {"mugs/val": "ef" * 32}))
        assert str(error.value) == (
            f"{folder(config)}/2: its mugs/val has checksum cdcdcdcdcdcd, that in data.dir={config.data.dir} has "
            "efefefefefef; resume with the data that the run began with, built from the same source in the same way, "
            "or choose another run.dir"
        )
        assert checkpoints.restore(1, state, config, IDENTITY._replace(data=data)).step == 1


def test_the_best_is_kept_beside_the_newest(config: Config) -> None:
    scores = {1: 0.1, 2: 0.7, 3: 0.2, 5: 0.7, 6: 0.3}
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config), 2, scores.get) as checkpoints:
        state = make_state(config, seed=0)
        kept = []
        for step in range(1, 8):
            checkpoints.save(step, state, DATA, config, IDENTITY)
            checkpoints.wait()
            kept.append(sorted(int(path.name) for path in folder(config).iterdir() if path.name.isdigit()))
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5], [5, 6], [5, 6, 7]]


def test_a_disk_that_fills_up_is_one_line_and_the_next_save_succeeds(config: Config) -> None:
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        state = make_state(config, seed=1)
        checkpoints.save(1, state, DATA, config, IDENTITY)
        checkpoints.wait()
        with no_file_above(20_000):
            checkpoints.save(2, state, DATA, config, IDENTITY)
            with pytest.raises(SaveError) as error:
                checkpoints.wait()
        assert "File too large" in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 500
        assert checkpoints.steps == [1]
        assert [path.name for path in folder(config).iterdir()] == ["1"]
        checkpoints.save(2, state, DATA, config, IDENTITY)
        checkpoints.wait()
        assert checkpoints.newest() == (2, [])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("item", ["", "policy"])
def test_a_folder_that_cannot_be_made_is_reported_at_once_with_the_reason(
    config: Config, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    """Orbax, left alone, would wait ten minutes for it."""
    make = os.mkdir

    def full(path: str, *how: Any, **more: Any) -> None:
        if ".orbax-checkpoint-tmp" in str(path) and item in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        make(path, *how, **more)

    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config)) as checkpoints:
        state = make_state(config, seed=1)
        checkpoints.save(1, state, DATA, config, IDENTITY)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", full)
            with pytest.raises(SaveError, match="No space left on device"):
                checkpoints.save(2, state, DATA, config, IDENTITY)
        assert checkpoints.steps == [1]
        assert [path.name for path in folder(config).iterdir()] == ["1"]
        checkpoints.save(2, state, DATA, config, IDENTITY)
        checkpoints.wait()
        assert checkpoints.newest() == (2, [])


def test_what_may_be_the_best_is_kept_while_nobody_can_tell(config: Config) -> None:
    """The scores are in run.dir, which may be lost where checkpoints are elsewhere."""

    def score(step: int) -> float:
        if gone:
            raise FileNotFoundError("run/evaluations.jsonl")
        return float(-step)

    gone: list[str] = []
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config), 1, score) as checkpoints:
        for step in (1, 2, 3):
            if step == 3:
                gone.append("run.dir")
            checkpoints.save(step, make_state(config, seed=1), DATA, config, IDENTITY)
            checkpoints.wait()
        assert checkpoints.steps == [1, 2, 3]


@pytest.mark.parametrize("form", ["run directory elsewhere", "directory", "its step"])
def test_checkpoints_are_found_where_they_lie(config: Config, tmp_path: Path, form: str) -> None:
    elsewhere = tmp_path / "bucket" / "mine"
    config = configs.replace(config, **{"run.checkpoint_dir": str(elsewhere)})
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(checkpoint_directory(config)) as checkpoints:
        checkpoints.save(4, make_state(config, seed=3), DATA, config, IDENTITY)
        checkpoints.wait()
        open_run(config)
        path = {"run directory elsewhere": Path(config.run.dir), "directory": elsewhere, "its step": elsewhere / "4"}
        policy, _, found = load_policy(path[form], np.float32)
        assert found == config
        for got, want in zip(leaves(policy), leaves(random_policy(seed=3)), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_run_directory_of_no_checkpoints_does_not_hide_those_elsewhere(config: Config, tmp_path: Path) -> None:
    """A start that was cut off early leaves the folder; the run went on with another place."""
    folder(config).mkdir(parents=True)
    assert locate(config.run.dir) == (epath.Path(folder(config)), None)
    config = configs.replace(config, **{"run.checkpoint_dir": str(tmp_path / "elsewhere")})
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(checkpoint_directory(config)) as checkpoints:
        checkpoints.save(4, make_state(config, seed=3), DATA, config, IDENTITY)
    open_run(config)
    assert locate(config.run.dir) == (epath.Path(tmp_path / "elsewhere"), None)


def test_a_run_whose_configuration_is_of_another_version_has_its_own_checkpoints(config: Config) -> None:
    save(config, (1,))
    Path(config.run.dir, "config.yaml").write_text("train: {no_longer_known: 1}\n")
    assert locate(config.run.dir) == (epath.Path(folder(config)), None)


def test_a_configuration_of_another_version_is_told_where_there_are_no_checkpoints_either(config: Config) -> None:
    Path(config.run.dir).mkdir()
    Path(config.run.dir, "config.yaml").write_text("train: {no_longer_known: 1}\n")
    with pytest.raises(configs.ConfigError, match="no_longer_known"):
        locate(config.run.dir)


def test_a_step_is_known_by_its_number_and_its_content(config: Config, tmp_path: Path) -> None:
    save(config, (1,))
    step = folder(config) / "1"
    shutil.copytree(step, tmp_path / "7")
    assert locate(tmp_path / "7") == (epath.Path(tmp_path), 7)
    for copy in (tmp_path / "best", folder(config) / "best"):
        shutil.copytree(step, copy)
        assert locate(copy) is None
    (tmp_path / "8").mkdir()
    assert locate(tmp_path / "8") is None


def test_a_copy_without_checkpoints_has_not_those_of_the_run_that_it_is_of(config: Config, tmp_path: Path) -> None:
    save(config, (1,))
    open_run(config)
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(Path(config.run.dir) / "config.yaml", copy)
    assert locate(copy) == (epath.Path(copy / "checkpoints"), None)
    (copy / "checkpoints").rmdir()
    assert locate(copy) is None
    assert locate(config.run.dir) == (epath.Path(folder(config)), None)


def test_a_bucket_is_no_local_path(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(storage_path("gs://bucket/runs/one")) == "gs://bucket/runs/one"
    assert str(storage_path("runs/one")) == str(tmp_path / "runs/one")
    config = configs.replace(config, **{"run.checkpoint_dir": "gs://bucket/runs/one"})
    assert str(checkpoint_directory(config) / "3") == "gs://bucket/runs/one/3"


def test_the_fingerprint_sees_every_bit_and_no_mesh() -> None:
    found = set()
    for mesh in ("1x1", "2x2", "4x4"):
        with jax.set_mesh(make_mesh(mesh)):
            found.add(fingerprint(random_policy(seed=1), jnp.dtype("float32")))
    assert len(found) == 1
    with jax.set_mesh(make_mesh("2x2")):
        policy = random_policy(seed=1)
        narrow = fingerprint(policy, jnp.dtype("bfloat16"))
        assert narrow == fingerprint(jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy), jnp.dtype("bfloat16"))
        found.add(narrow)
        paths, structure = jax.tree.flatten(policy)
        of = lambda leaves: fingerprint(jax.tree.unflatten(structure, leaves), jnp.dtype("float32"))  # noqa: E731
        largest = max(range(len(paths)), key=lambda i: paths[i].size)
        bits = np.asarray(paths[largest]).view(np.uint32)
        for place, bit in ((0, 0), (-1, 31), (bits.size // 3, 7)):
            flipped = bits.copy()
            flipped.flat[place] ^= np.uint32(1 << bit)
            changed = jax.device_put(flipped.view(np.float32), paths[largest].sharding)
            found.add(of([*paths[:largest], changed, *paths[largest + 1 :]]))
        swapped = np.array(paths[largest])
        swapped.flat[0], swapped.flat[1] = swapped.flat[1], swapped.flat[0]
        changed = jax.device_put(swapped, paths[largest].sharding)
        found.add(of([*paths[:largest], changed, *paths[largest + 1 :]]))
        assert len(found) == 6
        zeros = [
            ({"a": (4,)}, "float32"),
            ({"a": (4,)}, "bfloat16"),
            ({"b": (4,)}, "float32"),
            ({"a": (2, 2)}, "float32"),
        ]
        of_zeros = [
            fingerprint({name: jnp.zeros(shape) for name, shape in tree.items()}, jnp.dtype(dtype))
            for tree, dtype in zeros
        ]
        assert len(set(of_zeros)) == 4, "numbers alone do not make weights"
        # By it, a run is known to go on from the weights that it began with, whatever version wrote its checkpoint.
        assert fingerprint({"a": jnp.arange(6.0).reshape(2, 3)}, jnp.dtype("float32")) == "030060879caf8382"
