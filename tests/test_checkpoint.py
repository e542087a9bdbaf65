"""What is saved is what is restored: bits, position, and on whatever mesh."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIMS, hf_config, random_policy

from segzero_jax import config as configs
from segzero_jax.checkpoint import Checkpoints, load_policy
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState, initial_state, make_optimizer
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.model import save_hf
from segzero_jax.model.weights import CheckpointError

DATA = {"next_index": 48}
IDENTITY = Identity("0123456789abcdef", "ab" * 32)


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
def test_bits_and_position_come_back_on_another_mesh(config: Config, mesh: str) -> None:
    saved = save(config, (3,))
    with jax.set_mesh(make_mesh(mesh)), Checkpoints(folder(config)) as checkpoints:
        like = make_state(config, seed=0)
        restored = checkpoints.restore(3, like, config, IDENTITY)
        assert (restored.step, restored.data) == (3, DATA)
        for got, want in zip(leaves(restored.state), leaves(saved), strict=True):
            np.testing.assert_array_equal(got, want)
        placed = [leaf.sharding for leaf in jax.tree.leaves(restored.state.policy)]
        assert placed == [leaf.sharding for leaf in jax.tree.leaves(like.policy)]


def test_old_checkpoints_go_and_the_newest_is_taken(config: Config) -> None:
    saved = save(config, (1, 2, 3))
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder(config), read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 3]
        policy, dims, found = load_policy(config.run.dir, np.float32)
    assert dims == DIMS
    assert found == config
    for got, want in zip(leaves(policy), leaves(saved.policy), strict=True):
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
        for got, want in zip(leaves(restored.state.policy), leaves(random_policy(seed=1)), strict=True):
            np.testing.assert_array_equal(got, want)


def test_the_checkpoint_of_another_model_is_refused(config: Config) -> None:
    save(config, (1,))
    other = hf_config(intermediate_size=256)
    (Path(config.model.path) / "config.json").write_text(json.dumps(other))
    with jax.set_mesh(make_mesh("1x1")), pytest.raises(CheckpointError) as error:
        load_policy(config.run.dir, np.float32)
    assert "blocks/down_fd/value has shape (2, 128, 64), model.path means (2, 256, 64)" in str(error.value)


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
