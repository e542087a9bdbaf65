"""The Qwen2.5-VL decoder over prefix groups: prefill, decode, and the joint pass of reference and update.

All three run the same block over a stream of tokens ``[b, t, d]``; they differ in what the stream holds and in how its
keys are arranged for the one attention function:

- ``prefill``: ``t`` = the prompt;
- ``decode``: ``t`` = one new token of each of the G responses;
- ``group_hidden``: ``t`` = prompt followed by its G responses.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from segzero_jax.mesh import Layout, kv_copies
from segzero_jax.model.attention import Kernel, KeyValue, Stream, attend, attend_stream
from segzero_jax.model.blocks import run_blocks
from segzero_jax.model.dims import Dims
from segzero_jax.model.layers import (
    constant_param,
    linear,
    mrope_angles,
    normal_param,
    recomputed,
    rms_norm,
    rotate,
)
from segzero_jax.model.vision import VisionTower, encode_images
from segzero_jax.types import Array, PromptBatch


class DecoderBlocks(nnx.Module):
    """All decoder blocks, stacked on a leading layer axis; ``adapters`` are LoRA's (``model/lora.py``), if any."""

    def __init__(self, dims: Dims, layout: Layout, key: jax.Array):
        layers, d, n, k, h, f = dims.layers, dims.hidden, dims.heads, dims.kv_heads, dims.head_width, dims.mlp
        keys = jax.random.split(key, 7)
        spec = layout.spec
        # Key-value heads that the tensor axis does not divide are replicated, and repeated up to it after projection.
        kv = "heads" if kv_copies(k) == 1 else None
        self.norm1_d = constant_param(1.0, (layers, d), spec(None, None))
        self.norm2_d = constant_param(1.0, (layers, d), spec(None, None))
        self.q_dnh = normal_param(keys[0], (layers, d, n, h), spec(None, "embed", "heads", None))
        self.q_bias_nh = constant_param(0.0, (layers, n, h), spec(None, "heads", None))
        self.k_dkh = normal_param(keys[1], (layers, d, k, h), spec(None, "embed", kv, None))
        self.k_bias_kh = constant_param(0.0, (layers, k, h), spec(None, kv, None))
        self.v_dkh = normal_param(keys[2], (layers, d, k, h), spec(None, "embed", kv, None))
        self.v_bias_kh = constant_param(0.0, (layers, k, h), spec(None, kv, None))
        self.o_nhd = normal_param(keys[3], (layers, n, h, d), spec(None, "heads", None, "embed"))
        self.gate_df = normal_param(keys[4], (layers, d, f), spec(None, "embed", "mlp"))
        self.up_df = normal_param(keys[5], (layers, d, f), spec(None, "embed", "mlp"))
        self.down_fd = normal_param(keys[6], (layers, f, d), spec(None, "mlp", "embed"))
        self.adapters: nnx.Module | None = nnx.data(None)


class Policy(nnx.Module):
    """Weights of the whole policy, used strictly as a pytree: every pass is a function of it."""

    def __init__(self, dims: Dims, layout: Layout, key: jax.Array):
        keys = jax.random.split(key, 4)
        spec = layout.spec
        self.vision = VisionTower(dims.vision, layout, keys[0])
        self.embed_vd = normal_param(keys[1], (dims.vocab, dims.hidden), spec("vocab", "embed"))
        self.blocks = DecoderBlocks(dims, layout, keys[2])
        self.final_norm_d = constant_param(1.0, (dims.hidden,), spec(None))
        if not dims.tied:
            self.head_vd = normal_param(keys[3], (dims.vocab, dims.hidden), spec("vocab", "embed"))


class ForwardConfig(NamedTuple):
    """Static settings of every pass (hashable, so that ``jax.jit`` can close over them).

    Attributes:
      dims: the policy's dimensions.
      layout: the phase's sharding table.
      dtype: dtype of activations.
      remat: recompute blocks in the backward pass.
      kernel: the kernel that computes attention over whole streams.
      one_loop: run all strides of the vision tower in one loop, see ``encode_images``. All passes of a run should
        agree: XLA rounds bfloat16 differently in a different loop.
      written_out: unroll the blocks instead of looping over them (``run_blocks``).
    """

    dims: Dims
    layout: Layout
    dtype: jnp.dtype
    remat: bool = False
    kernel: Kernel = "xla"
    one_loop: bool = False
    written_out: bool = False


def _linear(
    subscripts: str, x: jax.Array, block: DecoderBlocks, name: str, bias: jax.Array | None, out_sharding: PartitionSpec
) -> jax.Array:
    """``linear`` with a matrix of the block, plus its adapter's product."""
    weight = getattr(block, name)[...]
    if block.adapters is None:
        return linear(subscripts, x, weight, bias, out_sharding)
    adapter = getattr(block.adapters, name)
    x_letters, rest = subscripts.split(",")
    w_letters, out = rest.split("->")
    inputs = "".join(letter for letter in w_letters if letter not in out)
    outputs = "".join(letter for letter in w_letters if letter in out)
    narrow = "".join(letter for letter in x_letters if letter not in inputs) + "r"
    # Rows are sharded like the result; the rank axis is not sharded.
    rows = PartitionSpec(out_sharding[0], *(None,) * (len(narrow) - 1))
    x_btr = linear(f"{x_letters},{inputs}r->{narrow}", x, adapter.down[...], None, rows)
    change = linear(f"{narrow},r{outputs}->{out}", x_btr, adapter.up[...], None, out_sharding)
    # Added before the product is rounded: an adapter's change is often below the precision of the rounded product.
    return (linear(subscripts, x, weight, bias, out_sharding, jnp.float32) + change).astype(x.dtype)


def _project(
    block: DecoderBlocks, x_btd: jax.Array, angles: jax.Array, fwd: ForwardConfig
) -> tuple[jax.Array, KeyValue]:
    spec, dims = fwd.layout.spec, fwd.dims
    heads = spec("batch", None, "heads", None)
    copies = kv_copies(dims.kv_heads) if heads[2] else 1
    kv = heads if copies == 1 else spec("batch", None, None, None)

    @recomputed
    def project(x_btd: jax.Array, block: DecoderBlocks) -> tuple[jax.Array, jax.Array, jax.Array]:
        y = rms_norm(x_btd, block.norm1_d[...], dims.norm_eps)
        q = _linear("btd,dnh->btnh", y, block, "q_dnh", block.q_bias_nh[...], heads)
        k = _linear("btd,dkh->btkh", y, block, "k_dkh", block.k_bias_kh[...], kv)
        return q, k, _linear("btd,dkh->btkh", y, block, "v_dkh", block.v_bias_kh[...], kv)

    q, k, v = project(x_btd, block)
    q, k = rotate(q, angles), rotate(k, angles)
    if copies > 1:
        k, v = (jax.sharding.reshard(jnp.repeat(a, copies, axis=2), heads) for a in (k, v))
    return q, KeyValue(k, v)


def _finish(block: DecoderBlocks, x_btd: jax.Array, out_btnh: jax.Array, fwd: ForwardConfig) -> jax.Array:
    spec = fwd.layout.spec
    rows = spec("batch", None, None)
    hidden = spec("mlp_batch", None, "mlp")

    @recomputed
    def widen(x_btd: jax.Array, block: DecoderBlocks) -> tuple[jax.Array, jax.Array]:
        y = rms_norm(x_btd, block.norm2_d[...], fwd.dims.norm_eps)
        y = jax.sharding.reshard(y, spec("mlp_batch", None, None))
        gate = _linear("btd,df->btf", y, block, "gate_df", None, hidden)
        return gate, _linear("btd,df->btf", y, block, "up_df", None, hidden)

    @recomputed
    def narrow(gate_btf: jax.Array, up_btf: jax.Array, block: DecoderBlocks) -> jax.Array:
        return _linear("btf,fd->btd", jax.nn.silu(gate_btf) * up_btf, block, "down_fd", None, rows)

    x_btd = x_btd + _linear("btnh,nhd->btd", out_btnh, block, "o_nhd", None, rows)
    return x_btd + narrow(*widen(x_btd, block), block)


def _embed(policy: Policy, tokens: Array, fwd: ForwardConfig) -> jax.Array:
    # The table is not moved: each device looks up its part of the vocabulary and of the width for all tokens, and the
    # results are resharded. In float32, so that the gradients of a token's occurrences are summed in float32.
    spec, rest = fwd.layout.spec, (None,) * (tokens.ndim - 1)
    tokens = jax.sharding.reshard(jnp.asarray(tokens), spec("lookup_batch", *rest))
    embedded = policy.embed_vd[...].at[tokens].get(out_sharding=spec("lookup_batch", *rest, "embed"))
    return jax.sharding.reshard(embedded.astype(fwd.dtype), spec("batch", *rest, None))


def _encode_images(policy: Policy, batch: PromptBatch, fwd: ForwardConfig) -> jax.Array:
    """Embeddings of all images of each prompt, concatenated: ``[b, u, d]``."""
    b, images, slots, _ = batch.patches_bisc.shape
    flat = lambda a: jnp.asarray(a).reshape(b * images, *a.shape[2:])  # noqa: E731
    embedded_mud = encode_images(
        policy.vision,
        fwd.dims.vision,
        fwd.layout,
        flat(batch.patches_bisc),
        flat(batch.patch_hw_bis2),
        flat(batch.patch_valid_bis),
        dtype=fwd.dtype,
        kernel=fwd.kernel,
        remat=fwd.remat,
        one_loop=fwd.one_loop,
        written_out=fwd.written_out,
    )
    units = images * slots // fwd.dims.vision.merge**2
    rows = fwd.layout.spec("batch", None, None)
    return jnp.reshape(embedded_mud, (b, units, fwd.dims.hidden), out_sharding=rows)


@partial(jax.jit, static_argnames="fwd")
def embed_images(policy: Policy, batch: PromptBatch, *, fwd: ForwardConfig) -> PromptBatch:
    """The batch with image embeddings in place of patches, for passes that do not run the vision tower."""
    if batch.patches_bisc.shape[1] == 0:
        return batch
    rows = jax.typeof(batch.tokens_bp).sharding.spec[0]
    embedded = _encode_images(policy, _split_by_prompt(batch, fwd.layout), fwd)
    return batch._replace(
        embedded_bud=jax.sharding.reshard(embedded, PartitionSpec(rows, None, None)),
        patches_bisc=batch.patches_bisc[:, :0],
        patch_hw_bis2=batch.patch_hw_bis2[:, :0],
        patch_valid_bis=batch.patch_valid_bis[:, :0],
    )


def _split_by_prompt(batch: PromptBatch, layout: Layout) -> PromptBatch:
    """The batch, split as the layout splits activations."""
    place = lambda x: jax.sharding.reshard(jnp.asarray(x), layout.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(place, batch)


def embed_prompt(policy: Policy, batch: PromptBatch, fwd: ForwardConfig) -> jax.Array:
    """Token embeddings with the image embeddings at their positions: ``[b, p, d]``."""
    x_bpd = _embed(policy, batch.tokens_bp, fwd)
    if batch.embedded_bud is not None:
        embedded = jnp.asarray(batch.embedded_bud)
    elif batch.patches_bisc.shape[1]:
        embedded = _encode_images(policy, batch, fwd)
    else:
        return x_bpd
    index_bp = jnp.asarray(batch.image_index_bp)
    placed = jnp.take_along_axis(embedded, jnp.maximum(index_bp, 0)[..., None], axis=1)
    return jnp.where((index_bp >= 0)[..., None], placed, x_bpd)


def _run_prompt(policy: Policy, batch: PromptBatch, fwd: ForwardConfig) -> tuple[jax.Array, KeyValue]:
    """Runs the prompts: states before the final norm, ``[b, p, d]``, and keys and values, ``[layer, b, p, k, h]``."""
    batch = _split_by_prompt(batch, fwd.layout)
    x = embed_prompt(policy, batch, fwd)
    angles = mrope_angles(batch.positions_b3p, fwd.dims.mrope_sections, fwd.dims.rope_theta)
    prompt_mask = _prompt_mask(batch)
    heads = fwd.layout.spec("batch", None, "heads", None)

    def body(x: jax.Array, block: DecoderBlocks) -> tuple[jax.Array, KeyValue]:
        q, kv = _project(block, x, angles, fwd)
        out = attend_stream(q, kv, Stream(x.shape[1], 0, 0), prompt_mask, fwd.kernel, heads)
        return _finish(block, x, out, fwd), kv

    return jax.lax.scan(body, x, policy.blocks)


def prefill(policy: Policy, batch: PromptBatch, fwd: ForwardConfig) -> tuple[jax.Array, KeyValue]:
    """Runs the prompts once.

    Returns:
      The hidden state after the last token of each prompt, ``[b, d]``, final norm applied, and the keys and values of
      all layers, ``[layer, b, p, k, h]``.
    """
    batch = _split_by_prompt(batch, fwd.layout)
    x, cache = _run_prompt(policy, batch, fwd)
    return rms_norm(_last_prompt(x, batch), policy.final_norm_d[...], fwd.dims.norm_eps), cache


def prompt_logits(policy: Policy, batch: PromptBatch, fwd: ForwardConfig) -> jax.Array:
    """Float32 logits after every prompt token, ``[b, p, v]``: for parity checks on small inputs, never in training."""
    x, _ = _run_prompt(policy, batch, fwd)
    return logits(policy, rms_norm(x, policy.final_norm_d[...], fwd.dims.norm_eps), fwd)


def _last_prompt(x_bpd: jax.Array, batch: PromptBatch) -> jax.Array:
    last = (jnp.asarray(batch.length_b) - 1)[:, None, None]
    return jnp.take_along_axis(x_bpd, last, axis=1)[:, 0]


def _prompt_mask(batch: PromptBatch) -> jax.Array:
    """The mask of real (not padding) prompt tokens, bool ``[b, p]``."""
    return jnp.arange(batch.tokens_bp.shape[1])[None] < jnp.asarray(batch.length_b)[:, None]


def _response_positions(batch: PromptBatch, steps: jax.Array) -> jax.Array:
    """M-RoPE positions of response tokens, ``[b, 3, t]``; they are text, so the three axes are equal."""
    positions = jnp.asarray(batch.next_position_b)[:, None, None] + steps[None, None]
    return jnp.broadcast_to(positions, (positions.shape[0], 3, positions.shape[2]))


def in_layout(cache: KeyValue, dims: Dims, layout: Layout) -> KeyValue:
    """Keys and values of prompts, ``[layer, b, p, k, h]``, in a layout with as many copies of the heads, or more."""
    heads = dims.kv_heads * (kv_copies(dims.kv_heads) if layout.heads else 1)
    if heads > cache.k.shape[3]:
        cache = KeyValue(*(jnp.repeat(a, heads // a.shape[3], axis=3) for a in cache))
    return jax.sharding.reshard(cache, layout.spec(None, "batch", None, "heads", None))


class DecodeCache(NamedTuple):
    """The KV cache during sampling: prompts ``[layer, b, p, k, h]``, responses ``[layer, b, g, r, k, h]``."""

    prompt: KeyValue
    response: KeyValue


def empty_cache(prompt: KeyValue, group: int, length: int, layout: Layout) -> DecodeCache:
    """A cache with room for ``length`` tokens of each of ``group`` responses after prefilled prompts."""
    layers, b, _, k, h = prompt.k.shape
    spec = layout.spec(None, "batch", None, None, "heads", None)
    room = lambda: jnp.zeros((layers, b, group, length, k, h), prompt.k.dtype, out_sharding=spec)  # noqa: E731
    return DecodeCache(prompt, KeyValue(room(), room()))


def decode(
    policy: Policy, batch: PromptBatch, tokens_bg: jax.Array, step: jax.Array, cache: DecodeCache, fwd: ForwardConfig
) -> tuple[jax.Array, DecodeCache]:
    """Runs one decode step: one token of every response.

    Args:
      tokens_bg: the tokens sampled last, at index ``step`` of their responses.
      step: index of the token, int32 scalar.
      cache: the KV cache, updated at ``step``.

    Returns:
      The hidden state ``[b, g, d]``, final norm applied, and the cache.
    """
    x = _embed(policy, tokens_bg, fwd)
    positions = _response_positions(batch, step[None])
    # All G tokens of a row have the same position.
    angles = mrope_angles(positions, fwd.dims.mrope_sections, fwd.dims.rope_theta)
    length = cache.response.k.shape[3]
    own_mask = (jnp.arange(length) <= step)[None, None, None]
    prompt_mask = _prompt_mask(batch)

    def body(
        carry: tuple[jax.Array, KeyValue], layer: tuple[DecoderBlocks, KeyValue, jax.Array]
    ) -> tuple[tuple[jax.Array, KeyValue], None]:
        x, own = carry
        block, prompt, index = layer
        q, new = _project(block, x, angles, fwd)
        at = (index, 0, 0, step, 0, 0)
        own = KeyValue(
            *(jax.lax.dynamic_update_slice(room, a[None, :, :, None], at) for room, a in zip(own, new, strict=True))
        )
        mine = KeyValue(*(jax.lax.dynamic_index_in_dim(room, index, 0, keepdims=False) for room in own))
        out = attend(q[:, :, None], mine, own_mask, prompt, prompt_mask)
        return (_finish(block, x, out[:, :, 0], fwd), own), None

    layers = jnp.arange(fwd.dims.layers)
    (x, own), _ = jax.lax.scan(body, (x, cache.response), (policy.blocks, cache.prompt, layers))
    return rms_norm(x, policy.final_norm_d[...], fwd.dims.norm_eps), DecodeCache(cache.prompt, own)


def group_hidden(policy: Policy, batch: PromptBatch, tokens_bgr: Array, fwd: ForwardConfig) -> jax.Array:
    """Hidden states that predict every response token, final norm applied: ``[b, g, r, d]``.

    The state at ``[.., 0]`` is that of the last prompt token (shared by the group); the state at ``[.., i]`` is that of
    response token ``i - 1``. Values and gradients equal those of running ``prompt + response`` G times.
    """
    b, g, r = tokens_bgr.shape
    batch = _split_by_prompt(batch, fwd.layout)
    prompt = embed_prompt(policy, batch, fwd)
    p, d = prompt.shape[1:]
    # Shardings are explicit, since a reshape with axes of size one may put them on any of these.
    rows = fwd.layout.spec("batch", None, None)
    responses = jnp.reshape(_embed(policy, tokens_bgr, fwd), (b, g * r, d), out_sharding=rows)
    x = jnp.concatenate([prompt, responses], axis=1)
    response_positions = jnp.tile(_response_positions(batch, jnp.arange(r)), (1, 1, g))
    positions = jnp.concatenate([jnp.asarray(batch.positions_b3p), response_positions], axis=2)
    angles = mrope_angles(positions, fwd.dims.mrope_sections, fwd.dims.rope_theta)
    prompt_mask = _prompt_mask(batch)
    heads = fwd.layout.spec("batch", None, "heads", None)

    def body(x: jax.Array, block: DecoderBlocks) -> jax.Array:
        q, kv = _project(block, x, angles, fwd)
        out = attend_stream(q, kv, Stream(p, g, r), prompt_mask, fwd.kernel, heads)
        return _finish(block, x, out, fwd)

    body = jax.checkpoint(body) if fwd.remat else body
    x = run_blocks(body, x, policy.blocks, fwd.written_out)
    first = jnp.broadcast_to(_last_prompt(x[:, :p], batch)[:, None, None], (b, g, 1, d))
    states = jnp.reshape(x[:, p:], (b, g, r, d), out_sharding=fwd.layout.spec("batch", None, None, None))
    predicting = jnp.concatenate([first, states[:, :, :-1]], axis=2)
    return rms_norm(predicting, policy.final_norm_d[...], fwd.dims.norm_eps)


def head_weights(policy: Policy, fwd: ForwardConfig) -> jax.Array:
    """The output head, ``[v, d]``: the embedding table if the weights are tied."""
    return (policy.embed_vd if fwd.dims.tied else policy.head_vd)[...]


def logits(policy: Policy, hidden_bgd: jax.Array, fwd: ForwardConfig) -> jax.Array:
    """Float32 logits ``[b, g, v]``, vocabulary sharded, of normed hidden states ``[b, g, d]``."""
    hidden = jax.sharding.reshard(hidden_bgd, fwd.layout.spec("head_batch", None, None))
    out = fwd.layout.spec("head_batch", None, "vocab")
    return linear("bgd,vd->bgv", hidden, head_weights(policy, fwd), None, out, jnp.float32)
