"""Every phase on meshes of up to sixteen devices: the same numbers as on one, in shards as the table says.

Tolerances are contracts, float32: log-probabilities 1e-5 of the largest, gradients 1e-4 of each tensor's largest.
With tensor = 4 the two key-value heads are fewer than the axis and are repeated up to it.
"""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DIMS, load_processor, prompts, random_policy

from segzero_jax import grpo
from segzero_jax.config import GrpoConfig, TrainConfig
from segzero_jax.grpo import (
    LossConfig,
    TrainState,
    UpdateBatch,
    initial_state,
    make_optimizer,
    policy_logps,
    update,
)
from segzero_jax.mesh import FSDP, ROLLOUT, TRAIN, Layout, make_mesh
from segzero_jax.model.dims import RELEASED
from segzero_jax.model.policy import ForwardConfig, Policy, prompt_logits
from segzero_jax.model.weights import abstract_policy
from segzero_jax.rollout import Sampling, prefill_prompts, rollout_layout, sample
from segzero_jax.types import Rollout

LOGPS, GRADIENTS = 1e-5, 1e-4
MESHES = ["4x4", "2x4x2", "16x1", "1x4"]
# Each with the layout of reference and update.
CASES = [*((mesh, TRAIN) for mesh in MESHES), *((mesh, FSDP) for mesh in MESHES if mesh != "16x1")]
FLOAT32 = jnp.dtype("float32")
PROCESSOR = load_processor()
BATCH, GROUP, LENGTH = 16, 2, 8
SAMPLING = Sampling(GROUP, LENGTH, PROCESSOR.end_ids, PROCESSOR.pad_id, PROCESSOR.visual_ids)
LOSS = LossConfig(GrpoConfig(entropy_coef=0.01), 1.0, PROCESSOR.visual_ids, False, max_tokens=8)
OPTIMIZER = make_optimizer(TrainConfig(lr=1e-2, max_grad_norm=0.1), freeze_vision=False)


class Phases(NamedTuple):
    """What one training step makes, on the host, and the state as it lies on the mesh."""

    logits: np.ndarray
    rollout: Rollout
    read_in_rollout: Rollout
    ref_logps: np.ndarray
    metrics: dict[str, float]
    gradients: Any
    policy: Any
    state: TrainState
    weights: Policy


def place(tree: Any) -> Any:
    put = lambda x: jax.device_put(x, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(put, tree)


def run_phases(mesh: str, layout: Layout, tokens: Rollout | None) -> Phases:
    """Logits, sampling, reference and update; the last two on given responses, or on those sampled here."""
    rng = np.random.default_rng(0)
    fwd = ForwardConfig(DIMS, layout, FLOAT32)
    with jax.set_mesh(make_mesh(mesh)):
        batch = place(prompts(BATCH, PROCESSOR))
        policy, reference = random_policy(layout=layout), random_policy(layout=layout, seed=1)
        logits = jax.jit(lambda policy, batch: prompt_logits(policy, batch, fwd))(policy, batch)
        weights = rollout_layout(DIMS, FLOAT32)(policy)
        sampled = partial(
            sample, weights, batch, jax.random.key(0), fwd=ForwardConfig(DIMS, ROLLOUT, FLOAT32), sampling=SAMPLING
        )
        rollout = jax.device_get(sampled(prefilled=prefill_prompts(policy, batch, fwd=fwd)))
        # The same on a mesh whatever the layout for training.
        read_in_rollout = jax.device_get(sampled()) if layout is TRAIN else rollout
        learnt = place(tokens or rollout)
        ref_logps = policy_logps(reference, batch, learnt.tokens_bgr, fwd=fwd, loss_config=LOSS)
        advantages, keep = place(
            (rng.standard_normal((BATCH, GROUP)).astype(np.float32), rng.random((BATCH, GROUP)) < 0.9)
        )
        whole = UpdateBatch(batch, learnt, advantages, keep, ref_logps)
        # A policy of its own: its buffers are donated.
        state = initial_state(random_policy(layout=layout), OPTIMIZER)
        state, metrics = update(state, whole, optimizer=OPTIMIZER, fwd=fwd, loss_config=LOSS, micro_batches=1)
        host = jax.tree.map(np.array, (logits, ref_logps, optax.tree.get(state.opt_state, "mu"), state.params))
        logits, ref_logps, gradients, updated = host
        numbers = jax.tree.map(float, metrics)
        return Phases(logits, rollout, read_in_rollout, ref_logps, numbers, gradients, updated, state, weights)


@pytest.fixture(scope="module")
def one() -> Phases:
    return run_phases("1x1", TRAIN, None)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1].name}")
def many(request, one: Phases) -> tuple[str, Layout, Phases]:
    mesh, layout = request.param
    return mesh, layout, run_phases(mesh, layout, one.rollout)


def test_the_same_numbers_as_on_one_device(one: Phases, many: tuple[str, Layout, Phases]) -> None:
    *_, found = many
    assert_close(found.logits, one.logits, LOGPS)
    for rollout in (found.rollout, found.read_in_rollout, one.read_in_rollout):
        np.testing.assert_array_equal(rollout.tokens_bgr, one.rollout.tokens_bgr)
        np.testing.assert_array_equal(rollout.length_bg, one.rollout.length_bg)
        assert_close(rollout.logps_bgr, one.rollout.logps_bgr, LOGPS)
    assert_close(found.ref_logps, one.ref_logps, LOGPS)
    assert found.metrics == pytest.approx(one.metrics, rel=GRADIENTS, abs=1e-5)
    # AdamW's first moment after one step is the clipped gradient times 1 - beta1.
    jax.tree.map(lambda x, y: assert_close(x, y, GRADIENTS), found.gradients, one.gradients)
    jax.tree.map(assert_same_step, found.policy, one.policy, one.gradients)


@pytest.mark.parametrize("mesh", [*MESHES, "2x1x2", "4x1x1"])
@pytest.mark.parametrize("most", [False, True])
def test_mini_batches_are_spread_as_batches_are(mesh: str, most: bool) -> None:
    """Every device has its part of each, out of what it holds; with the ``most`` of them, one row."""
    data, fsdp, _ = (1, *map(int, mesh.split("x")))[-3:]
    parts = 32 // (data * fsdp) if most else 2
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(mesh)):
        whole = rng.standard_normal((32, GROUP)).astype(np.float32)
        batch = UpdateBatch(*place((prompts(32, PROCESSOR), None, whole, whole > 0, None)))
        for part in range(2):
            found = grpo._take_part(batch, part, parts)
            np.testing.assert_array_equal(found.advantages_bg, whole[part::parts])
            np.testing.assert_array_equal(found.prompts.tokens_bp, np.asarray(batch.prompts.tokens_bp)[part::parts])
            assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, batch)
            mine = {shard.device: set(np.ravel(shard.data)) for shard in batch.advantages_bg.addressable_shards}
            for shard in found.advantages_bg.addressable_shards:
                assert set(np.ravel(shard.data)) <= mine[shard.device]


def assert_close(found: np.ndarray, expected: np.ndarray, relative: float) -> None:
    assert np.abs(expected).max() > 0
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def assert_same_step(found: np.ndarray, expected: np.ndarray, gradient: np.ndarray) -> None:
    """AdamW's first step is the gradient's sign wherever it is not rounding noise; elsewhere at most one step apart."""
    clear = np.abs(gradient) > 1e-2 * np.abs(gradient).max()
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-5)
    assert np.abs(found - expected).max() <= 2.01e-2


def test_parameters_and_moments_lie_in_shards_as_the_table_says(many: tuple[str, Layout, Phases]) -> None:
    mesh, layout, found = many
    data, fsdp, tensor = (1, *map(int, mesh.split("x")))[-3:]
    kv = 2 // tensor if tensor <= 2 else 2  # held whole where the axis is longer
    # In the FSDP layout a matrix is divided along the model's width alone.
    width, split, own_kv = (fsdp, tensor, kv) if layout is TRAIN else (fsdp * tensor, 1, 2)
    trained = {
        "q_dnh": (2, 64 // width, 8 // split, 8),
        "k_dkh": (2, 64 // width, own_kv, 8),
        "o_nhd": (2, 8 // split, 8, 64 // width),
        "gate_df": (2, 64 // width, 128 // split),
        "down_fd": (2, 128 // split, 64 // width),
    }
    rolled = {
        "q_dnh": (2, 64, 8 // tensor, 8),
        "k_dkh": (2, 64, kv, 8),
        "o_nhd": (2, 8 // tensor, 8, 64),
        "gate_df": (2, 64, 128 // (fsdp * tensor)),
        "down_fd": (2, 128 // (fsdp * tensor), 64),
    }
    count = data * fsdp * tensor
    policy, moments, weights = found.state.params, optax.tree.get(found.state.opt_state, "nu"), found.weights
    for name in trained:
        for tree, shapes in ((policy, trained), (moments, trained), (weights, rolled)):
            assert_shards(getattr(tree.blocks, name)[...], shapes[name], count)
    assert_shards(policy.embed_vd[...], (512 // tensor, 64 // fsdp), count)
    assert_shards(weights.embed_vd[...], (512 // (fsdp * tensor), 64), count)
    assert_shards(policy.vision.blocks.qkv_d3nh[...], (2, 32 // width, 3, 4 // split, 8), count)
    assert_shards(policy.vision.merger_up_df[...], (128 // width, 128 // split), count)


@pytest.mark.parametrize("layout", [TRAIN, FSDP, ROLLOUT], ids=lambda layout: layout.name)
def test_every_matrix_of_a_7b_is_divided_over_the_mesh(layout: Layout) -> None:
    """For training each is in sixteen parts; for sampling those of attention and of the vision tower are in four."""
    with jax.set_mesh(make_mesh("4x4")):
        policy = abstract_policy(RELEASED["Qwen/Qwen2.5-VL-7B-Instruct"], layout)
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(policy):
        if leaf.size > 1e6 * (leaf.shape[0] if "blocks" in jax.tree_util.keystr(path) else 1):
            name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            parts[name] = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
    assert len(parts) == 17
    whole_there = {"embed_vd", "head_vd", "blocks/gate_df", "blocks/up_df", "blocks/down_fd"}
    # Patches are embedded by rows of pixels, which nothing divides.
    expected = {name: 16 if layout is not ROLLOUT or name in whole_there else 4 for name in parts}
    assert parts == expected | {"vision/patch_cd": {TRAIN: 4, FSDP: 16, ROLLOUT: 1}[layout]}


@pytest.mark.parametrize("mesh", ["4x4", "2x4x2"])
def test_weights_are_laid_out_for_sampling_without_whole_copies(mesh: str, capfd: pytest.CaptureFixture[str]) -> None:
    """XLA warns where it finds no better way from one sharding to another than the whole array on every device."""
    with jax.set_mesh(make_mesh(mesh)):
        to_rollout = rollout_layout(DIMS, FLOAT32)
        for layout in (TRAIN, FSDP):
            to_rollout.lower(random_policy(layout=layout)).compile()
    assert "rematerialization" not in capfd.readouterr().err


def assert_shards(array: jax.Array, shape: tuple[int, ...], devices: int) -> None:
    assert {shard.data.shape for shard in array.addressable_shards} == {shape}
    assert len(array.sharding.device_set) == devices


def gathered_sizes(layout: Layout, mesh: str) -> set[int]:
    """How many numbers a device holds after each all-gather of the compiled sampling program."""
    with jax.set_mesh(make_mesh(mesh)):
        policy = random_policy(DIMS, layout)
        assert all(leaf.size % 3 for leaf in jax.tree.leaves(policy.blocks))
        batch = place(prompts(BATCH, PROCESSOR, multiple=48))
        fwd, sampling = ForwardConfig(DIMS, layout, FLOAT32), SAMPLING._replace(group=3)
        text = sample.lower(policy, batch, jax.random.key(0), fwd=fwd, sampling=sampling).compile().as_text()
    assert " while(" in text
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    return {math.prod(int(size) for size in shape.split(",") if size) for shape in shapes}


def test_no_weight_moves_while_sampling() -> None:
    """Group and prompt length are multiples of 3 and no weight's size is, so sizes tell activations from weights.

    The training layout gathers weights where they are used, which shows that the search finds them: queries, the MLP,
    the embedding, each still split over tensor.
    """
    rollout = gathered_sizes(ROLLOUT, "4x4")
    assert rollout, "activations should be gathered"
    assert {size for size in rollout if size % 3} == set()
    assert gathered_sizes(TRAIN, "4x4") >= {64 * 2 * 8, 64 * 32, 128 * 64}
