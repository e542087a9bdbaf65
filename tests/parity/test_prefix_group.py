"""One pass over a prompt and its G responses against G passes over prompt and response: losses and gradients, float32.

The repeated layout is ours with one response per row, and transformers' in PyTorch with its own autograd.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import encode, hf_config, load_processor
from torch_policy import load_torch, make_checkpoint, torch_inputs

from segzero_jax.config import GrpoConfig
from segzero_jax.grpo import LossConfig, UpdateBatch, counted, group_loss
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.logprobs import response_logps
from segzero_jax.model.policy import ForwardConfig, Policy, group_hidden
from segzero_jax.model.weights import file_tensors
from segzero_jax.types import Rollout

# Contracts. Of the largest log-probability, and of each tensor's largest gradient.
LOGPS, GRADIENTS = 1e-4, 1e-3
REPEATED_LOGPS, REPEATED_GRADIENTS = 1e-5, 1e-4

GROUP, LENGTH = 3, 12
TEMPERATURE = 0.9
CONFIG = GrpoConfig(kl_coef=0.3, entropy_coef=0.05)
SIZES = [[(56, 56)], [(84, 56), (28, 28)], []]
TEXTS = ["the red one", "it", "which circle is to the left of the star?"]


class Passed(NamedTuple):
    loss: float
    logps_bgr: np.ndarray
    gradients: dict[str, np.ndarray]


def make_batch(prompts, seed: int) -> UpdateBatch:
    rng = np.random.default_rng(seed)
    shape = (len(SIZES), GROUP, LENGTH)
    lengths = rng.integers(1, LENGTH, shape[:2], dtype=np.int32)
    lengths[0, 0], lengths[1, 1] = LENGTH, 1
    keep = np.ones(shape[:2], bool)
    keep[2, 0] = False
    rollout = Rollout(rng.integers(0, 490, shape, dtype=np.int32), lengths, np.zeros(shape, np.float32), keep)
    advantages = rng.standard_normal(shape[:2]).astype(np.float32)
    ref_logps = rng.uniform(-8, -4, shape).astype(np.float32)
    return UpdateBatch(prompts, rollout, advantages, keep, ref_logps)


def repeat_prompts(batch: UpdateBatch) -> UpdateBatch:
    """Every response as a row of its own behind its own copy of the prompt."""
    prompts = jax.tree.map(lambda x: np.repeat(x, GROUP, axis=0), batch.prompts)
    rest = jax.tree.map(lambda x: x.reshape(x.shape[0] * GROUP, 1, *x.shape[2:]), batch._replace(prompts=None))
    return rest._replace(prompts=prompts)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), hf_config(rms_norm_eps=0.01), scale=6)


@pytest.fixture(scope="module")
def prompts():
    processor = load_processor()
    return [encode(processor, text, sizes, n) for n, (text, sizes) in enumerate(zip(TEXTS, SIZES, strict=True))]


@pytest.fixture(scope="module")
def batch(prompts) -> UpdateBatch:
    return make_batch(load_processor().batch(prompts, multiple=8), seed=0)


@pytest.fixture(scope="module")
def run(directory: Path):
    """``(batch, remat) -> Passed``: loss, log-probabilities and gradients of our policy; compiled once per layout."""
    banned = load_processor().visual_ids
    settings = LossConfig(CONFIG, TEMPERATURE, banned, False, max_tokens=LENGTH)
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims = load_hf(directory)

        @jax.jit(static_argnames="fwd")
        def passes(policy: Policy, batch: UpdateBatch, fwd: ForwardConfig):
            gradient_of = jax.value_and_grad(group_loss, has_aux=True)
            (loss, _), gradients = gradient_of(policy, batch, counted(batch), fwd, settings)
            hidden = group_hidden(policy, batch.prompts, batch.rollout.tokens_bgr, fwd)
            logps, _ = response_logps(policy, hidden, batch.rollout.tokens_bgr, fwd, TEMPERATURE, banned)
            return loss, logps, gradients

        def run(batch: UpdateBatch, remat: bool) -> Passed:
            fwd = ForwardConfig(dims, TRAIN, jnp.dtype("float32"), remat)
            loss, logps, gradients = passes(policy, batch, fwd=fwd)
            return Passed(float(loss), np.asarray(logps), file_tensors(gradients, dims, np.float32))

        yield run


@pytest.fixture(scope="module")
def grouped(run, batch: UpdateBatch) -> Passed:
    return run(batch, remat=False)


def assert_same(ours: Passed, theirs: Passed, batch: UpdateBatch, logps: float, gradients: float) -> None:
    real = np.arange(LENGTH) < batch.rollout.length_bg[..., None]
    ours_bgr, theirs_bgr = (x.logps_bgr.reshape(real.shape)[real] for x in (ours, theirs))
    assert np.abs(ours_bgr - theirs_bgr).max() <= logps * np.abs(theirs_bgr).max()
    assert ours.loss == pytest.approx(theirs.loss, rel=logps)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        largest = np.abs(gradient).max()
        assert largest > 0, name
        assert np.abs(ours.gradients[name] - gradient).max() <= gradients * largest, name


def test_equal_to_the_repeated_layout(run, grouped: Passed, batch: UpdateBatch) -> None:
    """With recomputation there and without here, so that neither changes a number."""
    assert_same(grouped, run(repeat_prompts(batch), remat=True), batch, REPEATED_LOGPS, REPEATED_GRADIENTS)


def test_equal_to_transformers(directory: Path, grouped: Passed, batch: UpdateBatch, prompts) -> None:
    processor = load_processor()
    model = load_torch(directory)
    banned = torch.tensor(processor.visual_ids)
    logps = np.zeros(batch.ref_logps_bgr.shape, np.float32)
    loss = torch.zeros(())
    for b, prompt in enumerate(prompts):
        for g in range(GROUP):
            tokens = batch.rollout.tokens_bgr[b, g, : batch.rollout.length_bg[b, g]]
            raw = model(**torch_inputs(prompt, processor, tokens)).logits[0, len(prompt.tokens_p) - 1 : -1]
            every = (raw / TEMPERATURE).index_fill(1, banned, -1e30).log_softmax(-1)
            logp = every.gather(1, torch.from_numpy(tokens.astype(np.int64))[:, None])[:, 0]
            logps[b, g, : len(tokens)] = logp.detach()
            if not batch.keep_bg[b, g]:
                continue
            ratio = (logp - logp.detach()).exp()
            difference = torch.from_numpy(batch.ref_logps_bgr[b, g, : len(tokens)]) - logp
            kl = (difference.exp() - difference - 1).clamp(-10, 10)
            entropy = -(every.exp() * every).sum(-1)
            advantage = float(batch.advantages_bg[b, g])
            loss = loss + (-ratio * advantage + CONFIG.kl_coef * kl - CONFIG.entropy_coef * entropy).sum()
    loss = loss / batch.rollout.length_bg[batch.keep_bg].sum()
    loss.backward()
    rename = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")  # noqa: E731
    gradients = {rename(name): parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert_same(grouped, Passed(loss.item(), logps, gradients), batch, LOGPS, GRADIENTS)


def test_what_is_padding_does_not_count(run, grouped: Passed, batch: UpdateBatch) -> None:
    rng = np.random.default_rng(1)
    prompts, rollout = batch.prompts, batch.rollout
    outside_p = np.arange(prompts.tokens_bp.shape[1]) >= prompts.length_b[:, None]
    outside_r = np.arange(LENGTH) >= rollout.length_bg[..., None]
    other = batch._replace(
        prompts=prompts._replace(
            tokens_bp=np.where(outside_p, rng.integers(0, 490, outside_p.shape), prompts.tokens_bp).astype(np.int32),
            positions_b3p=prompts.positions_b3p + 7 * outside_p[:, None].astype(np.int32),
            patches_bisc=np.where(prompts.patch_valid_bis[..., None], prompts.patches_bisc, 3).astype(np.float32),
        ),
        rollout=rollout._replace(
            tokens_bgr=np.where(outside_r, rng.integers(0, 490, outside_r.shape), rollout.tokens_bgr).astype(np.int32)
        ),
        ref_logps_bgr=np.where(outside_r | ~batch.keep_bg[..., None], 500, batch.ref_logps_bgr).astype(np.float32),
    )
    assert_same(run(other, remat=False), grouped, batch, REPEATED_LOGPS, REPEATED_GRADIENTS)
