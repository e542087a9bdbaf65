"""A training step in abstract values: shapes and shardings without numbers."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from segzero_jax.config import Config
from segzero_jax.grpo import (
    UpdateBatch,
    full_policy,
    initial_state,
    make_loss_config,
    make_optimizer,
    policy_logps,
    update,
)
from segzero_jax.mesh import ROLLOUT, TRAIN
from segzero_jax.model.attention import Stream
from segzero_jax.model.dims import RELEASED, Dims
from segzero_jax.model.forward import forward_config, training_layout
from segzero_jax.model.lora import abstract_adapted, abstract_params
from segzero_jax.model.policy import Policy, embed_images
from segzero_jax.model.splash import live_scores, padded_length
from segzero_jax.model.weights import abstract_policy, read_dims
from segzero_jax.patches import window_order
from segzero_jax.rollout import Sampling, padding_multiple, prefill_prompts, rollout_layout, sample
from segzero_jax.types import PromptBatch, Rollout

# Special tokens do not affect cost; these are Qwen2.5-VL's.
_END_IDS, _PAD_ID, _VISUAL_IDS = (151645, 151643), 151643, (151652, 151653, 151654, 151655, 151656)


def find_dims(path: str) -> Dims:
    """The dimensions of ``model.path``: a directory, or a released model, whose weights need not be here."""
    released = path.rstrip("/")
    if released in RELEASED and not Path(path).is_dir():
        return RELEASED[released]
    return read_dims(path)


class Step:
    """A training step in abstract values: the programs of ``train`` and the shapes and shardings of their inputs.

    Args:
      config: the run's configuration.
      dims: its policy's dimensions.
      mesh: must also be the ambient mesh (``jax.set_mesh``) while a method is called.
      group: responses per prompt; the run's own by default.
    """

    def __init__(self, config: Config, dims: Dims, mesh: jax.sharding.Mesh, group: int | None = None) -> None:
        self.config, self.dims, self.mesh = config, dims, mesh
        limits = config.rollout
        multiple = padding_multiple(limits.max_prompt_tokens)
        self.group = group or limits.group_size
        self.prompt_tokens = -(-limits.max_prompt_tokens // multiple) * multiple
        self.response_tokens = limits.max_response_tokens
        vision, side = dims.vision, config.data.image_size // dims.vision.patch
        self.patch_slots = len(window_order(side, side, vision.merge, vision.window_side)[0])
        layout = training_layout(dims, mesh, config.train.micro_batch_size)
        self.train_fwd = forward_config(dims, layout, config.model)
        self.rollout_fwd = forward_config(dims, ROLLOUT, config.model)
        dtype = self.train_fwd.dtype
        self.loss_config = make_loss_config(config, _VISUAL_IDS)
        self.optimizer = make_optimizer(config.train, config.model.freeze_vision)
        self.rank = config.model.lora_rank
        # With LoRA, the policy under the adapters; the reference has its own adapters on the same policy.
        self.base = self._on_mesh(abstract_policy(dims, layout), dtype) if self.rank else None
        params = self._on_mesh(abstract_params(dims, self.rank, layout))
        self.policy = full_policy(params, self.base, self.loss_config._replace(lora_scale=None))
        reference = self._on_mesh(abstract_adapted(dims, self.rank, layout), dtype)
        self.reference_policy = reference if config.grpo.kl_coef else None
        self.rollout_policy = self._on_mesh(abstract_adapted(dims, self.rank, ROLLOUT), dtype)
        self.state = self._on_mesh(jax.eval_shape(partial(initial_state, optimizer=self.optimizer), params))
        self.patches = self._patches(config.train.batch_size)
        self.prompts = self._embedded(self.patches)
        self.responses = self._responses(config.train.batch_size)
        read = partial(prefill_prompts, fwd=self.train_fwd._replace(remat=False))
        self.prefilled = self._on_mesh(jax.eval_shape(read, self.policy, self.prompts))

    @property
    def stream(self) -> Stream:
        return Stream(self.prompt_tokens, self.group, self.response_tokens)

    def programs(self) -> Iterator[tuple[str, int, Callable[[], Any], Sequence[Any]]]:
        """In the order of a step: name, number of runs, a function that lowers it, and other data in memory."""
        config, optimizer, reference = self.config, self.state.opt_state, self.reference_policy
        # The part of the reference that is not shared with the policy.
        other = reference if reference is None or not self.rank else reference.blocks.adapters
        if config.model.vision_stays:
            yield "vision", 1, self.lower_vision, (optimizer, other)
        yield "prefill", 1, self.lower_prefill, (optimizer, other)
        yield "reshard", 1, self.lower_reshard, (optimizer, other, self.prompts, self.prefilled)
        yield "decode", 1, self.lower_decode, (self.state, self.base, other)
        if reference is not None:
            yield "reference", 1, partial(self.lower_logps, reference), (self.state,)
        if config.updates_per_rollout > 1:
            yield "old_logps", 1, partial(self.lower_logps, self.policy), (optimizer, other)
        # A mini-batch is sliced from the batch, which stays in memory.
        whole = (self.prompts, self.responses) if config.train.mini_batches > 1 else ()
        yield "update", config.updates_per_rollout, self.lower_update, (other, *whole)

    def lower_vision(self) -> Any:
        return embed_images.lower(self.policy, self.patches, fwd=self.train_fwd)

    def lower_reshard(self) -> Any:
        return rollout_layout(self.dims, self.rollout_fwd.dtype, self.rank).lower(self.policy)

    def lower_prefill(self) -> Any:
        return prefill_prompts.lower(self.policy, self.prompts, fwd=self.train_fwd._replace(remat=False))

    def lower_decode(self) -> Any:
        limits = self.config.rollout
        tokens = (limits.max_response_tokens, _END_IDS, _PAD_ID, _VISUAL_IDS)
        sampling = Sampling(self.group, *tokens, limits.temperature, limits.top_p, limits.top_k)
        key = self._on_mesh(jax.eval_shape(lambda: jax.random.key(0)))
        settings = {"fwd": self.rollout_fwd, "sampling": sampling, "prefilled": self.prefilled}
        return sample.lower(self.rollout_policy, self.prompts, key, **settings)

    def lower_logps(self, policy: Policy) -> Any:
        fwd = self.train_fwd._replace(remat=False)
        return policy_logps.lower(
            policy, self.prompts, self.responses.tokens_bgr, fwd=fwd, loss_config=self.loss_config
        )

    def lower_update(self) -> Any:
        size = self.config.train.update_size
        b, g, r = size, self.group, self.response_tokens
        logps = self._rows((b, g, r), jnp.float32)
        learnt = UpdateBatch(
            self._embedded(self._patches(size)),
            self._responses(size),
            advantages_bg=self._rows((b, g), jnp.float32),
            keep_bg=self._rows((b, g), jnp.bool_),
            ref_logps_bgr=logps if self.reference_policy is not None else None,
            old_logps_bgr=logps if self.config.updates_per_rollout > 1 else None,
        )
        settings = {"optimizer": self.optimizer, "fwd": self.train_fwd, "loss_config": self.loss_config}
        return update.lower(
            self.state, learnt, base=self.base, micro_batches=self.config.train.micro_batches, **settings
        )

    def attention_scores(self) -> dict[tuple[bool, int], int]:
        """Scores that the attention kernel computes per head, by whether it is for an image, and the padded length."""
        p, _, r = self.stream
        return {
            (True, padded_length(self.patch_slots)): padded_length(self.patch_slots) ** 2,
            (False, padded_length(p)): live_scores(p, 1, p),
            (False, padded_length(self.stream.tokens)): live_scores(p, r, self.stream.tokens),
        }

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._array(shape, dtype, TRAIN.spec("batch", *(None,) * (len(shape) - 1)))

    def _on_mesh(self, tree: Any, dtype: Any = None) -> Any:
        """The output of ``jax.eval_shape``, with its shardings on the mesh."""
        spec = lambda leaf: leaf.sharding.spec if leaf.sharding else PartitionSpec()  # noqa: E731
        return jax.tree.map(lambda leaf: self._array(leaf.shape, dtype or leaf.dtype, spec(leaf)), tree)

    def _embedded(self, patches: PromptBatch) -> PromptBatch:
        """The policy's input in a step: image embeddings instead of images if the vision tower is frozen."""
        if not self.config.model.vision_stays:
            return patches
        return self._on_mesh(jax.eval_shape(partial(embed_images, fwd=self.train_fwd), self.policy, patches))

    def _responses(self, b: int) -> Rollout:
        g, r = self.group, self.response_tokens
        return Rollout(
            tokens_bgr=self._rows((b, g, r), jnp.int32),
            length_bg=self._rows((b, g), jnp.int32),
            logps_bgr=self._rows((b, g, r), jnp.float32),
            finished_bg=self._rows((b, g), jnp.bool_),
        )

    def _patches(self, b: int) -> PromptBatch:
        p, s = self.prompt_tokens, self.patch_slots
        return PromptBatch(
            tokens_bp=self._rows((b, p), jnp.int32),
            length_b=self._rows((b,), jnp.int32),
            positions_b3p=self._rows((b, 3, p), jnp.int32),
            next_position_b=self._rows((b,), jnp.int32),
            image_index_bp=self._rows((b, p), jnp.int32),
            patches_bisc=self._rows((b, 1, s, self.dims.vision.patch_width), jnp.float32),
            patch_hw_bis2=self._rows((b, 1, s, 2), jnp.int32),
            patch_valid_bis=self._rows((b, 1, s), jnp.bool_),
        )


def shard_bytes(tree: Any) -> int:
    """Bytes of abstract values on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
