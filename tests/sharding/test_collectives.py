"""The compiled update moves what the table of shardings intends and nothing else.

Every collective's arrays are looked up by shape: the tiny policy has 4 x 4 devices, 16 prompts of 48 tokens with 3
responses of 9, so 4 rows of 75 tokens on each device. That nothing but activations moves while sampling is in
``test_sixteen_devices.py``.
"""

from typing import Any

import jax
import numpy as np
import pytest
from test_sixteen_devices import BATCH, FLOAT32, LOSS, OPTIMIZER, PROCESSOR, place
from tiny import DIMS, prompts, random_policy

from segzero_jax.grpo import UpdateBatch, initial_state, update
from segzero_jax.mesh import FSDP, TRAIN, Layout, make_mesh
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.model.weights import abstract_policy
from segzero_jax.plan.cost import Program
from segzero_jax.types import Rollout

ROWS, PROMPT, GROUP, LENGTH, TENSOR, WIDTH_PARTS = 4, 48, 3, 9, 4, 4
TOKENS = PROMPT + GROUP * LENGTH
SLOTS = 32  # of two pictures, or one of two windows
Shape = tuple[int, ...]


def squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)


def weights() -> tuple[set[Shape], set[Shape]]:
    """Per device: weights gathered over fsdp, one layer of those that are stacked; and parameters that never move."""
    gathered, held = set(), set()
    with jax.set_mesh(make_mesh("4x4")):
        leaves = jax.tree_util.tree_flatten_with_path(abstract_policy(DIMS))[0]
    for path, leaf in leaves:
        stacked = "blocks" in [getattr(key, "name", None) for key in path]
        axes = list(zip(leaf.shape, [*leaf.sharding.spec, *[None] * leaf.ndim][: leaf.ndim], strict=True))[stacked:]
        shape = squeezed(tuple(size // (TENSOR if axis == "tensor" else 1) for size, axis in axes))
        (gathered if any(axis == "fsdp" for _, axis in axes) else held).add(shape)
    return gathered, held


def compiled_update(layout: Layout) -> Program:
    with jax.set_mesh(make_mesh("4x4")):
        batch = place(prompts(BATCH, PROCESSOR, multiple=PROMPT))
        assert batch.patches_bisc.shape[1:3] == (1, SLOTS)
        zeros = lambda *shape, dtype: place(np.zeros((BATCH, GROUP, *shape), dtype))  # noqa: E731
        rollout = Rollout(
            zeros(LENGTH, dtype=np.int32), zeros(dtype=np.int32), zeros(LENGTH, dtype=np.float32), zeros(dtype=bool)
        )
        rest: Any = (zeros(dtype=np.float32), zeros(dtype=bool), zeros(LENGTH, dtype=np.float32))
        lowered = update.lower(
            initial_state(random_policy(layout=layout), OPTIMIZER),
            UpdateBatch(batch, rollout, *rest),
            optimizer=OPTIMIZER,
            fwd=ForwardConfig(DIMS, layout, FLOAT32, remat=True),
            loss_config=LOSS,
            micro_batches=1,
        )
        return Program(lowered.compile().as_text())


@pytest.fixture(scope="module")
def program() -> Program:
    return compiled_update(TRAIN)


def moved(program: Program, *kinds: str) -> set[Shape]:
    return {squeezed(array.shape) for kind, one in program.collectives() if kind in kinds for array in one.arrays}


def test_what_is_gathered(program: Program) -> None:
    """Weights over fsdp where they are used, token ids for the lookup, and the gradient of repeated key-value heads."""
    gathered, _ = weights()
    ids = {(BATCH, PROMPT), (BATCH, GROUP, LENGTH)}
    repeated = {(ROWS, TOKENS, TENSOR, DIMS.head_width)}
    found = moved(program, "all-gather")
    assert found - gathered - ids - repeated == set()
    # The table of embeddings is the output head too here; only as that is it gathered.
    assert found >= gathered


def test_what_is_summed(program: Program) -> None:
    """Activations over tensor, gradients over fsdp, and sums per token or per batch."""
    gathered, held = weights()
    d, vision = DIMS.hidden, DIMS.vision
    activations = {
        (ROWS, TOKENS, d),  # after attention and MLP; in the backward pass, before them
        (ROWS, SLOTS, vision.hidden),  # the same in the vision tower
        (ROWS, SLOTS // vision.merge**2, d),  # after the merger
        (ROWS, SLOTS // vision.merge**2, vision.hidden * vision.merge**2),  # and before it, backwards
        (ROWS, GROUP, LENGTH, d),  # the head's inputs, backwards
        (BATCH, PROMPT, d // WIDTH_PARTS),  # looked up: each device has some of the vocabulary
        (BATCH, GROUP, LENGTH, d // WIDTH_PARTS),
    }
    per_token = {(ROWS * GROUP * LENGTH,), ()}
    # A gradient that is cut after its sum shows as the whole or as the part.
    parts = {squeezed(tuple(size // 4 if i == axis else size for i, size in enumerate(shape)))
             for shape in gathered for axis in range(len(shape))}  # fmt: skip
    assert moved(program, "all-reduce", "reduce-scatter") - activations - gathered - parts - held - per_token == set()


def test_what_changes_place(program: Program) -> None:
    """Embeddings that were looked up go to the device of their row, and their gradients come back."""
    d = DIMS.hidden
    looked_up = {(ROWS, PROMPT, d // WIDTH_PARTS), (ROWS, GROUP, LENGTH, d // WIDTH_PARTS)}
    assert moved(program, "all-to-all") <= looked_up


def test_a_layer_sums_activations_twice(program: Program) -> None:
    """Forward, a decoder block sums over tensor after attention and after the MLP, as Megatron's does."""
    names = [one.attribute(r'op_name="([^"]*)"') or "" for kind, one in program.collectives() if kind == "all-reduce"]
    forward = [name for name in names if "transpose" not in name and "rematted" not in name]
    assert len([name for name in forward if "btnh,nhd->btd" in name or "btf,fd->btd" in name]) == 2


def test_no_activation_of_a_block_moves_where_every_device_has_prompts() -> None:
    """In the FSDP layout: all of weights and their gradients, and what enters and leaves embedding table and head."""
    program, d = compiled_update(FSDP), DIMS.hidden
    names = [one.attribute(r'op_name="([^"]*)"') or "" for _, one in program.collectives()]
    assert [name for name in names if "btnh,nhd->btd" in name], "weights are gathered where they are used"
    blocks = {(rows, tokens) for rows in (BATCH // 16, ROWS) for tokens in (TOKENS, SLOTS)}
    shapes = [(kind, array.shape) for kind, one in program.collectives() for array in one.arrays]
    assert [(kind, shape) for kind, shape in shapes if shape[:2] in blocks and len(shape) > 2] == []
    # The head's inputs, for the four devices that each have a part of the vocabulary.
    assert (ROWS, GROUP, LENGTH, d) in {shape for _, shape in shapes}
