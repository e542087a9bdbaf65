"""Runs blocks stacked on a leading axis, as a loop or unrolled."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def run_blocks(body: Callable[[jax.Array, T], jax.Array], x: jax.Array, blocks: T, written_out: bool) -> jax.Array:
    """Runs ``x`` through all blocks in turn.

    Args:
      body: one block, ``(x, block) -> x``.
      blocks: arrays with the blocks on their leading axis.
      written_out: unroll the blocks. A loop compiles faster, but its residuals for the backward pass go into arrays
        over all iterations. These are zeroed first, and where the compiler cannot let matrix products write into them,
        as on GPUs, every residual is copied once on the way in and once on the way out.
    """
    if not written_out:
        return jax.lax.scan(lambda x, block: (body(x, block), None), x, blocks)[0]
    stacks, structure = jax.tree.flatten(blocks)
    for block in zip(*map(_unstack, stacks), strict=True):
        x = body(x, jax.tree.unflatten(structure, block))
    return x


@jax.custom_vjp
def _unstack(stack: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(stack[index] for index in range(stack.shape[0]))


# Plain differentiation of indexing would sum one array of the full stack's size per block.
_unstack.defvjp(lambda stack: (_unstack(stack), None), lambda _, gradients: (jnp.stack(gradients),))
