"""A batch that several hosts have read parts of."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from thread_pod import on_hosts

from segzero_jax.job import Job, answer
from segzero_jax.mesh import TRAIN, Rows, make_mesh
from segzero_jax.pods import Pod
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask

EXAMPLES = [
    Example(
        f"e{n}", b"\x89PNG\xff" + bytes([n]), Frame(3, 2), f"où est {n}?", (ObjectPrompt((0.1, 1 / 3, 2.0, 1e-7), ()),),
        RleMask(2, 3, "1`\\"),
    )
    for n in range(8)
]  # fmt: skip


def test_hosts_put_together_what_each_has_read() -> None:
    """Two pairs of hosts hold the same rows; a picture is known where it was read, the first one everywhere."""
    shares = [
        Rows([0, 1, 2, 3], [0, 2]),
        Rows([0, 1, 2, 3], [1, 3]),
        Rows([4, 5, 6, 7], [4, 6]),
        Rows([4, 5, 6, 7], [5, 7]),
    ]

    def share(pod: Pod) -> list[Example]:
        rows = shares[pod.index]
        job = cast(Job, SimpleNamespace(pod=pod, rows=rows))
        return Job.share(job, [EXAMPLES[row] for row in rows.held])

    for rows, end in zip(shares, on_hosts(4, share), strict=True):
        whole = end.result()
        assert [example.id for example in whole] == [example.id for example in EXAMPLES]
        for row, (found, expected) in enumerate(zip(whole, EXAMPLES, strict=True)):
            known = row in rows.held or row == 0
            assert found.image == (expected.image if known else b"")
            assert (found.question, found.objects, found.mask) == (expected.question, expected.objects, expected.mask)


@pytest.mark.parametrize("mesh", ["4x4", "2x2x4", "8x1"])
def test_rows_lie_where_the_mesh_wants_them(mesh: str) -> None:
    grid = make_mesh(mesh)
    job: Any = SimpleNamespace(mesh=grid, config=SimpleNamespace(train=SimpleNamespace(batch_size=8)))
    whole = np.arange(16.0).reshape(8, 2)
    with jax.set_mesh(grid):
        placed = Job.place(job, whole, range(8))
    np.testing.assert_array_equal(placed, whole)
    assert placed.sharding.spec == TRAIN.spec("batch", None)


def test_every_batch_of_an_evaluation_draws_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[jax.Array] = []
    monkeypatch.setattr("segzero_jax.job.sample", lambda weights, prompts, key, **_: keys.append(key))
    config = SimpleNamespace(seed=0, train=SimpleNamespace(batch_size=3), eval=SimpleNamespace(samples=1))
    said = SimpleNamespace(length_bg=np.array([[1], [2], [3]]), finished_bg=np.array([[True], [False], [True]]))
    job: Any = Mock(config=config, rows=Rows([0, 1, 2], [0, 1, 2]), fetch=lambda _: said)
    job.texts = lambda _: [["a"], ["b"], ["c"]]
    texts, lengths = answer(job, Mock(), EXAMPLES, greedy=False, before_batch=lambda: None)
    assert "".join(text for (text,) in texts) == "abcabcab"
    # A short last batch is filled up with rows that nobody has asked for.
    assert lengths.length_bg.tolist() == [[1], [2], [3]] * 2 + [[1], [2]]
    assert lengths.finished_bg.tolist() == [[True], [False], [True]] * 2 + [[True], [False]]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3
