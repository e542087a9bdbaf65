"""Loads a policy for inference, from a Hugging Face checkpoint or from a run's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax

from segzero_jax.checkpoint import Checkpoints
from segzero_jax.checkpoint_paths import locate, parsing
from segzero_jax.config import Config
from segzero_jax.hub import is_checkpoint
from segzero_jax.identity import fingerprint
from segzero_jax.model.dims import Dims
from segzero_jax.model.lora import Adapters, abstract_adapters, adapt
from segzero_jax.model.policy import Policy
from segzero_jax.model.precision import use_compute_dtype
from segzero_jax.model.weights import (
    ADAPTER_CONFIG,
    ALONE,
    CheckpointError,
    abstract_policy,
    check_fits,
    load_hf,
    read_dims,
)

T = TypeVar("T")


def load_policy(path: str | Path, dtype: Any) -> tuple[Policy, Dims, Config | None]:
    """Weights for inference: a Hugging Face checkpoint, a run directory, or one of its ``checkpoints/STEP``.

    Returns:
      The policy on the ambient mesh, its dimensions, and the run's configuration if it comes from a run.

    Raises:
      CheckpointError: there is no usable checkpoint at ``path``.
      MeshError: the policy does not divide over the mesh.
    """
    if is_checkpoint(path):
        _check_mesh(read_dims(path))
        return *load_hf(path, dtype=dtype), None
    with _saved(path) as (checkpoints, step):
        config = _config(checkpoints, step)
        dims = read_dims(config.model.path)
        _check_mesh(dims)
        if config.model.lora_rank:
            policy = _adapted(checkpoints, step, config, dims)
        else:
            policy = _params(checkpoints, step, abstract_policy(dims))
    return jax.tree.map(lambda x: x.astype(dtype), policy), dims, config


def _check_mesh(dims: Dims) -> None:
    mesh = jax.sharding.get_mesh()
    # Batches of questions are padded so that they divide over the mesh.
    check_fits(mesh, dims, mesh.size, mesh.size)


def load_adapters(path: str | Path) -> tuple[Adapters, Config]:
    """The trained adapters of a run with ``model.lora_rank``, in float32, and the run's configuration.

    Raises:
      CheckpointError: there is no such run at ``path``, or it trains all weights.
    """
    with _saved(path) as (checkpoints, step):
        config = _config(checkpoints, step)
        rank = config.model.lora_rank
        if not rank:
            raise CheckpointError(f"{path}: the run learns all weights; expected one with model.lora_rank")
        return _params(checkpoints, step, abstract_adapters(read_dims(config.model.path), rank)), config


def _config(checkpoints: Checkpoints, step: int) -> Config:
    with parsing(checkpoints.directory / str(step)):
        return checkpoints.config(step)


def _params(checkpoints: Checkpoints, step: int, like: T) -> T:
    with parsing(checkpoints.directory / str(step)):
        return checkpoints.policy(step, like)


@contextmanager
def _saved(path: str | Path) -> Iterator[tuple[Checkpoints, int]]:
    """A run's checkpoints and the step that ``path`` refers to, checked for damage. Raises CheckpointError."""
    found = locate(path)
    if found is None and (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{path}: {ALONE}")
    if found is None:
        raise CheckpointError(f"{path}: expected a run directory with checkpoints, a Hugging Face checkpoint, or 'toy'")
    directory, step = found
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps)) or "none"
            raise CheckpointError(f"{path}: no complete checkpoint there; {directory} has {there}")
        problem = checkpoints.damage(step, ("policy", "run"))
        if problem:
            others = ", ".join(str(other) for other in checkpoints.steps if other != step) or "none"
            raise CheckpointError(f"{directory}/{step}: is damaged ({problem}); other steps there: {others}")
        yield checkpoints, step


def _adapted(checkpoints: Checkpoints, step: int, config: Config, dims: Dims) -> Policy:
    """The policy that a run began with, with the run's adapters."""
    model, dtype = config.model, use_compute_dtype(config.model.compute_dtype)
    # Loaded as in the run, because the adapters were trained on that.
    base, _ = load_hf(model.path, dtype=dtype)
    found, expected = fingerprint(base, dtype), checkpoints.reference(step)
    if found != expected:
        raise CheckpointError(
            f"{checkpoints.directory}/{step}: its adapters are for weights with fingerprint {expected}, model.path="
            f"{model.path} has {found}; expected the weights that the run began with"
        )
    adapters = _params(checkpoints, step, abstract_adapters(dims, model.lora_rank))
    return adapt(base, adapters, model.lora_scale)
