from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DIMS, hf_config, load_processor, prompts, random_policy

from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.blocks import run_blocks
from segzero_jax.model.dims import from_hf
from segzero_jax.model.policy import ForwardConfig, group_hidden
from segzero_jax.model.vision import encode_images
from segzero_jax.model.weights import abstract_policy

BLOCKS, ROWS, WIDTH = 5, 8, 16


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
def test_written_out_or_not_a_block_follows_the_other(mesh: str) -> None:
    """Values and gradients, of what goes in and of every block, are those of a loop in Python."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, WIDTH), np.float32)
    stacks = {
        "w": rng.standard_normal((BLOCKS, WIDTH, WIDTH), np.float32) / 4,
        "b": np.ones((BLOCKS, WIDTH), np.float32),
    }

    def body(x: jax.Array, block: dict[str, jax.Array]) -> jax.Array:
        rows = TRAIN.spec("batch", None)
        return jnp.tanh(jnp.einsum("bd,df->bf", x, block["w"], out_sharding=rows) + block["b"])

    def loss(x: jax.Array, stacks: dict[str, jax.Array], written_out: bool) -> jax.Array:
        return (run_blocks(body, x, stacks, written_out) ** 2).sum()

    def by_hand(x: jax.Array, stacks: dict[str, jax.Array]) -> jax.Array:
        for i in range(BLOCKS):
            x = jnp.tanh(x @ stacks["w"][i] + stacks["b"][i])
        return (x**2).sum()

    expected = jax.value_and_grad(by_hand, argnums=(0, 1))(x, stacks)
    with jax.set_mesh(make_mesh(mesh)):
        placed_x = jax.device_put(x, TRAIN.spec("batch", None))
        specs = {"w": TRAIN.spec(None, "embed", "mlp"), "b": TRAIN.spec(None, None)}
        placed = {name: jax.device_put(stack, specs[name]) for name, stack in stacks.items()}
        for written_out in (False, True):
            run = jax.jit(jax.value_and_grad(partial(loss, written_out=written_out), argnums=(0, 1)))
            found = run(placed_x, placed)
            assert {name: a.sharding.spec for name, a in found[1][1].items()} == specs
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), jax.device_get(found), expected)


def test_blocks_written_out_are_no_loop_and_their_gradients_are_not_added_up() -> None:
    def loss(x: jax.Array, stack: jax.Array) -> jax.Array:
        return run_blocks(lambda x, w: x @ w, x, stack, True).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=1))(jnp.ones((ROWS, WIDTH)), jnp.ones((BLOCKS, WIDTH, WIDTH))))
    assert "scan" not in program
    assert "while" not in program
    assert f"f32[{BLOCKS},{WIDTH},{WIDTH}] = add" not in program
    assert "pad" not in program


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
def test_a_tower_in_one_loop_or_in_several_is_the_same(mesh: str) -> None:
    """Two strides of two windowed blocks and a whole one: embeddings, and gradients of every weight."""
    config = hf_config()
    config["vision_config"] |= {"depth": 6, "fullatt_block_indexes": [2, 5]}
    dims, processor = from_hf(config), load_processor()
    results = []
    with jax.set_mesh(make_mesh(mesh)):
        policy = random_policy(dims)
        put = lambda x: jax.device_put(x, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
        batch = prompts(4, processor)
        patches, places, valid = (
            put(a[:, 0]) for a in (batch.patches_bisc, batch.patch_hw_bis2, batch.patch_valid_bis)
        )
        # Empty slots hold what nobody reads, and a prompt without a picture has nothing else.
        real = put(batch.patch_valid_bis[:, 0, :: dims.vision.merge**2])

        def loss(tower, one_loop):
            out = encode_images(
                tower, dims.vision, TRAIN, patches, places, valid,
                dtype=jnp.dtype("float32"), kernel="xla", remat=one_loop, one_loop=one_loop, written_out=False,
            )  # fmt: skip
            return (jnp.where(real[..., None], out, 0) ** 2).sum()

        for one_loop in (False, True):
            run = jax.jit(jax.value_and_grad(partial(loss, one_loop=one_loop)))
            results.append(jax.device_get(run(policy.vision)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()


@pytest.mark.parametrize("remat", [True, False])
def test_what_blocks_keep_for_the_backward_pass(remat: bool) -> None:
    """With recomputation what goes into each; without, both halves' input and the MLP's two sides: no norm, no gate."""
    fwd, batch = ForwardConfig(DIMS, TRAIN, jnp.dtype("bfloat16"), remat), prompts(4, load_processor())
    tokens = np.zeros((4, 2, 8), np.int32)
    with jax.set_mesh(make_mesh("1x1")):
        states = lambda policy: group_hidden(policy, batch, tokens, fwd)  # noqa: E731
        kept = jax.eval_shape(lambda policy: jax.vjp(states, policy)[1], abstract_policy(DIMS))

    def copies(length: int) -> Counter[int]:
        """Of activations of so many tokens in every layer: how many there are of each width."""
        found: Counter[int] = Counter()
        for leaf in jax.tree.leaves(kept):
            if leaf.dtype == "bfloat16" and leaf.shape[-3:-1] == (4, length):
                found[leaf.shape[-1]] += leaf.size // (4 * length * leaf.shape[-1])
        return found

    vision, slots = DIMS.vision, batch.patches_bisc.shape[2]
    decoder, tower = copies(batch.tokens_bp.shape[1] + 2 * 8), copies(slots) - Counter({vision.patch_width: 1})
    for found, dims, depth in ((decoder, DIMS, DIMS.layers), (tower, vision, vision.depth)):
        assert found == ({dims.hidden: depth} if remat else {dims.hidden: 2 * depth, dims.mlp: 2 * depth})
