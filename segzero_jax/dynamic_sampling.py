"""Dynamic sampling: groups with zero advantages are replaced by others that are sampled after them.

If all responses of a group earn the same reward, their advantages are zero. DAPO (arXiv 2503.14476, section 3.2) keeps
sampling until a batch has only groups with a spread; surplus groups of the last batch are dropped.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segzero_jax.scoring import Scored
from segzero_jax.types import Array, Example, PromptBatch, Rollout

_PIECES = 16


class DeviceBatch(NamedTuple):
    """The groups of a batch on the mesh (a pytree; the first axis of every array is ``b``).

    Attributes:
      prompts, rollout: the prompts and their responses.
      ref_logps_bgr: float32, under the reference policy; None without one.
      old_logps_bgr: float32, under the policy that sampled; None when that is the policy being updated.
    """

    prompts: PromptBatch
    rollout: Rollout
    ref_logps_bgr: Array | None
    old_logps_bgr: Array | None


class SampledBatch(NamedTuple):
    """A sampled and scored batch, on the host.

    Attributes:
      examples: ``b`` prompts.
      texts: responses, ``[b][g]``.
      rollout: their tokens, padded to the maximum response length.
      scored: their rewards.
      advantages_bg: float32.
      keep_bg: bool, False for a response that is excluded from the loss; its advantage is 0.
      tokens: number of tokens in prompts and responses.
    """

    examples: Sequence[Example]
    texts: list[list[str]]
    rollout: Rollout
    scored: Scored
    advantages_bg: np.ndarray
    keep_bg: np.ndarray
    tokens: int


class Selection(NamedTuple):
    """The groups that a step trains on.

    Attributes:
      rows_b: int32, the group numbers, counted through all sampled batches.
      advantages_bg, keep_bg: those of the selected groups, as in SampledBatch.
      used: bool, for every sampled group, whether it was selected.
    """

    rows_b: np.ndarray
    advantages_bg: np.ndarray
    keep_bg: np.ndarray
    used: np.ndarray


def enough(batches: Sequence[SampledBatch]) -> bool:
    """Whether enough groups for a batch are informative, that is, have nonzero advantages."""
    return sum(int(_informative(batch).sum()) for batch in batches) >= len(batches[0].examples)


def select_all(batch: SampledBatch) -> Selection:
    """All groups of a batch, even those with zero advantages: they count in the loss's mean, its KL and its entropy."""
    size = len(batch.examples)
    return Selection(np.arange(size, dtype=np.int32), batch.advantages_bg, batch.keep_bg, np.ones(size, bool))


def select(batches: Sequence[SampledBatch]) -> Selection:
    """The first informative groups, as many as a batch has.

    An informative group of the first batch keeps its row; those of later batches fill the other rows, in order. If
    there are too few, the remaining rows are excluded from the loss.
    """
    rows_b, taught_b = _chosen_rows(np.stack([_informative(batch) for batch in batches]))
    used = np.zeros(len(batches) * len(rows_b), bool)
    used[rows_b[taught_b]] = True
    advantages_bg = np.concatenate([batch.advantages_bg for batch in batches])[rows_b]
    keep_bg = np.concatenate([batch.keep_bg for batch in batches])[rows_b]
    return Selection(rows_b, advantages_bg, keep_bg & taught_b[:, None], used)


def _informative(batch: SampledBatch) -> np.ndarray:
    return (batch.advantages_bg != 0).any(axis=1)


def _chosen_rows(teaches_kb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row's group number, counted through ``k`` batches, and whether that group is informative."""
    size = teaches_kb.shape[1]
    rows_b, taught_b = np.arange(size, dtype=np.int32), teaches_kb[0].copy()
    others = size + np.flatnonzero(teaches_kb[1:])
    free = np.flatnonzero(~taught_b)[: len(others)]
    rows_b[free], taught_b[free] = others[: len(free)], True
    return rows_b, taught_b


def gather(batches: Sequence[DeviceBatch], rows_b: np.ndarray, pad_id: int) -> DeviceBatch:
    """The chosen groups of several batches as one batch on the mesh; a single batch is returned whole.

    Args:
      batches: all of one size; prompts and responses may be padded to different lengths.
      rows_b: int32, group numbers, counted through all batches.
      pad_id: the padding token of prompts and responses.
    """
    if len(batches) == 1:
        return batches[0]
    p = max(batch.prompts.tokens_bp.shape[1] for batch in batches)
    r = max(batch.rollout.tokens_bgr.shape[2] for batch in batches)
    # Padded one by one: otherwise each combination of lengths would compile its own program.
    return _take(tuple(_lengthened(batch, p, r, pad_id) for batch in batches), rows_b)


def _lengthened(groups: DeviceBatch, p: int, r: int, pad_id: int) -> DeviceBatch:
    def last(x: Array, length: int, value: int = 0) -> Array:
        more = length - x.shape[-1]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)], constant_values=value) if more else x

    prompts, rollout = groups.prompts, groups.rollout
    return DeviceBatch(
        prompts._replace(
            tokens_bp=last(prompts.tokens_bp, p, pad_id),
            positions_b3p=last(prompts.positions_b3p, p),
            image_index_bp=last(prompts.image_index_bp, p, -1),
        ),
        rollout._replace(tokens_bgr=last(rollout.tokens_bgr, r, pad_id), logps_bgr=last(rollout.logps_bgr, r)),
        None if groups.ref_logps_bgr is None else last(groups.ref_logps_bgr, r),
        None if groups.old_logps_bgr is None else last(groups.old_logps_bgr, r),
    )


@jax.jit
def _take(batches: tuple[DeviceBatch, ...], rows_b: Array) -> DeviceBatch:
    batch_b, row_b = jnp.divmod(jnp.asarray(rows_b), len(rows_b))

    def pick(*parts: jax.Array) -> jax.Array:
        b, *rest = parts[0].shape
        spec = jax.typeof(parts[0]).sharding.spec
        size = math.prod(rest)
        count = _PIECES if size % _PIECES == 0 else 1
        if not size:  # No patches: images are already embedded.
            return parts[0]
        flat_spec = jax.sharding.PartitionSpec(spec[0], None)
        flat = [jnp.reshape(part, (b, size), out_sharding=flat_spec) for part in parts]

        def piece(i: jax.Array) -> jax.Array:
            start, length = i * (size // count), size // count
            # Stacked, not concatenated: the axis that is sharded over the mesh remains the batch axis.
            some_kbn = jnp.stack([jax.lax.dynamic_slice_in_dim(x_bn, start, length, axis=1) for x_bn in flat])
            return some_kbn.at[batch_b, row_b].get(out_sharding=flat_spec)

        # XLA may gather all rows to pick some. One piece at a time, or every device would hold all images.
        pieces_ibn = jax.lax.map(piece, jnp.arange(count))
        return jnp.reshape(jnp.moveaxis(pieces_ibn, 0, 1), (b, *rest), out_sharding=spec)

    return jax.tree.map(pick, *batches)
