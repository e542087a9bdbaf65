"""Sampling against transformers' generate, against the reference pass, and against distributions worked out by hand."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from tiny import encode, hf_config, load_processor
from torch_policy import load_torch, make_checkpoint, torch_inputs

from segzero_jax import rollout as rollout_module
from segzero_jax.config import GrpoConfig
from segzero_jax.grpo import LossConfig, policy_logps
from segzero_jax.mesh import ROLLOUT, TRAIN, make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.policy import ForwardConfig, Policy
from segzero_jax.rollout import Sampling, cache_lengths, rollout_layout, sample, truncate
from segzero_jax.types import PromptBatch, Rollout

PROCESSOR = load_processor()
FLOAT32 = jnp.dtype("float32")
PROMPTS = [
    encode(PROCESSOR, text, sizes, n)
    for n, (text, sizes) in enumerate(
        [("the red one", [(56, 56)]), ("it", [(84, 56)]), ("which circle is left of the star?", [(28, 28)]), ("x", [])]
    )
]
PAD = PROCESSOR.pad_id
LENGTH = 10
DRAWN = Sampling(3, LENGTH, PROCESSOR.end_ids, PAD, PROCESSOR.visual_ids, temperature=0.8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), hf_config(tie_word_embeddings=False), scale=6)


@pytest.fixture(scope="module")
def model(directory):
    return load_torch(directory)


@pytest.fixture(scope="module")
def draw(directory):
    """``(key, sampling, rows, mesh, change) -> Rollout`` on the host; weights go through the rollout layout."""

    def draw(key=0, sampling=DRAWN, rows=4, mesh="1x1", change=lambda policy: policy) -> Rollout:
        with jax.set_mesh(make_mesh(mesh)):
            policy, dims = load_hf(directory)
            weights = rollout_layout(dims, FLOAT32)(change(policy))
            fwd = ForwardConfig(dims, ROLLOUT, FLOAT32)
            batch = place(PROCESSOR.batch(PROMPTS[:rows], multiple=48))
            return jax.device_get(sample(weights, batch, jax.random.key(key), fwd=fwd, sampling=sampling))

    return draw


def place(batch: PromptBatch) -> PromptBatch:
    put = lambda x: jax.device_put(x, ROLLOUT.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(put, batch)


def favour(ids: tuple[int, ...], factor: float):
    """A change of the weights that blows up the logits of some tokens, up or down."""

    def change(policy: Policy) -> Policy:
        rows = np.ones((policy.head_vd.shape[0], 1), np.float32)
        rows[list(ids)] = factor
        policy.head_vd[...] = policy.head_vd[...] * rows
        return policy

    return change


def first_logits(model, row: int) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(PROMPTS[row], PROCESSOR)).logits[0, -1].double().numpy()


# Greedy.


def greedy_answers(model, end: int | None, **how) -> list[list[int]]:
    """Those of transformers, up to ``end``."""
    answers = []
    for prompt in PROMPTS:
        made = model.generate(
            **torch_inputs(prompt, PROCESSOR),
            max_new_tokens=LENGTH,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=PAD,
            suppress_tokens=list(PROCESSOR.visual_ids),
            **how,
        )
        answers.append(made[0, len(prompt.tokens_p) :].tolist())
    return answers


@pytest.fixture(scope="module")
def generated(model) -> tuple[int, list[list[int]]]:
    """A token that greedy answers come to and that is made the end, and transformers' answers up to it."""
    endless = greedy_answers(model, None)
    end = next(token for at, token in enumerate(endless[0]) if at > 2 and token not in endless[0][:at])
    return end, greedy_answers(model, end)


@pytest.fixture(scope="module")
def greedy(draw, generated) -> Rollout:
    end, _ = generated
    return draw(sampling=Sampling(2, LENGTH, (end,), PAD, PROCESSOR.visual_ids, greedy=True))


def test_greedy_answers_are_those_of_transformers(generated, greedy):
    end, theirs = generated
    lengths = [len(answer) for answer in theirs]
    assert 1 < min(lengths) < max(lengths), "some should end and some not"
    for row, answer in enumerate(theirs):
        padded = answer + [PAD] * (LENGTH - len(answer))
        assert greedy.tokens_bgr[row].tolist() == [padded, padded]
    assert greedy.length_bg.tolist() == [[n, n] for n in lengths]
    assert greedy.finished_bg.tolist() == [[answer[-1] == end] * 2 for answer in theirs]


@pytest.mark.parametrize("how", [{"top_k": 1}, {"top_p": 1e-6}])
def test_one_candidate_is_the_greedy_answer(draw, generated, greedy, how):
    found = draw(sampling=Sampling(2, LENGTH, (generated[0],), PAD, PROCESSOR.visual_ids, **how))
    np.testing.assert_array_equal(found.tokens_bgr, greedy.tokens_bgr)


def test_a_repetition_penalty_is_that_of_transformers(model, draw, greedy):
    """Of tokens of the prompt and of the answer, and on logits of either sign."""
    penalty = 1.3
    theirs = greedy_answers(model, None, repetition_penalty=penalty)
    how = Sampling(2, LENGTH, (), PAD, PROCESSOR.visual_ids, greedy=True, repetition_penalty=penalty)
    ours = draw(sampling=how)
    assert ours.tokens_bgr.tolist() == [[answer, answer] for answer in theirs]
    np.testing.assert_array_equal(draw(sampling=how, mesh="2x2x4").tokens_bgr, ours.tokens_bgr)
    free = draw(sampling=how._replace(repetition_penalty=1.0))
    assert (free.tokens_bgr != ours.tokens_bgr).any(axis=(1, 2)).sum() > 1, "it should change answers"
    assert len({len(prompt.tokens_p) for prompt in PROMPTS}) > 1, "padding should count for nothing"


# Draws.


@pytest.fixture(scope="module")
def drawn(draw) -> Rollout:
    # An end that comes now and then.
    return draw(change=favour((DRAWN.end_ids[0],), 3.0))


def test_log_probabilities_are_those_of_the_reference_pass(directory, drawn):
    """At temperature, banned tokens left out. Absolute."""
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims = load_hf(directory)
        policy = favour((DRAWN.end_ids[0],), 3.0)(policy)
        settings = LossConfig(GrpoConfig(), DRAWN.temperature, DRAWN.banned_ids, False, DRAWN.max_tokens)
        batch = PROCESSOR.batch(PROMPTS, multiple=48)
        fwd = ForwardConfig(dims, TRAIN, FLOAT32)
        expected = np.asarray(policy_logps(policy, batch, drawn.tokens_bgr, fwd=fwd, loss_config=settings))
    real = np.arange(LENGTH) < drawn.length_bg[..., None]
    np.testing.assert_allclose(drawn.logps_bgr[real], expected[real], atol=1e-5)
    assert (drawn.logps_bgr[~real] == 0).all()
    assert (drawn.logps_bgr[real] < 0).all()


def test_a_response_ends_with_its_first_end(drawn):
    assert 0 < drawn.finished_bg.sum() < drawn.finished_bg.size, "some should end and some not"
    for tokens, length, finished in zip(
        drawn.tokens_bgr.reshape(-1, LENGTH), drawn.length_bg.flat, drawn.finished_bg.flat, strict=True
    ):
        ends = np.flatnonzero(np.isin(tokens[:length], DRAWN.end_ids)).tolist()
        assert ends == ([length - 1] if finished else [])
        assert (tokens[length:] == PAD).all()
        assert finished or length == LENGTH


def test_the_key_and_the_row_decide_whatever_the_batch_and_the_mesh(draw, drawn):
    change = favour((DRAWN.end_ids[0],), 3.0)
    np.testing.assert_array_equal(draw(change=change, rows=2).tokens_bgr, drawn.tokens_bgr[:2])
    np.testing.assert_array_equal(draw(change=change, mesh="2x2x4").tokens_bgr, drawn.tokens_bgr)
    other = draw(change=change, key=1).tokens_bgr
    assert (other[..., 0] != drawn.tokens_bgr[..., 0]).mean() > 0.5
    rows = drawn.tokens_bgr.reshape(-1, LENGTH)
    assert len(np.unique(rows, axis=0)) == len(rows), "responses of a group differ"


def test_a_visual_token_is_never_drawn_however_likely(draw, model):
    """Their logits are blown up thirtyfold: nearly always one of them is the largest."""
    factor = np.where(np.isin(np.arange(512), DRAWN.banned_ids), 30, 1)
    likeliest = [(first_logits(model, row) * factor).argmax() for row in range(4)]
    assert np.isin(likeliest, DRAWN.banned_ids).sum() >= 3
    found = draw(change=favour(DRAWN.banned_ids, 30.0))
    assert not np.isin(found.tokens_bgr, DRAWN.banned_ids).any()
    assert np.isfinite(found.logps_bgr).all()


@pytest.mark.parametrize("how", [{}, {"top_k": 20, "top_p": 0.8}])
def test_frequencies_are_those_of_the_distribution(draw, model, how):
    """Chi-square of 4096 first tokens against softmax(logits / T) of transformers' logits; the seed is fixed."""
    count, temperature = 4096, 0.3
    sampling = Sampling(count, 1, DRAWN.end_ids, PAD, DRAWN.banned_ids, temperature, **how)
    tokens = draw(sampling=sampling).tokens_bgr[..., 0]

    def p_value(row: int, temperature: float) -> float:
        logits = first_logits(model, row) / temperature
        logits[list(DRAWN.banned_ids)] = -np.inf
        ordered = np.sort(np.exp(logits - logits.max()))[::-1][: how.get("top_k")]
        share = np.cumsum(ordered) / ordered.sum()
        least = ordered[np.searchsorted(share, how.get("top_p", 1.0) - 1e-9)]
        weights = np.exp(logits - logits.max())
        expected = count * np.where(weights >= least, weights, 0) / weights[weights >= least].sum()
        seen = np.bincount(tokens[row], minlength=512)
        assert (seen[expected == 0] == 0).all()
        common = expected >= 5
        rest = [[x[~common].sum()] if expected[~common].sum() > 0 else [] for x in (seen, expected)]
        return stats.chisquare(*(np.append(x[common], r) for x, r in zip((seen, expected), rest, strict=True))).pvalue

    for row in range(4):
        assert p_value(row, temperature) > 1e-3
        if not how:
            assert p_value(row, 0.4) < 1e-6, "another temperature should be told apart"


def test_the_loop_ends_when_all_have_ended(directory, monkeypatch):
    steps = []

    def counting(policy, batch, tokens, step, cache, fwd):
        jax.debug.callback(lambda step: steps.append(int(step)), step)
        return decode(policy, batch, tokens, step, cache, fwd)

    decode = rollout_module.decode
    monkeypatch.setattr(rollout_module, "decode", counting)
    few = {*DRAWN.end_ids, 17, 300}
    sampling = DRAWN._replace(max_tokens=50, banned_ids=tuple(sorted(set(range(512)) - few)))
    with jax.set_mesh(make_mesh("1x1")):
        policy, dims = load_hf(directory)
        fresh = jax.jit(sample.__wrapped__, static_argnames=("fwd", "sampling"))
        batch = PROCESSOR.batch(PROMPTS, multiple=48)
        found = fresh(policy, batch, jax.random.key(0), fwd=ForwardConfig(dims, ROLLOUT, FLOAT32), sampling=sampling)
        jax.effects_barrier()
    assert found.finished_bg.all()
    real = np.arange(50) < found.length_bg[..., None]
    assert (np.isin(found.tokens_bgr, DRAWN.end_ids) & real).sum(-1).max() == 1, "either of the ends is one"
    assert sorted(steps) == list(range(int(found.length_bg.max())))
    assert len(steps) < 50


def test_room_grows_with_the_responses(draw, monkeypatch):
    """Caches that are made longer on the way, once and again, hold what one of full length does."""
    assert [cache_lengths(limit) for limit in (64, 256, 300, 384, 1300, 2000)] == [
        *((64,), (256,), (300,), (256, 384)),
        *((256, 512, 1300), (256, 512, 1024, 2000)),
    ]
    whole = draw(sampling=DRAWN._replace(max_tokens=23))
    assert whole.length_bg.max() == 23, "all of the room should be needed"
    rooms = []

    def seeing(policy, batch, tokens, step, cache, fwd):
        rooms.append(cache.response.k.shape[3])
        return decode(policy, batch, tokens, step, cache, fwd)

    decode = rollout_module.decode
    monkeypatch.setattr(rollout_module, "decode", seeing)
    monkeypatch.setattr(rollout_module, "_FIRST_ROOM", 4)
    sample.clear_cache()
    for mesh in ("1x1", "4x4"):
        found = draw(sampling=DRAWN._replace(max_tokens=23), mesh=mesh)
        np.testing.assert_array_equal(found.tokens_bgr, whole.tokens_bgr)
        np.testing.assert_allclose(found.logps_bgr, whole.logps_bgr, atol=1e-5)
    assert sorted(set(rooms)) == [4, 8, 23]
    sample.clear_cache()


# Truncation.


@pytest.mark.parametrize(
    ("probabilities", "top_p", "top_k", "kept"),
    [
        ([0.4, 0.3, 0.2, 0.1], 0.5, 0, [0, 1]),  # the token that crosses stays
        ([0.1, 0.2, 0.3, 0.4], 0.5, 0, [2, 3]),
        ([0.4, 0.3, 0.2, 0.1], 0.35, 0, [0]),
        ([0.4, 0.3, 0.2, 0.1], 0.95, 0, [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], 1e-6, 0, [0]),
        ([0.5, 0.25, 0.125, 0.125], 0.5, 0, [0]),  # the first reaches it exactly
        ([0.4, 0.3, 0.2, 0.1], 1.0, 0, [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], 1.0, 2, [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], 1.0, 9, [0, 1, 2, 3]),
        ([0.3, 0.2, 0.3, 0.2], 1.0, 1, [0, 2]),  # ties stay
        ([0.3, 0.2, 0.3, 0.2], 1.0, 3, [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], 0.5, 3, [0, 1]),  # of the three: 0.444, 0.333, 0.222
        ([0.4, 0.3, 0.2, 0.1], 0.42, 3, [0]),
        ([3 / 13, 1 / 13, 2 / 13, 7 / 13], 1 - 1e-9, 3, [0, 2, 3]),  # the three sum to less than 1 in float32
    ],
)
def test_truncation_by_hand(probabilities, top_p, top_k, kept):
    logits = jnp.log(jnp.array(probabilities)) + 7
    found = np.asarray(truncate(logits[None, None], top_p, top_k))[0, 0]
    assert np.flatnonzero(found > -math.inf).tolist() == kept
    np.testing.assert_array_equal(found[kept], np.asarray(logits)[kept])
