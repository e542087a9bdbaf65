"""Low-rank adapters, LoRA (Hu et al., arXiv 2106.09685): what learns in the place of the decoder's matrices.

A matrix ``W`` of a block becomes ``W + alpha / rank · down · up``, ``down`` with ``rank`` columns and ``up`` with as
many rows. The policy that a run starts from stays as it is, in the dtype of activations, and is the reference policy
too: neither master weights nor moments of it exist. All seven matrices of every decoder block are adapted; embeddings,
head, norms, biases and the vision tower are not.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from segzero_jax.mesh import TRAIN, Layout
from segzero_jax.model.dims import Dims
from segzero_jax.model.layers import constant_param
from segzero_jax.model.policy import Policy
from segzero_jax.model.weights import abstract_policy

# The adapted matrices: letters of their input axes, and of their output axes.
MATRICES = {
    "q_dnh": ("d", "nh"),
    "k_dkh": ("d", "kh"),
    "v_dkh": ("d", "kh"),
    "o_nhd": ("nh", "d"),
    "gate_df": ("d", "f"),
    "up_df": ("d", "f"),
    "down_fd": ("f", "d"),
}


class Adapter(nnx.Module):
    """Of one matrix in all layers: ``down`` is ``[layer, *inputs, rank]``, ``up`` ``[layer, rank, *outputs]``."""

    def __init__(self, weight: jax.ShapeDtypeStruct, inputs: int, rank: int, key: jax.Array):
        """Changes nothing yet: ``up`` is 0. ``down`` is drawn as PEFT draws it, uniformly within 1 / sqrt(inputs)."""
        layers, *shape = weight.shape
        assert weight.sharding is not None
        _, *spec = weight.sharding.spec
        bound = 1 / math.sqrt(math.prod(shape[:inputs]))
        down_spec = PartitionSpec(None, *spec[:inputs], None)
        drawn = jax.random.uniform(
            key, (layers, *shape[:inputs], rank), jnp.float32, -bound, bound, out_sharding=down_spec
        )
        self.down = nnx.Param(drawn)
        self.up = constant_param(0.0, (layers, rank, *shape[inputs:]), PartitionSpec(None, None, *spec[inputs:]))


class Adapters(nnx.Module):
    """Float32 adapters of all decoder blocks, each under the name of its matrix. Used strictly as a pytree."""

    def __init__(self, dims: Dims, layout: Layout, rank: int, key: jax.Array):
        blocks = abstract_policy(dims, layout).blocks
        keys = jax.random.split(key, len(MATRICES))
        for own_key, (name, (inputs, _)) in zip(keys, MATRICES.items(), strict=True):
            (weight,) = jax.tree.leaves(getattr(blocks, name))
            setattr(self, name, Adapter(weight, len(inputs), rank, own_key))


def abstract_adapters(dims: Dims, rank: int, layout: Layout = TRAIN) -> Adapters:
    """Shapes and shardings of adapters under the ambient mesh, without their numbers."""
    return jax.eval_shape(lambda: Adapters(dims, layout, rank, jax.random.key(0)))


def abstract_params(dims: Dims, rank: int) -> Policy | Adapters:
    """What learns, in abstract values: adapters where there is a rank, else all weights."""
    return abstract_adapters(dims, rank) if rank else abstract_policy(dims)


def abstract_adapted(dims: Dims, rank: int, layout: Layout = TRAIN) -> Policy:
    """As ``abstract_policy``, with adapters where there is a rank."""
    policy = abstract_policy(dims, layout)
    return adapt(policy, abstract_adapters(dims, rank, layout)) if rank else policy


def adapt(policy: Policy, adapters: Adapters, scale: float | None = None) -> Policy:
    """The policy with adapters on its matrices; both stay as they are.

    Args:
      policy: without any.
      adapters: in the same layout.
      scale: ``alpha / rank``; None where ``up`` has it in it.
    """
    adapted = jax.tree.map(lambda x: x, policy)
    own = jax.tree.map(lambda x: x, adapters)
    if scale is not None:
        for name in MATRICES:
            adapter = getattr(own, name)
            adapter.up = nnx.Param(adapter.up[...] * scale)
    adapted.blocks.adapters = own
    return adapted


def merge(policy: Policy) -> Policy:
    """The same policy without adapters: they are added to its matrices, in float32, then rounded to their dtype.

    All else, without adapters everything, is shared with ``policy``: a copy of a 7B in float32 is 33 GB.
    """
    merged = jax.tree.map(lambda x: x, policy)
    adapters, merged.blocks.adapters = merged.blocks.adapters, None
    for name in MATRICES if adapters is not None else ():
        weight, adapter = getattr(merged.blocks, name)[...], getattr(adapters, name)
        added = _merged(weight, adapter.down[...], adapter.up[...], _subscripts(name))
        setattr(merged.blocks, name, nnx.Param(added))
    return merged


def lost_to_rounding(policy: Policy, dtype: jnp.dtype) -> float:
    """How far rounding the merged matrices to ``dtype`` moves them, over how far the adapters do (norms, all matrices).

    About 1 means that nothing is left of what was learnt. 0 where nothing was.
    """
    rounding = change = 0.0
    for name in MATRICES:
        weight, adapter = getattr(policy.blocks, name)[...], getattr(policy.blocks.adapters, name)
        squares = _squares(weight, adapter.down[...], adapter.up[...], _subscripts(name), dtype)
        rounding, change = rounding + float(squares[0]), change + float(squares[1])
    return math.sqrt(rounding / change) if change else 0.0


def _subscripts(name: str) -> str:
    inputs, outputs = MATRICES[name]
    return f"l{inputs}r,lr{outputs}->l{inputs}{outputs}"


@partial(jax.jit, static_argnames=("subscripts", "dtype"))
def _squares(
    weight: jax.Array, down: jax.Array, up: jax.Array, subscripts: str, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    change = _change(weight, down, up, subscripts)
    merged = weight.astype(jnp.float32) + change
    # The compiler would leave out a rounding whose result is widened again.
    rounded = jax.lax.reduce_precision(merged, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
    return jnp.sum((rounded - merged) ** 2), jnp.sum(change**2)


@partial(jax.jit, static_argnames="subscripts")
def _merged(weight: jax.Array, down: jax.Array, up: jax.Array, subscripts: str) -> jax.Array:
    return (weight.astype(jnp.float32) + _change(weight, down, up, subscripts)).astype(weight.dtype)


def _change(weight: jax.Array, down: jax.Array, up: jax.Array, subscripts: str) -> jax.Array:
    return jnp.einsum(
        subscripts,
        down.astype(jnp.float32),
        up.astype(jnp.float32),
        precision="highest",
        out_sharding=jax.typeof(weight).sharding.spec,
    )
