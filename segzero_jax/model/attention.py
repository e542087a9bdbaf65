"""All attention: which tokens attend to which, and which kernel computes it.

A prefix group is one prompt and its G responses, a stream of tokens ``[prompt | r1 | ... | rG]``. A prompt token sees
earlier prompt tokens; a response token sees the whole prompt and the earlier tokens of its response. The G responses
share one copy of the prompt's keys and values, so a decode step reads them once and an update computes them once.
Nothing is approximated: for each response this is the attention of the sequence ``prompt + response``.

``attend_stream`` is the joint pass (prefill is a stream without responses), ``attend_image`` the vision tower's full
attention, ``attend_windows`` its attention within windows. The first two run as Pallas splash attention on TPU, all
three as cuDNN's flash attention on NVIDIA GPUs, and in chunks of plain XLA elsewhere. ``attend`` is plain XLA in one
piece, for inputs that are short or bound by reading their keys: decode steps everywhere, windows except on GPUs.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import FullMask
from jax.sharding import PartitionSpec

from segzero_jax.model.chunked import Keys, chunked_attention
from segzero_jax.model.flash import flash_group, flash_image, flash_windows
from segzero_jax.model.splash import PrefixGroupMask, padded_length, splash_attention

Kernel = Literal["xla", "splash", "splash_interpreted", "cudnn"]
# The name scope of image attention; ``plan`` uses it to tell image kernel calls from the decoder's.
IMAGE_SCOPE = "attend_image"

_MASKED = -1e30
# With four runs, 10 of 16 parts of a causal square are computed; each run is a program of its own to compile.
_CAUSAL_RUNS, _LEAST_RUN = 4, 128


class KeyValue(NamedTuple):
    """Keys and values: ``[b, g, s, k, h]`` of a response or a window, ``[b, p, k, h]`` of a prompt."""

    k: jax.Array
    v: jax.Array


def attend(
    q_bgtnh: jax.Array,
    own: KeyValue,
    own_mask: jax.Array,
    prompt: KeyValue | None = None,
    prompt_mask_bp: jax.Array | None = None,
) -> jax.Array:
    """Grouped-query attention over a group's own keys and, where given, the prompt's: one softmax over both.

    Args:
      q_bgtnh: queries; ``n`` is a multiple of ``k`` and query head ``n`` reads key head ``n // (N / K)``.
      own: keys and values ``[b, g, s, k, h]`` of the same group.
      own_mask: bool, broadcastable to ``[b, g, t, s]``: which own keys a query sees.
      prompt: keys and values ``[b, p, k, h]`` that all groups of a row share.
      prompt_mask_bp: bool, which prompt keys are real.

    Returns:
      ``[b, g, t, n, h]`` in the dtype of ``q``; scores and softmax are float32.
    """
    q = _by_key_head(q_bgtnh, own.k.shape[3])
    scores = jnp.einsum("bgtkqh,bgskh->bgkqts", q, own.k, preferred_element_type=jnp.float32)
    scores = jnp.where(own_mask[:, :, None, None], scores, _MASKED)
    top = scores.max(-1, keepdims=True)
    if prompt is not None:
        assert prompt_mask_bp is not None
        prompt_scores = jnp.einsum("bgtkqh,bpkh->bgkqtp", q, prompt.k, preferred_element_type=jnp.float32)
        prompt_scores = jnp.where(prompt_mask_bp[:, None, None, None, None], prompt_scores, _MASKED)
        top = jnp.maximum(top, prompt_scores.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    # The softmax over both parts without concatenation: the sum of both outputs is divided by the sum of both totals.
    weights = jnp.exp(scores - top)
    total = weights.sum(-1)
    out = jnp.einsum("bgkqts,bgskh->bgtkqh", weights.astype(q.dtype), own.v, preferred_element_type=jnp.float32)
    if prompt is not None:
        weights = jnp.exp(prompt_scores - top)
        total += weights.sum(-1)
        weights = weights.astype(q.dtype)
        out += jnp.einsum("bgkqtp,bpkh->bgtkqh", weights, prompt.v, preferred_element_type=jnp.float32)
    out = out / jnp.moveaxis(total, -1, 2)[..., None]
    return jnp.reshape(out, q_bgtnh.shape, out_sharding=jax.typeof(q_bgtnh).sharding.spec).astype(q.dtype)


def _by_key_head(q_bgtnh: jax.Array, kv_heads: int) -> jax.Array:
    """Scaled queries, ``[b, g, t, k, q, h]``, grouped by the key head that they read."""
    *before, n, h = q_bgtnh.shape
    *rows, heads, width = jax.typeof(q_bgtnh).sharding.spec
    # The sharding is explicit, since a reshape with axes of size one may put it on any of these.
    by_head = jnp.reshape(
        q_bgtnh, (*before, kv_heads, n // kv_heads, h), out_sharding=PartitionSpec(*rows, heads, None, width)
    )
    return by_head * jnp.asarray(h**-0.5, q_bgtnh.dtype)


class Stream(NamedTuple):
    """The number of prompt tokens of a stream, the number of responses that follow, and their length (static)."""

    prompt: int
    group: int
    length: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.group * self.length


def choose_kernel(mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> Kernel:
    """Splash attention on TPU, cuDNN's for bfloat16 on GPUs, XLA's elsewhere."""
    platform = mesh.devices.flat[0].platform
    if platform == "gpu" and dtype == jnp.bfloat16:
        return "cudnn"
    return "splash" if platform == "tpu" else "xla"


def attend_stream(
    q_btnh: jax.Array, kv: KeyValue, stream: Stream, prompt_mask_bp: jax.Array, kernel: Kernel, spec: PartitionSpec
) -> jax.Array:
    """Causal attention of prefix groups.

    Args:
      q_btnh: queries of the whole stream, ``t = stream.tokens``.
      kv: keys and values ``[b, t, k, h]``; ``n`` is a multiple of ``k``.
      stream: the division of the tokens into prompt and responses.
      prompt_mask_bp: bool, which prompt tokens are real. Padding of a response needs no mask: nothing real follows it.
      kernel: the kernel to use.
      spec: the partition of ``[b, t, n, h]``, batch and heads.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``q``; scores and softmax are float32. Rows of padding are meaningless.
    """
    p, g, r = stream
    if kernel == "cudnn":
        return flash_group(q_btnh, kv.k, kv.v, prompt_mask_bp, r, spec)
    if kernel != "xla":
        prompt_mask = jax.sharding.reshard(prompt_mask_bp, PartitionSpec(spec[0], None))
        real_bt = jnp.pad(prompt_mask, ((0, 0), (0, g * r)), constant_values=True)
        mask = PrefixGroupMask(p, r, padded_length(stream.tokens))
        return splash_attention(q_btnh, kv.k, kv.v, real_bt, mask, spec, interpret=kernel == "splash_interpreted")
    prompt = KeyValue(kv.k[:, :p], kv.v[:, :p])
    out = _attend_causal(q_btnh[:, :p], prompt)
    if not g:
        return out
    by_group = PartitionSpec(spec[0], None, None, *spec[2:])
    grouped = lambda a: jnp.reshape(a[:, p:], (a.shape[0], g, r, *a.shape[2:]), out_sharding=by_group)  # noqa: E731
    own = KeyValue(grouped(kv.k), grouped(kv.v))
    responses = _attend_long(grouped(q_btnh), own, first=0, prompt=prompt, prompt_mask_bp=prompt_mask_bp)
    responses = jnp.reshape(responses, (q_btnh.shape[0], g * r, *q_btnh.shape[2:]), out_sharding=spec)
    return jnp.concatenate([out, responses], axis=1)


def _attend_causal(q_bpnh: jax.Array, kv: KeyValue) -> jax.Array:
    """A prompt's causal self-attention, in runs of queries, each with the keys up to the end of the run."""
    tokens = q_bpnh.shape[1]
    size = max(-(-tokens // _CAUSAL_RUNS), _LEAST_RUN)
    runs = []
    for first in range(0, tokens, size):
        seen = KeyValue(*(a[:, None, : first + size] for a in kv))
        runs.append(_attend_long(q_bpnh[:, None, first : first + size], seen, first=first)[:, 0])
    return jnp.concatenate(runs, axis=1)


def _attend_long(
    q_bgtnh: jax.Array,
    own: KeyValue,
    first: int | None = None,
    own_mask_bs: jax.Array | None = None,
    prompt: KeyValue | None = None,
    prompt_mask_bp: jax.Array | None = None,
) -> jax.Array:
    """``attend`` in chunks, for many queries: never holds all scores. ``first`` as in ``chunked_attention``."""
    q = _by_key_head(q_bgtnh, own.k.shape[3])
    # Heads before tokens, so that every product multiplies contiguous matrices.
    own_keys = Keys(own.k.transpose(0, 3, 1, 2, 4), own.v.transpose(0, 3, 1, 2, 4), own_mask_bs)
    shared = None
    if prompt is not None:
        shared = Keys(prompt.k.transpose(0, 2, 1, 3), prompt.v.transpose(0, 2, 1, 3), prompt_mask_bp)
    out = chunked_attention(q.transpose(0, 3, 1, 4, 2, 5), own_keys, shared, first)
    out = out.transpose(0, 2, 4, 1, 3, 5)
    return jnp.reshape(out, q_bgtnh.shape, out_sharding=jax.typeof(q_bgtnh).sharding.spec)


def attend_image(
    q_bsnh: jax.Array, kv: KeyValue, valid_bs: jax.Array, kernel: Kernel, spec: PartitionSpec
) -> jax.Array:
    """Attention among all valid patches of an image, ``[b, s, n, h]``; arguments as in ``attend_stream``."""
    if kernel == "cudnn":
        return flash_image(q_bsnh, kv.k, kv.v, valid_bs, spec)
    if kernel != "xla":
        valid_bs = jax.sharding.reshard(valid_bs, PartitionSpec(spec[0], None))
        padded = padded_length(q_bsnh.shape[1])
        mask, interpret = FullMask((padded, padded)), kernel == "splash_interpreted"
        with jax.named_scope(IMAGE_SCOPE):
            return splash_attention(q_bsnh, kv.k, kv.v, valid_bs, mask, spec, interpret)
    own = KeyValue(kv.k[:, None], kv.v[:, None])
    return _attend_long(q_bsnh[:, None], own, own_mask_bs=valid_bs)[:, 0]


def attend_windows(
    q_bsnh: jax.Array, kv: KeyValue, seen_bwss: jax.Array, kernel: Kernel, spec: PartitionSpec
) -> jax.Array:
    """Attention within runs of an image's slots, ``[b, s, n, h]``; ``seen_bwss`` masks what a patch sees of its run."""
    if kernel == "cudnn":
        return flash_windows(q_bsnh, kv.k, kv.v, seen_bwss, spec)
    b, w, s = seen_bwss.shape[:3]
    runs = PartitionSpec(spec[0], None, None, *spec[2:])
    split = lambda a: jnp.reshape(a, (b, w, s, *a.shape[2:]), out_sharding=runs)  # noqa: E731
    out = attend(split(q_bsnh), KeyValue(split(kv.k), split(kv.v)), seen_bwss)
    return jnp.reshape(out, q_bsnh.shape, out_sharding=spec)
