"""Low-rank adapters, LoRA (Hu et al., arXiv 2106.09685), which are trained instead of the decoder's matrices.

A matrix ``W`` of a block becomes ``W + alpha / rank · down · up``, where ``down`` has ``rank`` columns and ``up``
``rank`` rows. The initial policy is frozen, in the dtype of activations, and also serves as the reference policy; it
has no master weights or optimizer moments. All seven matrices of every decoder block are adapted; embeddings, head,
norms, biases and the vision tower are not.
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

# The adapted matrices: letters of their input and output axes.
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
    """Adapter of one matrix in all layers: ``down`` ``[layer, *inputs, rank]``, ``up`` ``[layer, rank, *outputs]``."""

    def __init__(self, weight: jax.ShapeDtypeStruct, inputs: int, rank: int, key: jax.Array):
        """Starts without effect: ``up`` is 0. ``down`` is drawn as in PEFT, uniformly within ±1 / sqrt(inputs)."""
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
    """Float32 adapters of all decoder blocks, each under the name of its matrix; used strictly as a pytree."""

    def __init__(self, dims: Dims, layout: Layout, rank: int, key: jax.Array):
        blocks = abstract_policy(dims, layout).blocks
        keys = jax.random.split(key, len(MATRICES))
        for own_key, (name, (inputs, _)) in zip(keys, MATRICES.items(), strict=True):
            (weight,) = jax.tree.leaves(getattr(blocks, name))
            setattr(self, name, Adapter(weight, len(inputs), rank, own_key))


def abstract_adapters(dims: Dims, rank: int, layout: Layout = TRAIN) -> Adapters:
    """Shapes and shardings of adapters under the ambient mesh, without values."""
    return jax.eval_shape(lambda: Adapters(dims, layout, rank, jax.random.key(0)))


def abstract_params(dims: Dims, rank: int, layout: Layout = TRAIN) -> Policy | Adapters:
    """The trainable parameters as abstract values: adapters if ``rank`` is not 0, else all weights."""
    return abstract_adapters(dims, rank, layout) if rank else abstract_policy(dims, layout)


def abstract_adapted(dims: Dims, rank: int, layout: Layout = TRAIN) -> Policy:
    """``abstract_policy``, with adapters if ``rank`` is not 0."""
    policy = abstract_policy(dims, layout)
    return adapt(policy, abstract_adapters(dims, rank, layout)) if rank else policy


def adapt(policy: Policy, adapters: Adapters, scale: float | None = None) -> Policy:
    """The policy with adapters on its matrices; modifies neither.

    Args:
      policy: a policy without adapters.
      adapters: adapters in the same layout.
      scale: ``alpha / rank``; None if it is already folded into ``up``.
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
    """Merges the adapters into the matrices, in float32, then rounds to the matrices' dtype.

    Everything else (everything if there are no adapters) is shared with ``policy``: a float32 copy of a 7B is 33 GB.
    """
    merged = jax.tree.map(lambda x: x, policy)
    adapters, merged.blocks.adapters = merged.blocks.adapters, None
    for name in MATRICES if adapters is not None else ():
        weight, adapter = getattr(merged.blocks, name)[...], getattr(adapters, name)
        added = _merged(weight, adapter.down[...], adapter.up[...], _subscripts(name))
        setattr(merged.blocks, name, nnx.Param(added))
    return merged


def lost_to_rounding(policy: Policy, dtype: jnp.dtype) -> float:
    """The change from rounding the merged matrices to ``dtype`` over the adapters' change (norms over all matrices).

    About 1 means that rounding undoes the training. 0 if the adapters change nothing.
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
    # The compiler would drop a cast whose result is cast back.
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
