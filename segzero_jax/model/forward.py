"""The forward pass of a run: dtype, kernel and layout from its configuration and the mesh."""

import jax

from segzero_jax.config import ModelConfig
from segzero_jax.mesh import TRAIN, Layout
from segzero_jax.model.attention import choose_kernel
from segzero_jax.model.dims import Dims
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.model.precision import use_compute_dtype


def forward_config(dims: Dims, layout: Layout, config: ModelConfig) -> ForwardConfig:
    """The pass in one layout under the ambient mesh; blocks are rematerialised only in ``TRAIN``, for gradients."""
    dtype = use_compute_dtype(config.compute_dtype)
    kernel = choose_kernel(jax.sharding.get_mesh(), dtype)
    remat = config.remat and layout is TRAIN
    return ForwardConfig(dims, layout, dtype, remat=remat, kernel=kernel, one_loop=config.remat)
