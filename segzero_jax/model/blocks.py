"""Blocks stacked on a leading axis, one after another: as a loop, or written out."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def run_blocks(body: Callable[[jax.Array, T], jax.Array], x: jax.Array, blocks: T, written_out: bool) -> jax.Array:
    """``x`` through all blocks, each the input of the next.

    Args:
      body: of one block, ``(x, block) -> x``.
      blocks: every array with the blocks on its leading axis.
      written_out: the program holds every block by itself. A loop is quicker to compile, but what its turns keep for
        the backward pass goes into arrays for all turns: they are filled with zeros first, and where a compiler cannot
        have matrix products write there, as on GPUs, everything is copied once on its way in and once on its way out.
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


# Plain differentiation of an index would add up as many arrays of all blocks as there are blocks.
_unstack.defvjp(lambda stack: (_unstack(stack), None), lambda _, gradients: (jnp.stack(gradients),))
