"""Three training steps at the real widths of Qwen2.5-VL-3B, four layers deep, on sixteen devices and on one.

The vocabulary is the toy's, and so are the pictures: 56 pixels are one attention window. Weights are float32 noise, so
that equality is a statement about the program alone.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sixteen_devices import place
from tiny import load_processor, prompts, random_policy

from segzero_jax.config import GrpoConfig, TrainConfig
from segzero_jax.grpo import LossConfig, UpdateBatch, initial_state, make_optimizer, policy_logps, update
from segzero_jax.mesh import ROLLOUT, TRAIN, make_mesh
from segzero_jax.model.dims import RELEASED, Dims
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.rollout import Sampling, rollout_layout, sample

BATCH, GROUP, LENGTH, STEPS = 4, 2, 4, 3
FLOAT32 = jnp.dtype("float32")


def wide_dims() -> Dims:
    """The 3B's widths and heads; two key-value heads are fewer than four devices along tensor."""
    released = RELEASED["Qwen/Qwen2.5-VL-3B-Instruct"]
    vision = replace(released.vision, depth=2, full_attention=(1,), window=56)
    return replace(released, vocab=512, layers=4, vision=vision)


def train(mesh: str) -> list[dict[str, Any]]:
    processor, dims = load_processor(), wide_dims()
    fwd = ForwardConfig(dims, TRAIN, FLOAT32, remat=True)
    losses = LossConfig(GrpoConfig(entropy_coef=0.01), 1.0, processor.visual_ids, False, max_tokens=LENGTH)
    optimizer = make_optimizer(TrainConfig(lr=1e-4), freeze_vision=False)
    sampling = Sampling(GROUP, LENGTH, processor.end_ids, processor.pad_id, processor.visual_ids)
    rng, found = np.random.default_rng(0), []
    with jax.set_mesh(make_mesh(mesh)):
        state = initial_state(random_policy(dims, scale=0.02), optimizer)
        batch = place(prompts(BATCH, processor))
        for step in range(STEPS):
            key = jax.random.key(step)
            weights = rollout_layout(dims, FLOAT32)(state.params)
            rollout = sample(weights, batch, key, fwd=ForwardConfig(dims, ROLLOUT, FLOAT32), sampling=sampling)
            del weights
            # The policy is its own reference: a second one would not fit beside it everywhere.
            logps = policy_logps(state.params, batch, rollout.tokens_bgr, fwd=fwd, loss_config=losses)
            scores = place((rng.standard_normal((BATCH, GROUP)).astype(np.float32), np.ones((BATCH, GROUP), bool)))
            learnt = UpdateBatch(batch, rollout, *scores, logps)
            state, metrics = update(state, learnt, optimizer=optimizer, fwd=fwd, loss_config=losses, micro_batches=1)
            found.append({**jax.device_get(metrics), "tokens": np.asarray(rollout.tokens_bgr)})
    return found


@pytest.fixture
def optimized() -> Iterator[None]:
    """Here arrays are large: it takes longer to run programs than to optimize them."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.heavy
@pytest.mark.usefixtures("optimized")
@pytest.mark.timeout(1200)
def test_three_steps_agree() -> None:
    one, sixteen = train("1x1"), train("4x4")
    for found, expected in zip(sixteen, one, strict=True):
        np.testing.assert_array_equal(found.pop("tokens"), expected.pop("tokens"))
        for metrics in (found, expected):
            # How far the sampler's rounding is from the update's: on each mesh another number, and none that matters.
            assert metrics.pop("sampler_gap") < 5e-6
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
