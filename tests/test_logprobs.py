import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIMS, random_policy

from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.logprobs import log_probability, response_logps, sampling_logits
from segzero_jax.model.policy import ForwardConfig, Policy, logits
from segzero_jax.plan.cost import Program

BANNED = (3, 500)
FWD = ForwardConfig(DIMS, TRAIN, jnp.dtype("float32"))


@pytest.mark.parametrize("length", [1, 12, 340])  # one token, one chunk, two chunks
def test_log_probabilities_and_entropy_are_those_of_a_plain_softmax(length):
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((2, 3, length, DIMS.hidden)).astype(np.float32)
    tokens = rng.integers(4, 500, (2, 3, length), dtype=np.int32)
    with jax.set_mesh(make_mesh("1x1")):
        policy = random_policy()
    # Half of the states point at one token, which is then nearly certain: entropies from 1e-4 up.
    hidden[:, :, ::2] = 30 * np.asarray(policy.embed_vd[...])[tokens[:, :, ::2]]
    with jax.set_mesh(make_mesh("1x1")):
        logp, entropy = jax.jit(lambda *args: response_logps(*args, FWD, 0.7, BANNED))(policy, hidden, tokens)
    scaled = (hidden.astype(np.float64) @ np.asarray(policy.embed_vd[...], np.float64).T) / 0.7
    scaled[..., list(BANNED)] = -np.inf
    every = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    expected = np.take_along_axis(every, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-5)
    possible = np.delete(every, BANNED, axis=-1)
    np.testing.assert_allclose(entropy, -(np.exp(possible) * possible).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
@pytest.mark.parametrize("length", [5, 340])  # one chunk, and two that need filling
def test_gradients_are_those_of_a_plain_softmax(mesh: str, length: int) -> None:
    """Within 1e-5 of the largest, with what states and head have to say in one place and over devices."""
    rng = np.random.default_rng(2)
    hidden = rng.standard_normal((4, 3, length, DIMS.hidden)).astype(np.float32)
    # Two are banned: nothing makes them more probable.
    tokens = rng.integers(0, DIMS.vocab, (4, 3, length), dtype=np.int32)
    tokens[0, 0, :2] = BANNED
    weights = rng.standard_normal((2, 4, 3, length)).astype(np.float32)

    def weighted(logp: jax.Array, entropy: jax.Array) -> jax.Array:
        return (logp * weights[0] + entropy * weights[1]).sum()

    def ours(policy: Policy, hidden: jax.Array) -> jax.Array:
        return weighted(*response_logps(policy, hidden, tokens, FWD, 0.7, BANNED))

    def plain(head: jax.Array, hidden: jax.Array) -> jax.Array:
        raw = jnp.einsum("bgrd,vd->bgrv", hidden, head, precision="highest") / 0.7
        every = jax.nn.log_softmax(raw.at[..., np.array(BANNED)].set(-1e30))
        logp = jnp.take_along_axis(every, tokens[..., None], -1)[..., 0]
        return weighted(logp, -(jnp.exp(every) * every).sum(-1))

    with jax.set_mesh(make_mesh(mesh)):
        policy = random_policy()
        placed = jax.device_put(hidden, TRAIN.spec("batch", None, None, None))
        by_policy, by_hidden = jax.device_get(jax.jit(jax.grad(ours, argnums=(0, 1)))(policy, placed))
    head = np.asarray(jax.device_get(policy.embed_vd[...]))
    expected = jax.device_get(jax.jit(jax.grad(plain, argnums=(0, 1)))(head, hidden))
    for found, right in zip((by_policy.embed_vd[...], by_hidden), expected, strict=True):
        assert np.abs(found - right).max() <= 1e-5 * np.abs(right).max()


def test_the_gradient_of_a_float32_head_is_not_rounded_to_what_the_states_are() -> None:
    tokens = np.random.default_rng(3).integers(4, 500, (1, 1, 5), dtype=np.int32)
    fwd = FWD._replace(dtype=jnp.dtype("bfloat16"))
    with jax.set_mesh(make_mesh("1x1")):
        policy, hidden = random_policy(), jnp.ones((1, 1, 5, DIMS.hidden), "bfloat16")
        loss = lambda policy: response_logps(policy, hidden, tokens, fwd, 0.7, BANNED)[0].sum()  # noqa: E731
        run = jax.jit(jax.grad(loss))
        gradient, program = np.asarray(run(policy).embed_vd[...]), str(run.trace(policy).jaxpr)
    assert gradient.dtype == "float32"
    # Nor is a chunk's part of it, a rounding that XLA for CPUs may leave out.
    products = re.findall(rf"(\w+)\[{DIMS.vocab},{DIMS.hidden}\]\S*\s+= dot_general", program)
    assert products == ["f32"]
    assert (gradient != gradient.astype(jnp.bfloat16)).any()


def test_logits_are_not_rounded_to_what_the_states_are() -> None:
    """Neither the sampler's nor the update's: of a logit of 20, bfloat16 would leave the second digit."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(4, 500, (1, 1, 40), dtype=np.int32)
    fwd = FWD._replace(dtype=jnp.dtype("bfloat16"))
    with jax.set_mesh(make_mesh("1x1")):
        policy, hidden = random_policy(), jnp.asarray(6 * rng.standard_normal((1, 1, 40, DIMS.hidden)), "bfloat16")
        run = jax.jit(lambda *args: response_logps(*args, fwd, 0.7, BANNED))
        learnt, _ = run(policy, hidden, tokens)
        program = str(run.trace(policy, hidden, tokens).jaxpr)
        scaled = sampling_logits(jax.jit(lambda *args: logits(*args, fwd))(policy, hidden[:, 0]), 0.7, BANNED)
        sampled = log_probability(scaled, tokens[:, 0])
        head = np.asarray(policy.embed_vd[...].astype("bfloat16"), np.float64)
    every = np.asarray(hidden[:, 0], np.float64) @ head.T / 0.7
    every[..., list(BANNED)] = -np.inf
    expected = np.take_along_axis(every, tokens[:, 0, :, None], -1)[..., 0] - np.log(np.exp(every).sum(-1))
    np.testing.assert_allclose(sampled, expected, atol=1e-4)
    np.testing.assert_allclose(learnt[:, 0], expected, atol=1e-4)
    # XLA for CPUs leaves such roundings out where it likes.
    assert f"f32[40,{DIMS.vocab}]" in program
    assert f"bf16[40,{DIMS.vocab}]" not in program


def test_a_banned_token_has_no_probability_and_none_banned_changes_nothing():
    with jax.set_mesh(make_mesh("1x1")):
        raw = jnp.asarray(np.random.default_rng(0).standard_normal((2, 512)), jnp.float32)
        probabilities = np.asarray(jax.nn.softmax(sampling_logits(raw, 2.0, BANNED)))
        free = sampling_logits(raw, 2.0, ())
    assert (probabilities[:, BANNED] == 0).all()
    assert (np.delete(probabilities, BANNED, axis=1) > 0).all()
    np.testing.assert_array_equal(free, raw / 2)


def test_no_array_holds_the_vocabulary_for_every_token():
    """Forward and backward, logits exist for a chunk of 32 positions; three chunks of them exist nowhere."""
    b, g, r = 16, 3, 96
    with jax.set_mesh(make_mesh("1x1")):
        policy = random_policy()
        hidden = jnp.zeros((b, g, r, DIMS.hidden))
        tokens = jnp.zeros((b, g, r), jnp.int32)
        loss = lambda policy, hidden: sum(x.sum() for x in response_logps(policy, hidden, tokens, FWD, 1.0, BANNED))  # noqa: E731
        program = Program(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(policy, hidden).compile().as_text())
    arrays = [array for body in program.computations.values() for line in body.values() for array in line.arrays]
    wide = [np.prod(array.shape) // DIMS.vocab for array in arrays if DIMS.vocab in array.shape]
    assert max(wide) == b * g * 32
