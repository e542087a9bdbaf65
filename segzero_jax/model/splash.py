"""Pallas splash attention (``jax.experimental.pallas.ops.tpu.splash_attention``) over prefix groups and over images.

The kernel processes blocks of the score matrix and skips those that the mask leaves empty: for a stream with a prompt
of 1024 and 8 responses of 512, it computes 27 of 100 blocks of size 512; with a causal mask it would compute 55.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from segzero_jax.types import Array

_LANES, _BLOCK = 128, 512
# A query's code: its position in the low bits, its distance from the start of its response above them.
_POSITION_BITS = 17
_MAX_TOKENS, _MAX_RESPONSE = 1 << _POSITION_BITS, 1 << (31 - _POSITION_BITS)


class PrefixGroupMask(masks.Mask):
    """``[prompt | r1 | ... | rG | padding]``: causal, and a response does not see the others.

    ``q_sequence`` and ``mask_function`` make the kernel compute the mask from a query's code and a key's position, so
    that no mask is stored. The code saves the kernel a division per score.

    Raises:
      ValueError: more tokens than the code can hold.
    """

    def __init__(self, prompt: int, length: int, tokens: int) -> None:
        if tokens > _MAX_TOKENS or length > _MAX_RESPONSE:
            raise ValueError(
                f"splash attention over {tokens} tokens with responses of {length}: "
                f"expected at most {_MAX_TOKENS} and {_MAX_RESPONSE}; make groups or responses smaller"
            )
        self._prompt, self._length, self._tokens = prompt, length, tokens
        position = np.arange(tokens)
        into_response = np.where(position < prompt, 0, (position - prompt) % max(length, 1))
        self.q_sequence = (into_response << _POSITION_BITS | position).astype(np.int32)

    def mask_function(self, code: Array, key: Array) -> Array:
        """Whether the query with this code sees the key at this position; numpy or traced, broadcast."""
        query = code & (_MAX_TOKENS - 1)
        response_start = query - (code >> _POSITION_BITS)
        return (key <= query) & ((key < self._prompt) | (key >= response_start))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._tokens, self._tokens)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        return np.asarray(self.mask_function(self.q_sequence[queries, None], np.arange(self._tokens)[None, keys]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrefixGroupMask) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, int]:
        return self._prompt, self._length, self._tokens


def padded_length(tokens: int) -> int:
    """Tokens rounded up to whole blocks of the kernel."""
    unit = _BLOCK if tokens > _BLOCK else _LANES
    return -(-tokens // unit) * unit


def splash_attention(
    q_btnh: jax.Array,
    k_btkh: jax.Array,
    v_btkh: jax.Array,
    real_bt: jax.Array,
    mask: masks.Mask,
    spec: PartitionSpec,
    interpret: bool,
) -> jax.Array:
    """Self-attention of one sequence, each device on its own rows and heads.

    Args:
      q_btnh, k_btkh, v_btkh: queries, keys and values, partitioned by ``spec``; ``n`` is a multiple of ``k`` on every
        device.
      real_bt: bool; real tokens see real tokens only. Partitioned like the batch.
      mask: the mask, for ``padded_length(t)`` tokens.
      interpret: run the kernel as plain XLA operations, on any platform.

    Returns:
      ``[b, t, n, h]`` in the dtype of ``q``.
    """
    tokens, width = q_btnh.shape[1], q_btnh.shape[3]
    padded = padded_length(tokens)
    block = min(_BLOCK, padded)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array) -> jax.Array:
        heads = masks.MultiHeadMask([mask] * q.shape[2])
        kernel = splash.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
        # Whole blocks of tokens, with heads as leading axis. A narrow head is padded with zeros, which change no score.
        widen = -width % _LANES
        pad = lambda a: jnp.pad(a, ((0, 0), (0, padded - tokens), (0, 0), (0, widen)))  # noqa: E731
        q, k, v = (jnp.swapaxes(pad(a), 1, 2) for a in (q * jnp.asarray(width**-0.5, q.dtype), k, v))
        # Padding sees padding, so that no row is empty.
        segment = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, padded - tokens)))
        out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=splash.SegmentIds(s, s)))(q, k, v, segment)
        return jnp.swapaxes(out, 1, 2)[:, :tokens, :, :width]

    specs = (spec, spec, spec, PartitionSpec(spec[0], None))
    # check_vma=False: the kernel's own calls do not declare over which axes their results vary.
    return jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)(q_btnh, k_btkh, v_btkh, real_bt)


def live_scores(prompt: int, length: int, tokens: int) -> int:
    """The number of scores that the kernel computes for one head of a stream: those in non-empty blocks of the mask."""
    mask = PrefixGroupMask(prompt, length, padded_length(tokens))
    block = min(_BLOCK, padded_length(tokens))
    edges = [slice(first, first + block) for first in range(0, padded_length(tokens), block)]
    return sum(block**2 for queries in edges for keys in edges if mask[queries, keys].any())
