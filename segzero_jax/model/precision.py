"""The dtype that a policy computes in, and the precision of matrix products that goes with it."""

import jax
import jax.numpy as jnp


def use_compute_dtype(name: str) -> jnp.dtype:
    """``model.compute_dtype`` as a dtype; where that is float32, products of this process are exact from here on.

    By default JAX rounds both sides of a float32 product to bfloat16 on TPUs, and to TF32 on GPUs. Programs that were
    traced before the call keep the precision of then.
    """
    dtype = jnp.dtype(name)
    if dtype == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    return dtype
