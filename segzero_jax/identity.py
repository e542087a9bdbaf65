"""The inputs that a run's numbers depend on besides its configuration: initial weights, SAM 2's, the questions."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_SPREAD = 2654435761  # Knuth's multiplicative hash: neighbouring positions get dissimilar weights


class Identity(NamedTuple):
    """Saved with every checkpoint; a resumed run must have the same, wherever its files are by then.

    Attributes:
      reference: fingerprint of the policy that the run starts from, which is also its reference, see ``fingerprint``.
      sam2: SHA-256 of the SAM 2 checkpoint that scores, as its server reports it; None without a server.
      functions: SHA-256 of each custom reward function's file, by its name; a run resumes with other files and reports
        it.
      data: checksum of each training or evaluation split, by its name; None in older checkpoints, which resume with
        any.
      sam2_dtype: name of SAM 2's compute dtype; None without a server, and in older checkpoints, which resume with any.
    """

    reference: str
    sam2: str | None
    data: Mapping[str, str] | None = None
    functions: Mapping[str, str] | None = None
    sam2_dtype: str | None = None


def fingerprint(weights: Any, dtype: jnp.dtype) -> str:
    """Sixteen hexadecimal digits that depend on every bit of every weight as ``dtype``, its name, and the dtype.

    Computed where the weights are, in one pass without a copy; the same on every mesh.
    """
    sums = jax.device_get(_sums(weights, dtype))
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    digest = hashlib.sha256()
    for (path, leaf), total in zip(leaves, jax.tree.leaves(sums), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {dtype} {leaf.shape} {int(total)}\n".encode())
    return digest.hexdigest()[:16]


@partial(jax.jit, static_argnames="dtype")
def _sums(tree: Any, dtype: jnp.dtype) -> Any:
    return jax.tree.map(lambda x: _weighted_sum(x.astype(dtype)), tree)


def _weighted_sum(x: jax.Array) -> jax.Array:
    """The sum of each number's bits times an odd weight of its position, modulo 2^32: any single change alters it."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        place = place + index * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(bits * (place * jnp.uint32(_SPREAD) | jnp.uint32(1)), dtype=jnp.uint32)
