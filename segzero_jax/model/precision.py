"""The dtype that a policy computes in, and what its products of matrices make of it."""

import jax
import jax.numpy as jnp


def compute_dtype(name: str) -> jnp.dtype:
    """``model.compute_dtype`` as a dtype; where that is float32, this process multiplies it as float32 from here on.

    By default JAX rounds both sides of a float32 product to bfloat16 on TPUs, and to TF32 on GPUs. Programs that were
    traced before the call keep the precision of then.
    """
    dtype = jnp.dtype(name)
    if dtype == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    return dtype
