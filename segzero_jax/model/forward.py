"""The forward pass of a run: dtype, kernel and layout from its configuration and the mesh."""

import jax

from segzero_jax.config import ModelConfig
from segzero_jax.mesh import FSDP, ROLLOUT, TRAIN, Layout
from segzero_jax.model.attention import choose_kernel
from segzero_jax.model.dims import Dims
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.model.precision import use_compute_dtype


def training_layout(dims: Dims, mesh: jax.sharding.Mesh, micro_batch: int) -> Layout:
    """FSDP if every device gets an equal part of a micro-batch's prompts, and of every width; else TRAIN.

    Without a tensor axis both are the same, and called TRAIN.
    """
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    widths = (dims.hidden, dims.vision.hidden, dims.vision.out)
    even = micro_batch % mesh.size == 0 and all(width % parts == 0 for width in widths)
    return FSDP if even and mesh.shape["tensor"] > 1 else TRAIN


def forward_config(dims: Dims, layout: Layout, config: ModelConfig) -> ForwardConfig:
    """The pass in one layout under the ambient mesh; blocks are rematerialised except in ``ROLLOUT``, for gradients."""
    dtype = use_compute_dtype(config.compute_dtype)
    kernel = choose_kernel(jax.sharding.get_mesh(), dtype)
    remat = config.remat and layout is not ROLLOUT
    return ForwardConfig(dims, layout, dtype, remat=remat, kernel=kernel, one_loop=config.remat)
