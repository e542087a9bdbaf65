"""GRPO's arithmetic against numbers worked out by hand, and the update on a small policy."""

import math
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIMS, load_processor, prompts, random_policy

from segzero_jax import config as configs
from segzero_jax import grpo
from segzero_jax.config import Config, GrpoConfig, ModelConfig, RolloutConfig, TrainConfig
from segzero_jax.grpo import (
    LossConfig,
    UpdateBatch,
    advantages,
    counted,
    group_loss,
    initial_state,
    k3_kl,
    learn,
    learning_rate,
    make_loss_config,
    make_optimizer,
    policy_logps,
    policy_loss,
    token_mask,
    update,
)
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.policy import ForwardConfig, embed_images
from segzero_jax.types import Rollout

NAN = math.nan
FWD = ForwardConfig(DIMS, TRAIN, jnp.dtype("float32"))


# Advantages.


def test_advantages_divide_by_the_sample_deviation():
    found = advantages(np.array([[1, 2, 3, 6], [0, 1e-6, NAN, NAN]]))
    std = math.sqrt((4 + 1 + 0 + 9) / 3)  # Bessel: 3, not 4
    np.testing.assert_allclose(found[0], [-2 / std, -1 / std, 0, 3 / std], rtol=1e-6)
    # A spread as small as epsilon: 5e-7 / (7.0711e-7 + 1e-6).
    np.testing.assert_allclose(found[1], [-0.292893, 0.292893, 0, 0], rtol=1e-5)
    assert found.dtype == np.float32


def test_a_missing_score_is_not_a_zero():
    found = advantages(np.array([[1, NAN, 3]]))
    np.testing.assert_allclose(found, [[-1 / math.sqrt(2), 0, 1 / math.sqrt(2)]], rtol=1e-5)


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [NAN, 5.0, NAN], [NAN, NAN, NAN], [1e9 / 3] * 3])
def test_a_group_without_a_difference_teaches_nothing(rewards):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (advantages(np.array([rewards])) == 0).all()


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_equal_rewards_whose_parts_were_added_in_another_order_teach_nothing(norm_by_std):
    rewards = np.array([[1 + (0.7 + 0.1), 1 + (0.0 + 0.8)], [0.1 + 0.2, 0.3], [1e6 * (0.1 + 0.2), 3e5]])
    assert (rewards[:, 0] != rewards[:, 1]).all()
    assert (advantages(rewards, norm_by_std) == 0).all()
    assert (advantages(rewards + np.array([[0, 1e-6], [1e-6, 0], [0, 1e-2]]), norm_by_std) != 0).all()


def test_advantages_of_rewards_that_are_whole_numbers():
    assert np.array_equal(advantages(np.array([[0, 1], [3, 3]])), advantages(np.array([[0.0, 1.0], [3.0, 3.0]])))
    assert np.array_equal(advantages(np.array([[False, True]])), advantages(np.array([[0.0, 1.0]])))


def test_advantages_without_the_spread_of_their_group():
    """Dr. GRPO's: how far a group is spread neither raises nor lowers them."""
    rewards = np.array([[1.0, 4.0, 1.0, math.nan], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(advantages(rewards, norm_by_std=False), [[-1, 2, -1, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_without_the_spread_advantages_are_those_of_leaving_one_out_but_for_a_factor():
    """RLOO (arXiv 2402.14740) compares each answer with the mean of the others."""
    rewards = np.array([1.0, 4.0, 1.5, 0.0])
    others = np.array([np.delete(rewards, i).mean() for i in range(4)])
    np.testing.assert_allclose(advantages(rewards[None], norm_by_std=False)[0], 3 / 4 * (rewards - others), rtol=1e-6)


REWARDS = st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@given(REWARDS, st.floats(-5, 5), st.permutations(range(8)))
def test_advantages_ignore_the_level_of_rewards_and_their_order(rewards, level, order):
    plain = advantages(np.array([rewards]))[0]
    np.testing.assert_allclose(advantages(np.array([rewards]) + level)[0], plain, atol=1e-4)
    order = [i for i in order if i < len(rewards)]
    np.testing.assert_allclose(advantages(np.array([rewards])[:, order])[0], plain[order], atol=1e-5)
    assert abs(plain.sum()) < 1e-4
    best = np.array(rewards) == max(rewards)
    assert (plain[best] == plain.max()).all()


# KL and surrogate.


def test_kl_estimate_and_its_clamp():
    d = jnp.array([0, math.log(2), -1, 2, 5, -15])
    np.testing.assert_allclose(k3_kl(-d, jnp.zeros(6)), [0, 0.306853, 0.367879, 4.389056, 10, 10], atol=1e-6)


def test_kl_of_policies_that_hardly_part_is_small_and_not_negative() -> None:
    """d²/2, of a d that is lost beside 1 in float32."""
    d = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    for scale in (1e-6, 1e-4, 1e-2):
        found = np.asarray(k3_kl(jnp.zeros(d.size), jnp.asarray(d * scale)))
        assert (found >= 0).all()
        assert found.mean() == pytest.approx(np.mean((d * scale).astype(np.float64) ** 2) / 2, rel=1e-2)


def test_kl_has_a_finite_gradient_wherever_the_policies_part():
    gradient = jax.vmap(jax.grad(lambda logp: k3_kl(logp, jnp.zeros(()))))
    # 1 - exp(d) inside the clamp, 0 outside.
    np.testing.assert_allclose(
        gradient(jnp.array([0.0, -math.log(2), 1.0, -1000.0, 1000.0])), [0, -1, 0.632121, 0, 0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip_high", "loss", "clipped", "gradient"),
    [
        (1.5, 1, 0.2, -1.2, True, 0),
        (1.5, -1, 0.2, 1.5, False, 1.5),
        (0.5, 1, 0.2, -0.5, False, -0.5),
        (0.5, -1, 0.2, 0.8, True, 0),
        (1.25, 1, 0.2, -1.2, True, 0),
        (1.25, 1, 0.3, -1.25, False, -1.25),  # clip-higher
        (0.75, -2, 0.3, 1.6, True, 0),  # which leaves the lower side alone
        (1.0, 3, 0.2, -3, False, -3),
    ],
)
def test_clipped_surrogate(ratio, advantage, clip_high, loss, clipped, gradient):
    old = jnp.full((1, 1, 1), -2.0)
    value = lambda logp: policy_loss(logp, old, jnp.full((1, 1), float(advantage)), 0.2, clip_high)  # noqa: E731
    found, was_clipped = value(old + math.log(ratio))
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    assert bool(was_clipped) == clipped
    np.testing.assert_allclose(jax.grad(lambda x: value(x)[0].sum())(old + math.log(ratio)), gradient, rtol=1e-5)


def test_the_old_log_probabilities_carry_no_gradient():
    logp = jnp.full((1, 1, 1), -2.0)
    gradient = jax.grad(lambda old: policy_loss(logp, old, jnp.ones((1, 1)), 0.2, 0.2)[0].sum())(logp)
    assert float(gradient.sum()) == 0


# The loss of a group, of given log-probabilities. Six of the twelve tokens count.

LENGTHS, KEEP = np.array([[3, 1], [2, 3]], np.int32), np.array([[True, True], [True, False]])
ADVANTAGES = np.array([[1, -1], [0.5, 9]], np.float32)
PER_TOKEN = np.where((np.arange(3) < LENGTHS[..., None]) & KEEP[..., None], ADVANTAGES[..., None], 0) / 6
AT = (0, 0, 0)  # a token that counts


@pytest.fixture
def loss_of(monkeypatch):
    """``(config, gaps to other policies) -> loss, metrics, gradient by log-probability and by entropy``.

    A gap is the sampler's, the reference's or the old log-probabilities against these. Responses are cut off at 10.
    """
    logp = jnp.asarray(np.random.default_rng(0).uniform(-3, -1, (2, 2, 3)), jnp.float32)
    policy = {"logp": logp, "entropy": jnp.arange(12.0).reshape(2, 2, 3)}
    monkeypatch.setattr(grpo, "group_hidden", lambda policy, *_: None)
    monkeypatch.setattr(grpo, "response_logps", lambda policy, *_: (policy["logp"], policy["entropy"]))

    def loss_of(config, sampler_gap=0.0, ref_gap=0.0, old_gap=None):
        rollout = Rollout(np.zeros((2, 2, 3), np.int32), LENGTHS, logp - sampler_gap, KEEP)
        old = None if old_gap is None else logp + old_gap
        batch = UpdateBatch(None, rollout, ADVANTAGES, KEEP, logp + ref_gap, old)
        plain = LossConfig(config, 1.0, (), freeze_vision=False, max_tokens=10)
        value = jax.value_and_grad(group_loss, has_aux=True)
        (loss, metrics), gradient = value(policy, batch, counted(batch), FWD, plain)
        return float(loss), {name: float(x) for name, x in metrics.items()}, gradient["logp"], gradient["entropy"]

    return loss_of


def gap_at(value: float) -> jax.Array:
    """A difference at the one token, and a large one where nothing counts."""
    gap = np.where(PER_TOKEN == 0, 50.0, 0.0)
    gap[AT] = value
    return jnp.asarray(gap, jnp.float32)


def test_on_policy_the_gradient_is_the_policy_gradient(loss_of):
    """-A / tokens by each log-probability: a mean over the tokens of the batch, dropped rows and padding left out."""
    loss, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0), ref_gap=gap_at(0))
    np.testing.assert_allclose(by_logp, -PER_TOKEN, rtol=1e-6)
    assert loss == pytest.approx(-(3 * 1 - 1 + 2 * 0.5) / 6)
    assert metrics["clip_fraction"] == 0


def test_on_policy_the_mean_of_responses_has_the_gradient_of_ratios_of_whole_responses(loss_of):
    """GSPO (arXiv 2507.18071): a ratio is the geometric mean of a response's."""
    counts = np.arange(3) < LENGTHS[..., None]

    def gspo(logp):
        gap = jnp.where(counts, logp - jax.lax.stop_gradient(logp), 0).sum(axis=-1) / LENGTHS
        return -(jnp.exp(gap) * ADVANTAGES)[KEEP].mean()

    _, _, by_logp, _ = loss_of(GrpoConfig(kl_coef=0, loss_mean="responses"))
    np.testing.assert_allclose(by_logp, jax.grad(gspo)(jnp.zeros((2, 2, 3))), rtol=1e-6)


def test_kl_is_in_the_loss(loss_of):
    loss, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0.3), ref_gap=gap_at(math.log(2)))
    assert metrics["kl"] == pytest.approx(0.306853 / 6, rel=1e-5)
    assert loss == pytest.approx(-0.5 + 0.3 * 0.306853 / 6, rel=1e-5)
    np.testing.assert_allclose(by_logp[AT], -PER_TOKEN[AT] + 0.3 * (1 - 2) / 6, rtol=1e-5)


def test_entropy_is_a_bonus(loss_of):
    loss, metrics, _, by_entropy = loss_of(GrpoConfig(kl_coef=0, entropy_coef=0.1))
    assert metrics["entropy"] == pytest.approx((0 + 1 + 2 + 3 + 6 + 7) / 6)
    assert loss == pytest.approx(-0.5 - 0.1 * 19 / 6)
    np.testing.assert_allclose(by_entropy, np.where(PER_TOKEN != 0, -0.1 / 6, 0), rtol=1e-6)


@pytest.mark.parametrize(("ratio", "weight"), [(3, 2), (0.5, 0.5), (2, 2)])
def test_importance_weights_are_capped(loss_of, ratio, weight):
    """exp(trainer - sampler), at most 2; it scales the policy gradient and nothing else."""
    gap = gap_at(math.log(ratio))
    _, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0.3, importance_cap=2), sampler_gap=gap)
    assert metrics["sampler_gap"] == pytest.approx(abs(math.log(ratio)) / 6, rel=1e-5)
    np.testing.assert_allclose(by_logp[AT], -PER_TOKEN[AT] * weight, rtol=1e-5)
    np.testing.assert_allclose(by_logp[0, 0, 1], -PER_TOKEN[0, 0, 1], rtol=1e-6)
    _, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0.3, importance_cap=0), sampler_gap=gap)
    np.testing.assert_allclose(by_logp[AT], -PER_TOKEN[AT], rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "of_each_response"),
    [
        ("tokens", [[1 / 6, 1 / 6], [1 / 6, 0]]),
        ("responses", [[1 / 3 / 3, 1 / 3 / 1], [1 / 3 / 2, 0]]),  # three responses, of 3, 1 and 2 tokens
        ("limit", [[1 / 3 / 10] * 2, [1 / 3 / 10, 0]]),
    ],
)
def test_what_the_loss_is_a_mean_over(loss_of, mean, of_each_response):
    """The whole loss is weighted; what is measured stays a mean over tokens."""
    config = GrpoConfig(kl_coef=0.3, entropy_coef=0.1, loss_mean=mean)
    loss, metrics, by_logp, by_entropy = loss_of(config, ref_gap=gap_at(math.log(2)))
    weight = np.where(PER_TOKEN != 0, np.array(of_each_response)[..., None], 0)
    kl = np.where(np.arange(12).reshape(2, 2, 3) == 0, 0.306853, 0)
    expected = weight * (-ADVANTAGES[..., None] + 0.3 * kl - 0.1 * np.arange(12).reshape(2, 2, 3))
    assert loss == pytest.approx(expected.sum(), rel=1e-5)
    np.testing.assert_allclose(by_logp[0, 1], -weight[0, 1] * ADVANTAGES[0, 1], rtol=1e-5)
    np.testing.assert_allclose(by_entropy, -0.1 * weight, rtol=1e-5)
    assert metrics["entropy"] == pytest.approx((0 + 1 + 2 + 3 + 6 + 7) / 6)
    assert metrics["kl"] == pytest.approx(0.306853 / 6, rel=1e-5)


def test_after_the_first_update_the_ratio_is_to_the_policy_that_sampled(loss_of):
    """The token's probability has risen by half since: clipped where its advantage is positive; and its importance
    weight is the old policy's against the sampler."""
    gap = gap_at(-math.log(1.5))
    config = GrpoConfig(kl_coef=0, importance_cap=2)
    loss, metrics, by_logp, _ = loss_of(config, sampler_gap=gap_at(0), old_gap=gap)
    # The sampler has the current log-probability here, so the old one is below it.
    assert metrics["sampler_gap"] == pytest.approx(math.log(1.5) / 6, rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(1 / 6)
    assert metrics["kl_old"] == pytest.approx((1.5 - 1 - math.log(1.5)) / 6, rel=1e-5)
    assert by_logp[AT] == 0
    np.testing.assert_allclose(by_logp[0, 0, 1], -PER_TOKEN[0, 0, 1], rtol=1e-6)
    assert loss == pytest.approx(-(1.2 / 1.5 + 2 * 1 - 1 + 2 * 0.5) / 6, rel=1e-5)
    _, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0, clip_high=0.6), old_gap=gap)
    assert metrics["clip_fraction"] == 0
    np.testing.assert_allclose(by_logp[AT], -1.5 * PER_TOKEN[AT], rtol=1e-5)


def test_padding_far_from_the_old_policy_spoils_no_gradient(loss_of):
    """Behind the end of a response nothing bounds the ratio."""
    old_gap = jnp.asarray(np.where(PER_TOKEN == 0, -95.0, 0.0), jnp.float32)
    _, metrics, by_logp, _ = loss_of(GrpoConfig(kl_coef=0), old_gap=old_gap)
    np.testing.assert_allclose(by_logp, -PER_TOKEN, rtol=1e-6)
    assert metrics["clip_fraction"] == 0


def test_the_settings_of_a_loss_are_the_run_s():
    run = replace(Config(), grpo=GrpoConfig(loss_mean="limit"), model=ModelConfig(freeze_vision=True))
    run = replace(run, rollout=RolloutConfig(temperature=0.7, max_prompt_tokens=99, max_response_tokens=77))
    assert make_loss_config(run, (5, 6)) == LossConfig(run.grpo, 0.7, (5, 6), True, 77)


def test_token_mask_counts_lengths_and_kept_rows():
    assert token_mask(LENGTHS, KEEP, 3).sum() == 6


# The optimizer, on a plain tree.


def numpy_adamw(values, gradients, config):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) behind a clip of the global norm."""
    mu = {name: np.zeros_like(x) for name, x in values.items()}
    nu = {name: np.zeros_like(x) for name, x in values.items()}
    for count, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum((x**2).sum() for x in gradient.values()))
        scale = min(1, config.max_grad_norm / norm)
        for name, g in gradient.items():
            mu[name] = config.beta1 * mu[name] + (1 - config.beta1) * g * scale
            nu[name] = config.beta2 * nu[name] + (1 - config.beta2) * (g * scale) ** 2
            step = mu[name] / (1 - config.beta1**count) / (np.sqrt(nu[name] / (1 - config.beta2**count)) + 1e-8)
            lr = config.lr * min(1, count / max(1, config.warmup_steps))
            left = (4 - (count - 1)) / (4 - config.warmup_steps)
            lr *= {"none": 1, "linear": min(1, left), "cosine": (1 - math.cos(math.pi * min(1, left))) / 2}[
                config.lr_decay
            ]
            values = values | {name: values[name] - lr * (step + config.weight_decay * values[name])}
    return values


@settings(max_examples=20)
@given(
    st.integers(0, 1000),
    st.sampled_from([0.01, 0.9, 50.0]),
    st.sampled_from([0, 2]),
    st.sampled_from(["none", "linear", "cosine"]),
)
def test_adamw_with_clipping_and_a_schedule(seed, max_grad_norm, warmup, decay):
    config = TrainConfig(lr=0.1, weight_decay=0.05, beta1=0.8, beta2=0.95, max_grad_norm=max_grad_norm)
    config = replace(config, warmup_steps=warmup, lr_decay=decay, decay_steps=4)
    rng = np.random.default_rng(seed)
    draw = lambda: {"a": rng.standard_normal((3, 2)), "b": rng.standard_normal(4)}  # noqa: E731
    values, gradients = draw(), [draw() for _ in range(3)]
    expected = numpy_adamw(values, gradients, config)
    optimizer = make_optimizer(config, freeze_vision=False)
    values = jax.tree.map(jnp.float32, values)
    state = optimizer.init(values)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, values)
        values = optax.apply_updates(values, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), values, expected)


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0, 0]),
        ("none", [0.5, *[1] * 7]),
    ],
)
def test_the_rate_rises_falls_and_stays_at_nothing(decay, rates):
    config = TrainConfig(lr=2.0, warmup_steps=2, lr_decay=decay, decay_steps=6)
    found = [float(learning_rate(config, done)) for done in range(8)]
    np.testing.assert_allclose(found, 2 * np.array(rates), atol=1e-6)


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_steps_that_learn_are_those_with_a_rate(decay: str) -> None:
    """A step of 4 updates; a decay over 10 ends in the middle of the third."""
    changes = {
        "train.mini_batch_size": 8,
        "grpo.iterations": 2,
        "train.lr_decay": decay,
        "train.decay_steps": 10,
        "train.steps": 5,
    }
    config = configs.replace(Config(), **changes, **{"train.batch_size": 16, "train.micro_batch_size": 8})
    assert config.updates_per_rollout == 4
    rates = [[float(learning_rate(config.train, 4 * step + n)) for n in range(4)] for step in range(config.train.steps)]
    assert config.steps_that_learn == sum(any(rate > 0 for rate in step) for step in rates)
    assert (config.steps_that_learn == 3) == (decay != "none")
    assert configs.replace(config, **{"train.steps": 2}).steps_that_learn == 2


def test_what_a_run_will_not_do_although_its_configuration_says_so_is_told() -> None:
    config = configs.replace(Config(), **{"train.steps": 10, "train.lr": 1e-6, "grpo.iterations": 2})
    assert configs.notes(config) == []
    for fits in ({"train.warmup_steps": 20}, {"grpo.clip_high": 0.28}):
        assert configs.notes(configs.replace(config, **fits)) == []
    (line,) = configs.notes(configs.replace(config, **{"train.warmup_steps": 21}))
    assert line == (
        "the learning rate stays below train.lr=1e-06: train.warmup_steps=21 counts updates, of which 10 steps make 20"
    )
    (line,) = configs.notes(configs.replace(config, **{"train.lr_decay": "linear", "train.decay_steps": 8}))
    assert line.startswith("after step 4 of 10 the learning rate is 0: train.decay_steps=8 counts updates")
    for changes, said in (
        ({"train.decay_steps": 8}, "the learning rate does not fall: train.decay_steps=8 has no train.lr_decay"),
        ({"reward.server": "none"}, "masks are not scored: reward.mask_iou_weight=1 has no reward.server"),
        (
            {"data.eval_splits": ("val", "mugs/val"), "data.name": "toy,cups"},
            "masks of cups, mugs mean nothing: reward.local_model=toy knows the toy set's pictures alone",
        ),
        (
            {"grpo.iterations": 1, "grpo.clip_high": 0.28},
            "nothing is clipped: grpo.clip_high=0.28 acts from a rollout's second update on, of which a step makes one "
            "(train.mini_batch_size, grpo.iterations)",
        ),
    ):
        assert configs.notes(configs.replace(config, **changes)) == [said]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_its_dtype_and_the_second_stays_wide(dtype):
    """With beta2 at 0.999 a step changes the second moment by less than bfloat16 resolves."""
    optimizer = make_optimizer(TrainConfig(moment_dtype=dtype), freeze_vision=False)
    values = {"a": jnp.ones(3)}
    _, state = optimizer.update({"a": jnp.array([0.1, 0.2, 0.3])}, optimizer.init(values), values)
    assert optax.tree.get(state, "mu")["a"].dtype == dtype
    assert optax.tree.get(state, "nu")["a"].dtype == "float32"
    np.testing.assert_allclose(optax.tree.get(state, "mu")["a"], [0.01, 0.02, 0.03], rtol=1e-2)


# The update, on a policy.


@pytest.fixture(scope="module")
def mesh():
    with jax.set_mesh(make_mesh("1x1")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def batch() -> UpdateBatch:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (4, 2), dtype=np.int32)
    keep = np.array([[True, True], [False, True], [True, True], [False, False]])
    rollout = Rollout(rng.integers(0, 490, (4, 2, 8), dtype=np.int32), lengths, np.zeros((4, 2, 8), np.float32), keep)
    learnt = rng.standard_normal((4, 2)).astype(np.float32)
    return UpdateBatch(prompts(4, load_processor()), rollout, learnt, keep, np.full((4, 2, 8), -6, np.float32))


def losses(freeze_vision: bool) -> LossConfig:
    return LossConfig(GrpoConfig(entropy_coef=0.01), 0.8, load_processor().visual_ids, freeze_vision, max_tokens=8)


@pytest.mark.usefixtures("mesh")
def test_the_update_does_not_depend_on_micro_batches(batch):
    """Plain gradient descent, so that what is compared is the gradient itself. Relative to each tensor's largest."""
    optimizer = optax.sgd(1.0)
    results = []
    for parts in (1, 2, 4):
        policy = random_policy()
        before = jax.device_get(policy)
        state, metrics = update(
            initial_state(policy, optimizer),
            batch,
            optimizer=optimizer,
            fwd=FWD,
            loss_config=losses(freeze_vision=True),
            micro_batches=parts,
        )
        results.append((jax.tree.map(np.subtract, before, jax.device_get(state.params)), metrics))
    (whole, metrics), *others = results
    assert metrics.keys() == {"loss", "kl", "entropy", "clip_fraction", "sampler_gap", "grad_norm", "update/skipped"}
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(whole)), rel=1e-3)
    for gradients, numbers in others:
        for name, value in metrics.items():
            assert float(numbers[name]) == pytest.approx(float(value), rel=1e-4), name
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max()), gradients, whole)


@pytest.mark.usefixtures("mesh")
def test_a_rollout_is_learnt_from_in_mini_batches_and_again(batch):
    """As one call of ``update`` for each part would: the second time round, against the policy that sampled.

    Of the second mini-batch nothing counts.
    """
    keep = np.array([[True, True], [False, False], [True, True], [False, True]])
    batch = batch._replace(keep_bg=keep)
    optimizer = make_optimizer(TrainConfig(lr=1e-2), freeze_vision=False)
    settings = losses(freeze_vision=False)._replace(grpo=GrpoConfig(iterations=2, clip_high=0.3))
    run = {"optimizer": optimizer, "fwd": FWD, "loss_config": settings, "micro_batches": 1}
    old = policy_logps(random_policy(), batch.prompts, batch.rollout.tokens_bgr, fwd=FWD, loss_config=settings)
    batch = batch._replace(old_logps_bgr=np.asarray(old))
    state, found = learn(initial_state(random_policy(), optimizer), batch, keep, mini_batches=4, **run)
    expected, numbers = initial_state(random_policy(), optimizer), []
    for row in (0, 2, 3, 0, 2, 3):
        expected, made = update(expected, jax.tree.map(lambda x, row=row: x[[row]], batch), **run)
        numbers.append(made)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(expected))
    assert jax.device_get(found) == jax.device_get(numbers)
    assert int(state.num_updates) == 6
    once, *_, again = found[:4]
    assert float(once["clip_fraction"]) == 0 < float(again["clip_fraction"])
    assert float(once["sampler_gap"]) == pytest.approx(float(again["sampler_gap"]), rel=1e-6), "the same old policy's"


@pytest.mark.usefixtures("mesh")
def test_without_a_reference_the_rest_is_learnt_alike(batch):
    """No KL in the loss is no reference at all: the same update, bit for bit, and no number of it."""
    results = []
    for learnt in (batch, batch._replace(ref_logps_bgr=None)):
        optimizer = optax.sgd(1.0)
        settings = losses(freeze_vision=False)._replace(grpo=GrpoConfig(kl_coef=0, entropy_coef=0.01))
        state, metrics = update(
            initial_state(random_policy(), optimizer),
            learnt,
            optimizer=optimizer,
            fwd=FWD,
            loss_config=settings,
            micro_batches=2,
        )
        results.append((jax.device_get(state.params), metrics))
    (with_one, metrics), (without, fewer) = results
    jax.tree.map(np.testing.assert_array_equal, with_one, without)
    assert metrics.keys() - fewer.keys() == {"kl"}
    assert {name: float(value) for name, value in fewer.items()} == {name: float(metrics[name]) for name in fewer}


@pytest.mark.usefixtures("mesh")
def test_a_frozen_vision_tower_stays_bit_for_bit_and_the_rest_learns(batch):
    optimizer = make_optimizer(TrainConfig(lr=1e-3, weight_decay=0.1), freeze_vision=True)
    state = initial_state(random_policy(), optimizer)
    # Copied: a view of a buffer would keep it from being donated.
    before, donated = jax.tree.map(np.array, state.params), jax.tree.leaves(state)
    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    assert not [path for path, _ in moments if "vision" in jax.tree_util.keystr(path)]
    state, metrics = update(
        state, batch, optimizer=optimizer, fwd=FWD, loss_config=losses(freeze_vision=True), micro_batches=1
    )
    assert [leaf.shape for leaf in donated if not leaf.is_deleted()] == []
    assert int(state.num_updates) == 1
    assert float(metrics["grad_norm"]) > 0
    for path, after in jax.tree_util.tree_leaves_with_path(jax.device_get(state.params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        same = np.array_equal(after, dict(jax.tree_util.tree_leaves_with_path(before))[path])
        assert same == name.startswith("vision/"), name


@pytest.mark.usefixtures("mesh")
def test_an_update_that_is_not_finite_keeps_the_state_bit_for_bit(batch):
    """A loss of NaN, and a finite loss whose gradient overflows; then the next batch is learnt from as if alone."""
    optimizer = make_optimizer(TrainConfig(lr=1e-3), freeze_vision=False)

    def step(state, batch):
        settings = losses(freeze_vision=False)
        return update(state, batch, optimizer=optimizer, fwd=FWD, loss_config=settings, micro_batches=2)

    nan = np.where(np.arange(8) == 0, NAN, batch.ref_logps_bgr).astype(np.float32)
    # 1e30 is a float32, and so are sums of it; the squares in the norm are not.
    huge = np.where(batch.keep_bg, np.float32(1e30), 0) * np.sign(batch.advantages_bg)
    state, learnt = step(initial_state(random_policy(), optimizer), batch)
    before, shardings = jax.tree.map(np.array, state), jax.tree.map(lambda x: x.sharding, state)
    for bad in (batch._replace(ref_logps_bgr=nan), batch._replace(advantages_bg=huge)):
        state, metrics = step(state, bad)
        assert float(metrics["update/skipped"]) == 1
        assert np.isfinite(metrics["loss"]) == (bad.advantages_bg is huge)
        assert not np.isfinite(metrics["grad_norm"])
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), jax.device_get(state), before)
    state, metrics = step(state, batch)
    assert (float(learnt["update/skipped"]), float(metrics["update/skipped"])) == (0, 0)
    alone, _ = step(jax.device_put(before, shardings), batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(alone))
    assert int(state.num_updates) == 2


@pytest.mark.usefixtures("mesh")
def test_images_embedded_once_teach_the_same(batch):
    """With a frozen tower, embeddings computed beforehand give the loss, gradients and reference of the patches."""
    policy, plain = random_policy(), losses(freeze_vision=True)
    embedded = batch._replace(prompts=embed_images(policy, batch.prompts, fwd=FWD))
    assert embedded.prompts.patches_bisc.shape[1] == 0
    assert embed_images(policy, embedded.prompts, fwd=FWD) is not None  # there is nothing left to embed
    optimizer, results = optax.sgd(1.0), []
    for chosen in (batch, embedded):
        tokens = chosen.rollout.tokens_bgr
        logps = policy_logps(policy, chosen.prompts, tokens, fwd=FWD, loss_config=plain)
        state = initial_state(random_policy(), optimizer)
        state, metrics = update(state, chosen, optimizer=optimizer, fwd=FWD, loss_config=plain, micro_batches=2)
        results.append(jax.device_get((logps, metrics, state.params)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), *results)


@pytest.mark.usefixtures("mesh")
def test_one_prompt_with_one_response_is_a_group_too(batch):
    """Axes of one leave the sharding of a reshape open, so it is said; values are those within the whole batch."""
    policy, tokens, plain = random_policy(), np.asarray(batch.rollout.tokens_bgr), losses(freeze_vision=False)
    alone = jax.tree.map(lambda x: x[:1], batch)._replace(
        rollout=jax.tree.map(lambda x: x[:1, :1], batch.rollout),
        **{name: getattr(batch, name)[:1, :1] for name in ("advantages_bg", "keep_bg", "ref_logps_bgr")},
    )
    group = policy_logps(policy, batch.prompts, tokens, fwd=FWD, loss_config=plain)
    found = policy_logps(policy, alone.prompts, tokens[:1, :1], fwd=FWD, loss_config=plain)
    np.testing.assert_allclose(found[0, 0], group[0, 0], rtol=1e-5, atol=1e-6)
    gradients = jax.grad(lambda policy: group_loss(policy, alone, counted(alone), FWD, plain)[0])
    assert jax.tree.structure(jax.eval_shape(gradients, policy)) == jax.tree.structure(policy)
