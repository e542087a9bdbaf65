"""The compute dtype of a policy, and the matching precision of matrix products."""

import jax
import jax.numpy as jnp


def use_compute_dtype(name: str) -> jnp.dtype:
    """``model.compute_dtype`` as a dtype; if it is float32, enables full-precision matrix products in this process.

    By default JAX rounds both operands of a float32 product to bfloat16 on TPUs, and to TF32 on GPUs. Programs traced
    before the call keep their precision.
    """
    dtype = jnp.dtype(name)
    if dtype == jnp.float32:
        jax.config.update("jax_default_matmul_precision", "highest")
    return dtype
