"""Which groups a step learns from when it samples on, and that they are put together as they were sampled."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax import dynamic_sampling
from segzero_jax.dynamic_sampling import DeviceBatch, SampledBatch, enough, gather, select, select_all
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.record import record_step, sampling_metrics, why_no_update
from segzero_jax.scoring import Scored
from segzero_jax.types import PromptBatch, Rollout

GROUP, LONGEST, PAD = 3, 6, 9


def draw(teaches: list[bool], first: int = 0) -> SampledBatch:
    """Groups numbered from ``first``: where one teaches, its second response has its number plus one for an advantage,
    and its last one is no part of the loss."""
    size = len(teaches)
    numbers = np.arange(first, first + size)
    advantages_bg = np.zeros((size, GROUP), np.float32)
    advantages_bg[:, 1] = np.where(teaches, numbers + 1, 0)
    keep_bg = np.ones((size, GROUP), bool)
    keep_bg[:, 2] = False
    rollout = Rollout(
        np.repeat(numbers, GROUP * LONGEST).reshape(size, GROUP, LONGEST),
        np.full((size, GROUP), LONGEST),
        np.zeros((size, GROUP, LONGEST)),
        np.ones((size, GROUP), bool),
    )
    scored = Scored(np.repeat(numbers * 1.0, GROUP).reshape(size, GROUP), [[{}] * GROUP for _ in numbers], None)
    examples = [f"question {number}" for number in numbers]
    return SampledBatch(
        examples, [[example] * GROUP for example in examples], rollout, scored, advantages_bg, keep_bg, size
    )


@given(st.integers(1, 6).flatmap(lambda b: st.lists(st.lists(st.booleans(), min_size=b, max_size=b), min_size=1)))
def test_what_teaches_is_learnt_from_and_what_was_sampled_first_comes_first(teaches: list[list[bool]]) -> None:
    size = len(teaches[0])
    draws = [draw(row, first=size * n) for n, row in enumerate(teaches)]
    found = select(draws)
    wanted = np.flatnonzero(np.ravel(teaches))[:size]
    assert np.flatnonzero(found.used).tolist() == wanted.tolist()
    assert enough(draws) == (len(wanted) == size)
    taught = found.keep_bg.any(axis=1)
    assert sorted(found.rows_b[taught]) == wanted.tolist()
    assert found.advantages_bg[taught, 1].tolist() == (found.rows_b[taught] + 1).tolist()
    assert not found.advantages_bg[~taught].any(), "what fills up teaches nothing"
    assert (found.keep_bg[taught] == [True, True, False]).all(), "what is no part of the loss stays none"
    kept = found.rows_b < size
    assert (found.rows_b[kept] == np.flatnonzero(kept)).all(), "a group of the first batch keeps its row"


def test_a_group_teaches_by_what_was_worse_than_the_rest_too() -> None:
    """Its better responses may have been cut off, and are no part of the loss."""
    better = draw([True, False])
    worse = better._replace(advantages_bg=-better.advantages_bg)
    assert select([worse]).used.tolist() == select([better]).used.tolist() == [True, False]


def test_a_batch_as_it_was_sampled_is_learnt_from_whole() -> None:
    one = draw([True, False, True])
    found = select_all(one)
    assert (found.rows_b.tolist(), found.used.tolist()) == ([0, 1, 2], [True] * 3)
    assert found.keep_bg is one.keep_bg
    assert found.advantages_bg is one.advantages_bg


def test_a_step_tells_of_all_that_was_sampled_for_it() -> None:
    draws = [draw([True, False]), draw([False, False], first=2), draw([True, True], first=4)]
    found = select(draws)
    made = record_step(7, draws, found)
    assert made.examples == [f"question {n}" for n in range(6)]
    assert [texts[0] for texts in made.texts] == made.examples
    assert made.rollout.tokens_bgr[:, 0, 0].tolist() == made.scored.rewards_bg[:, 0].tolist() == list(range(6))
    # The last group was one too many.
    assert made.advantages_bg[:, 1].tolist() == [1, 0, 0, 0, 5, 0]
    assert sampling_metrics(draws, found) == {"dynamic_sampling/batches": 3, "dynamic_sampling/groups": 2}


def test_why_nothing_was_learnt_is_said_in_a_line() -> None:
    flat, nothing = draw([False]), draw([False])._replace(keep_bg=np.zeros((1, GROUP), bool))
    spread = flat._replace(scored=replace(flat.scored, rewards_bg=np.array([[1.0, 2.0, 1.0]])))
    unscored = flat._replace(scored=replace(flat.scored, rewards_bg=np.full((1, GROUP), np.nan)))
    for draws, why in (
        ([flat, nothing], "no group has any spread of rewards"),
        ([nothing, nothing], "all scored responses were cut off"),
        ([spread, flat], "all groups with a spread of rewards were cut off"),
    ):
        assert why_no_update(draws) == f"this step makes no update, {why}"
    assert why_no_update([unscored, unscored]) == ""


@cache
def groups(size: int, p: int, r: int, seed: int, parts: bool) -> DeviceBatch:
    rng = np.random.default_rng(seed)
    numbers = lambda *shape: rng.integers(0, 8, shape, dtype=np.int32)  # noqa: E731
    real = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    i = 0 if parts else 1  # pictures that are embedded already have no patches
    prompts = PromptBatch(
        *(numbers(size, p), numbers(size), numbers(size, 3, p), numbers(size), numbers(size, p)),
        # As pictures do, the patches divide into pieces.
        *(real(size, i, 4, 8), numbers(size, i, 4, 2), numbers(size, i, 4) > 3, real(size, 2, 3) if parts else None),
    )
    rollout = Rollout(numbers(size, GROUP, r), numbers(size, GROUP), real(size, GROUP, r), numbers(size, GROUP) > 3)
    return DeviceBatch(prompts, rollout, real(size, GROUP, r), real(size, GROUP, r) if parts else None)


def longer(x: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=value)


@pytest.mark.parametrize("mesh", ["1x1", "4x4", "2x4x2", "4x1x1", "2x1x1"])
@pytest.mark.parametrize("parts", [False, True])
def test_groups_of_several_batches_are_one_batch_in_its_shards(mesh: str, parts: bool) -> None:
    given = [groups(8, p, r, seed, parts) for seed, (p, r) in enumerate([(4, 5), (6, 3), (4, 5)])]
    rows = np.array([0, 9, 2, 23, 4, 15, 16, 7], np.int32)
    with jax.set_mesh(make_mesh(mesh)) as _:
        around = jax.sharding.get_mesh()
        placed = [
            jax.tree.map(
                lambda x: jax.device_put(
                    x, jax.sharding.NamedSharding(around, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))
                ),
                batch,
            )
            for batch in given
        ]
        found = gather(placed, rows, PAD)
        assert gather(placed[:1], np.arange(8), PAD) is placed[0]
        for x, like in zip(jax.tree.leaves(found), jax.tree.leaves(placed[0]), strict=True):
            assert x.sharding.spec == like.sharding.spec
            assert x.dtype == like.dtype
    pads = {
        "tokens_bp": (6, PAD),
        "positions_b3p": (6, 0),
        "image_index_bp": (6, -1),
        "tokens_bgr": (5, PAD),
        "logps_bgr": (5, 0),
        "ref_logps_bgr": (5, 0),
        "old_logps_bgr": (5, 0),
    }
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        name = path[-1].name
        columns = [np.asarray(jax.tree_util.tree_leaves_with_path(batch)[index_of(batch, path)][1]) for batch in given]
        expected = np.concatenate([longer(column, *pads[name]) if name in pads else column for column in columns])
        np.testing.assert_array_equal(np.asarray(jnp.asarray(x)), expected[rows], err_msg=name)


@pytest.mark.parametrize("mesh", ["16x1", "4x4"])
def test_no_device_holds_a_whole_batch_of_pictures(mesh: str) -> None:
    """Sixteen prompts of 840 x 840 pixels, in what XLA makes of it."""
    with jax.set_mesh(make_mesh(mesh)):
        around = jax.sharding.get_mesh()

        def like(x: np.ndarray) -> jax.ShapeDtypeStruct:
            shape = (16, 1, 3600, 1176) if x.shape[-1] == 8 and x.ndim == 4 else (16, *x.shape[1:])
            spec = TRAIN.spec("batch", *(None,) * (x.ndim - 1))
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=jax.sharding.NamedSharding(around, spec))

        given = tuple(jax.tree.map(like, groups(8, 4, 5, seed, False)) for seed in range(3))
        pictures = given[0].prompts.patches_bisc
        assert pictures.shape == (16, 1, 3600, 1176)
        compiled = dynamic_sampling._take.lower(given, jax.ShapeDtypeStruct((16,), np.int32)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * pictures.size * 4


def index_of(tree: DeviceBatch, path: tuple) -> int:
    return [found for found, _ in jax.tree_util.tree_leaves_with_path(tree)].index(path)
