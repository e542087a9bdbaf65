"""Attention in chunks of queries against ``attend``, which holds all scores at once: results and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from segzero_jax.mesh import make_mesh
from segzero_jax.model import attention, chunked
from segzero_jax.model.attention import KeyValue, Stream, attend, attend_image, attend_stream

# Contracts, of the largest number.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
B, HEADS, KV_HEADS, WIDTH = 2, 8, 2, 16
SPEC = PartitionSpec(("data", "fsdp"), None, "tensor", None)
# Queries of 37 tokens in chunks that do not divide them, of 13 more than one, and a single token.
STREAMS = [Stream(37, 3, 13), Stream(37, 0, 0), Stream(5, 2, 1)]


def arrays(tokens: int, dtype: str) -> tuple[jax.Array, KeyValue, np.ndarray]:
    rng = np.random.default_rng(tokens)
    shapes = [(B, tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    place = NamedSharding(jax.sharding.get_mesh(), SPEC)
    q, k, v = (jax.device_put(rng.standard_normal(shape).astype(dtype), place) for shape in shapes)
    return q, KeyValue(k, v), rng.standard_normal(shapes[0]).astype(np.float32)


def whole_stream(q: jax.Array, kv: KeyValue, stream: Stream, prompt_mask: jax.Array) -> jax.Array:
    """Every row of every group as the plain sequence it stands for."""
    p, g, r = stream
    prompt = attend(
        q[:, None, :p], KeyValue(*(a[:, None, :p] for a in kv)), jnp.tril(jnp.ones((p, p), bool))[None, None]
    )[:, 0]
    parts = [prompt]
    for i in range(g):
        rows = slice(p + i * r, p + (i + 1) * r)
        keys = KeyValue(*(jnp.concatenate([a[:, :p], a[:, rows]], 1)[:, None] for a in kv))
        seen = jnp.concatenate([jnp.broadcast_to(prompt_mask[:, None], (B, r, p)), jnp.tril(jnp.ones((B, r, r)))], 2)
        parts.append(attend(q[:, None, rows], keys, seen.astype(bool)[:, None])[:, 0])
    return jnp.concatenate(parts, axis=1)


def assert_same(run: Any, plain: Any, args: tuple, dtype: str, real: Any = slice(None)) -> None:
    found, expected = (jax.device_get(jax.jit(f)(*args)) for f in (run, plain))
    pairs = [(found[0][real], expected[0][real]), *zip(found[1:], expected[1:], strict=True)]
    for left, right in pairs:
        left, right = (np.asarray(x, np.float32) for x in (left, right))
        assert np.abs(left - right).max() <= TOLERANCE[dtype] * np.abs(right).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_a_stream(stream: Stream, mesh: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", 1)
    monkeypatch.setattr(chunked, "_LEAST_QUERIES", 5)
    with jax.set_mesh(make_mesh(mesh)):
        q, kv, weights = arrays(stream.tokens, dtype)
        prompt_mask = jnp.arange(stream.prompt) < jnp.array([[stream.prompt], [4]])
        # What stands in padding is read by nobody.
        real = np.concatenate([prompt_mask, np.ones((B, stream.group * stream.length), bool)], axis=1)
        weights *= real[..., None, None]

        def with_gradients(attention: Any) -> Any:
            def run(q: jax.Array, kv: KeyValue) -> tuple:
                out, pull = jax.vjp(attention, q, kv)
                dq, dkv = pull(jax.sharding.reshard(jnp.asarray(weights).astype(out.dtype), SPEC))
                return out, dq, *dkv

            return run

        ours = with_gradients(lambda q, kv: attend_stream(q, kv, stream, prompt_mask, "xla", SPEC))
        plain = with_gradients(lambda q, kv: whole_stream(q, kv, stream, prompt_mask))
        assert_same(ours, plain, (q, kv), dtype, real)


def test_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "_CHUNK_SCORES", 1)
    with jax.set_mesh(make_mesh("1x1")):
        q, kv, _ = arrays(50, "float32")
        kv = KeyValue(*(jnp.repeat(a, HEADS // KV_HEADS, axis=2, out_sharding=SPEC) for a in kv))
        valid = jnp.asarray(np.random.default_rng(0).random((B, 50)) < 0.7)
        ours = lambda q, kv: (attend_image(q, kv, valid, "xla", SPEC),)  # noqa: E731
        plain = lambda q, kv: (  # noqa: E731
            attend(q[:, None], KeyValue(*(a[:, None] for a in kv)), valid[:, None, None])[:, 0],
        )
        assert_same(ours, plain, (q, kv), "float32")


def test_scores_exist_for_a_chunk_at_a_time() -> None:
    """The program's temporaries grow with the tokens, not with their square."""

    def temporaries(tokens: int) -> int:
        shape = jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.float32)
        valid = jnp.ones((1, tokens), bool)
        loss = lambda q, k, v: attend_image(q, KeyValue(k, v), valid, "xla", PartitionSpec()).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    with jax.set_mesh(make_mesh("1x1")):
        small, large = temporaries(4096), temporaries(16384)
    # Weights and slopes of a chunk, as large for both, and eight arrays of the queries' size.
    assert large - small <= 10 * 4 * 2 * 64 * (16384 - 4096)


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
@pytest.mark.parametrize("shape", [(2, 8, 7, 1300, 1408), (2, 8, 7, 40, 64), (4, 64, 4, 1300, 1408)])
def test_a_chunk_is_as_large_as_its_scores_may_be(
    shape: tuple[int, int, int, int, int], mesh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every device, those of the keys that all groups share included; never of fewer queries than pay."""
    k, g, q, length, prompt = shape
    found: list[int] = []
    monkeypatch.setattr(chunked, "_attend", lambda q, own, shared, first, chunks: found.append(chunks) or q)
    array = lambda *shape: jax.ShapeDtypeStruct((1, k, *shape, WIDTH), jnp.bfloat16)  # noqa: E731
    own, shared = (chunked.Keys(keys, keys) for keys in (array(g, length), array(prompt)))
    with jax.set_mesh(make_mesh(mesh)):
        room = 4 * 2**20 * jax.sharding.get_mesh().size
        jax.eval_shape(lambda *given: chunked.chunked_attention(*given, first=0), array(g, q, length), own, shared)
    (chunks,) = found
    most = max(room // (k * g * q * (length + prompt)), 16)
    assert -(-length // chunks) <= most
    assert chunks == 1 or -(-length // (chunks - 1)) > most


@pytest.mark.parametrize(("tokens", "runs"), [(1024, [256] * 4), (1100, [275] * 4), (300, [128, 128, 44]), (50, [50])])
def test_a_prompt_sees_no_keys_behind_its_runs(tokens: int, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the square of scores, that leaves ten of sixteen parts to compute."""
    found: list[tuple[int, int]] = []
    whole = attention._attend_long

    def attend(q: jax.Array, own: KeyValue, **how: Any) -> jax.Array:
        found.append((q.shape[2], own.k.shape[2]))
        return whole(q, own, **how)

    monkeypatch.setattr(attention, "_attend_long", attend)
    array = lambda *shape: jax.ShapeDtypeStruct((1, *shape), jnp.bfloat16)  # noqa: E731
    with jax.set_mesh(make_mesh("1x1")):
        run = lambda q, k: attend_stream(q, KeyValue(k, k), Stream(tokens, 0, 0), jnp.ones((1, tokens)), "xla", SPEC)  # noqa: E731
        jax.eval_shape(run, array(tokens, HEADS, WIDTH), array(tokens, KV_HEADS, WIDTH))
    assert found == list(zip(runs, np.cumsum(runs), strict=True))


def test_scores_and_what_they_weigh_are_summed_in_float32() -> None:
    """Of bfloat16 inputs no product of matrices is rounded, forward or backward, which XLA for CPUs would leave out."""
    stream, seen = STREAMS[0], jnp.ones((B, 1, 1, 13), bool)
    with jax.set_mesh(make_mesh("1x1")):
        q, kv, _ = arrays(stream.tokens, "bfloat16")
        mask = jnp.ones((B, stream.prompt), bool)
        loss = lambda q, kv: attend_stream(q, kv, stream, mask, "xla", SPEC).sum()  # noqa: E731
        own, prompt = KeyValue(*(a[:, None, :13] for a in kv)), KeyValue(*(a[:, : stream.prompt] for a in kv))
        programs = [
            str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(q, kv)),
            str(jax.make_jaxpr(attend)(q[:, None, :1], own, seen, prompt, mask)),
        ]
    for program in programs:
        assert "preferred_element_type=float32" in program
        assert "preferred_element_type=bfloat16" not in program


def test_a_prompt_that_matters_more_by_far_overflows_nothing() -> None:
    """One softmax over both: what is taken off its scores is the largest of all, a prompt's too."""
    stream = STREAMS[0]
    with jax.set_mesh(make_mesh("1x1")):
        q, (k, v), _ = arrays(stream.tokens, "float32")
        kv = KeyValue(k * jnp.where(jnp.arange(stream.tokens) < stream.prompt, 100, 0.1)[:, None, None], v)
        mask = jnp.ones((B, stream.prompt), bool)
        ours = lambda q, kv: attend_stream(q, kv, stream, mask, "xla", SPEC)  # noqa: E731
        found, gradients = jax.jit(lambda q, kv: (ours(q, kv), jax.grad(lambda *x: ours(*x).sum())(q, kv)))(q, kv)
        expected = jax.jit(lambda q, kv: whole_stream(q, kv, stream, mask))(q, kv)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.isfinite(gradients).all()
