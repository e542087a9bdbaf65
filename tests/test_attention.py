"""The ways of computing attention over a stream: kernels and XLA.

On CPU splash attention is interpreted, and what is laid out for cuDNN is computed by XLA in its place.
Contract: results and gradients of a kernel are within 2e-6 of XLA's in float32, and within 1e-2 in bfloat16, relative
to the largest number of each. Rows of padding are not compared: nothing reads them. On a GPU the kernel is cuDNN's, for
bfloat16 alone, and is within 1e-2 of XLA's in float32: ``JAX_PLATFORMS=cuda pytest tests/test_attention.py -k agrees``.
"""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import DIMS, load_processor, prompts, random_policy

from segzero_jax.config import GrpoConfig, TrainConfig
from segzero_jax.grpo import LossConfig, UpdateBatch, counted, group_loss, initial_state, make_optimizer, update
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.attention import (
    Kernel,
    KeyValue,
    Stream,
    attend_image,
    attend_stream,
    attend_windows,
    choose_kernel,
)
from segzero_jax.model.policy import ForwardConfig
from segzero_jax.model.splash import PrefixGroupMask, live_scores, padded_length
from segzero_jax.types import Rollout

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
KERNELS: tuple[Kernel, ...] = ("splash_interpreted", "cudnn")
# What XLA's attention computes in beside the kernel, which computes in the dtype in front.
BESIDE = {dtype: dtype for dtype in TOLERANCE}
if jax.default_backend() == "gpu":
    KERNELS = ("cudnn",)
    BESIDE = {"bfloat16": "float32"}
SPEC = TRAIN.spec("batch", None, "heads", None)


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """That kernel, computed by XLA where there is no GPU, on cuDNN's conditions."""
    whole = jax.nn.dot_product_attention

    def attend(*qkv: jax.Array, mask: jax.Array | None, implementation: str, **how: Any) -> jax.Array:
        out = whole(*qkv, mask=mask, **how)
        if mask is None:
            return out
        assert not any(length % 2 for length in mask.shape[2:]), "lengths beside a mask are even"
        # Gradients of a query that sees nothing are no numbers, whatever they are multiplied by.
        return out * jnp.where(mask.any(-1), 1, jnp.nan).astype(out.dtype)[:, 0, :, None, None]

    if jax.default_backend() != "gpu":
        monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    return "cudnn"


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Each kernel that this machine can compute, or have computed in its place."""
    return request.getfixturevalue("cudnn") if request.param == "cudnn" else request.param


class Case(NamedTuple):
    """A stream, how many tokens of each prompt are real, and the heads."""

    stream: Stream
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    width: int


CASES = {
    "grouped heads, a padded prompt": Case(Stream(72, 3, 40), (72, 50), 4, 2, 128),
    "several blocks": Case(Stream(301, 2, 169), (211,), 4, 2, 128),
    "narrow heads, odd lengths": Case(Stream(40, 8, 15), (40, 1), 2, 2, 24),
    "no responses": Case(Stream(130, 0, 0), (130, 99), 2, 2, 80),
}


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.device_put(jnp.asarray(rng.standard_normal(shape), dtype), SPEC)


def real_tokens(case: Case) -> np.ndarray:
    """Bool ``[b, t]``."""
    prompt = np.arange(case.stream.prompt)[None] < np.asarray(case.lengths)[:, None]
    return np.pad(prompt, ((0, 0), (0, case.stream.tokens - case.stream.prompt)), constant_values=True)


@pytest.mark.parametrize("dtype", BESIDE)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_agrees_on_a_stream_and_its_gradients(name: str, dtype: str, kernel: Kernel) -> None:
    case, rng = CASES[name], np.random.default_rng(0)
    b, t = len(case.lengths), case.stream.tokens
    real = real_tokens(case)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
        mask = jnp.asarray(real[:, : case.stream.prompt])
        out = attend_stream(q, KeyValue(k, v), case.stream, mask, kernel, SPEC)
        return (out * weights * real[..., None, None]).astype(jnp.float32).sum(), out

    with jax.set_mesh(make_mesh("1x1")):
        q = normal(rng, (b, t, case.heads, case.width), dtype)
        k, v = (normal(rng, (b, t, case.kv_heads, case.width), dtype) for _ in range(2))
        weights = normal(rng, (b, t, case.heads, case.width), dtype)
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        found = jax.device_get(run(q, k, v, kernel))
        expected = jax.device_get(run(*(a.astype(BESIDE[dtype]) for a in (q, k, v)), "xla"))
    (gradients, out), (expected_gradients, expected_out) = found, expected
    for left, right in zip((*gradients, out[real]), (*expected_gradients, expected_out[real]), strict=True):
        left, right = left.astype(np.float32), right.astype(np.float32)
        assert np.abs(left - right).max() <= TOLERANCE[dtype] * np.abs(right).max()


@pytest.mark.parametrize("dtype", BESIDE)
def test_a_kernel_agrees_on_images_with_invalid_slots_and_their_gradients(dtype: str, kernel: Kernel) -> None:
    """Of the third image all slots are invalid: it is the second picture of a prompt that has one."""
    rng = np.random.default_rng(0)
    valid = rng.random((3, 192)) < np.array([[0.8], [0.8], [0]])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, kernel: Kernel) -> tuple[jax.Array, jax.Array]:
        out = attend_image(q, KeyValue(k, v), valid, kernel, SPEC)
        return (out * weights * valid[..., None, None]).astype(jnp.float32).sum(), out

    with jax.set_mesh(make_mesh("1x1")):
        q, k, v, weights = (normal(rng, (3, 192, 2, 80), dtype) for _ in range(4))
        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        found = jax.device_get(run(q, k, v, kernel))
        expected = jax.device_get(run(*(a.astype(BESIDE[dtype]) for a in (q, k, v)), "xla"))
    (gradients, out), (expected_gradients, expected_out) = found, expected
    for left, right in zip((*gradients, out[valid]), (*expected_gradients, expected_out[valid]), strict=True):
        left, right = left.astype(np.float32), right.astype(np.float32)
        assert np.abs(left - right).max() <= TOLERANCE[dtype] * np.abs(right).max()


@pytest.mark.parametrize("dtype", BESIDE)
def test_a_kernel_agrees_on_windows_with_every_patch_by_hand(dtype: str, kernel: Kernel) -> None:
    """In every run the last slots are empty, and no patch is of the window that they are said to be of."""
    rng = np.random.default_rng(0)
    valid = np.tile(np.arange(64) < 60, (2, 5, 1))
    window = np.where(valid, rng.integers(0, 3, (2, 5, 64)), 3)
    seen = (window[:, :, :, None] == window[:, :, None]) & valid[:, :, None]
    everywhere = np.zeros((2, 320, 320), bool)
    for run in range(5):
        part = slice(64 * run, 64 * (run + 1))
        everywhere[:, part, part] = seen[:, run]
    real = valid.reshape(2, 320)

    def by_kernel(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_windows(q, KeyValue(k, v), jnp.asarray(seen), kernel, SPEC)

    def by_hand(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / np.sqrt(80)
        every = jax.nn.softmax(jnp.where(everywhere[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", every, v, precision="highest")

    def run(attend: Callable[..., jax.Array], *qkv: jax.Array) -> list[np.ndarray]:
        def loss(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attend(*qkv)
            return (out * weights * real[..., None, None]).astype(jnp.float32).sum(), out

        gradients, out = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv))
        return [np.asarray(a, np.float32) for a in (*gradients, out[real])]

    with jax.set_mesh(make_mesh("1x1")):
        *qkv, weights = (normal(rng, (2, 320, 2, 80), dtype) for _ in range(4))
        found = run(by_kernel, *qkv)
        expected = run(by_hand, *(a.astype(jnp.float32) for a in qkv))
    for left, right in zip(found, expected, strict=True):
        assert np.abs(left - right).max() <= TOLERANCE[dtype] * np.abs(right).max()


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(0, 4), st.integers(1, 20), st.integers(0), st.integers(0))
def test_who_sees_whom(prompt: int, group: int, length: int, query: int, key: int) -> None:
    """A prompt token sees earlier prompt tokens; a response token sees the prompt and its own earlier tokens."""
    tokens = prompt + group * length
    query, key = query % tokens, key % tokens
    response = lambda token: -1 if token < prompt else (token - prompt) // length  # noqa: E731
    seen = key <= query and response(key) in (-1, response(query))
    mask = PrefixGroupMask(prompt, length, padded_length(tokens))
    assert mask[query : query + 1, key : key + 1].item() == seen


def test_empty_blocks_are_skipped() -> None:
    """At P = 1024, G = 8, R = 512: 27 of 100 blocks, where causal attention computes 55."""
    assert live_scores(1024, 512, 1024 + 8 * 512) == 27 * 512**2
    assert live_scores(5120, 1, 5120) == 55 * 512**2


def test_a_stream_too_long_for_the_kernel_is_one_line() -> None:
    with pytest.raises(ValueError, match="expected at most 131072 and 16384"):
        PrefixGroupMask(1000, 20000, 21504)


def test_streams_of_one_length_have_masks_of_their_own() -> None:
    """The kernel remembers what it found out about a mask that is equal."""
    laid_out = [(300, 170), (300, 85), (470, 170)]
    assert len({PrefixGroupMask(prompt, length, 640) for prompt, length in 2 * laid_out}) == 3


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),  # cuDNN has none
        ("cpu", "bfloat16", "xla"),
    ],
)
def test_every_platform_has_its_kernel(platform: str, dtype: str, kernel: Kernel) -> None:
    mesh: Any = SimpleNamespace(devices=np.array([[SimpleNamespace(platform=platform)]]))
    assert choose_kernel(mesh, jnp.dtype(dtype)) == kernel


# cuDNN's kernels come with cuBLAS's products, for which the vision tower's MLP is widened.
UNEVEN = replace(DIMS, vision=replace(DIMS.vision, mlp=60))


def learning() -> tuple[UpdateBatch, LossConfig]:
    """Four prompt groups, with pictures, and a loss of all its parts."""
    processor, rng = load_processor(), np.random.default_rng(0)
    b, g, r = 4, 2, 8
    losses = LossConfig(GrpoConfig(entropy_coef=0.01), 1.0, processor.visual_ids, False, max_tokens=r)
    rollout = Rollout(
        tokens_bgr=rng.integers(300, 500, (b, g, r), dtype=np.int32),
        length_bg=rng.integers(1, r + 1, (b, g), dtype=np.int32),
        logps_bgr=-rng.random((b, g, r), np.float32),
        finished_bg=np.ones((b, g), bool),
    )
    batch = UpdateBatch(
        prompts(b, processor), rollout, rng.standard_normal((b, g)).astype(np.float32), np.ones((b, g), bool),
        -rng.random((b, g, r), np.float32),
    )  # fmt: skip
    put = lambda x: jax.device_put(x, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))  # noqa: E731
    return jax.tree.map(put, batch), losses


@pytest.mark.parametrize("mesh", ["1x1", "4x4"])
def test_the_whole_policy_with_a_kernel(mesh: str, kernel: Kernel) -> None:
    """Loss and gradients of prefix groups with pictures, each device with its own rows and heads."""
    results = []
    with jax.set_mesh(make_mesh(mesh)):
        policy, (batch, losses) = random_policy(UNEVEN), learning()
        for chosen in (kernel, "xla"):
            fwd = ForwardConfig(UNEVEN, TRAIN, jnp.dtype("float32"), True, chosen, written_out=chosen == "cudnn")
            run = jax.jit(jax.value_and_grad(lambda p, s=fwd: group_loss(p, batch, counted(batch), s, losses)[0]))
            results.append(jax.device_get(run(policy)))
    (loss, gradients), (expected_loss, expected_gradients) = results
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for left, right in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert np.abs(left - right).max() <= 1e-5 * max(np.abs(right).max(), 1e-3)


def test_an_update_on_a_gpu_loops_over_blocks_only_to_save_memory(cudnn: Kernel) -> None:
    optimizer = make_optimizer(TrainConfig(), freeze_vision=False)
    with jax.set_mesh(make_mesh("1x1")):
        state, (batch, losses) = initial_state(random_policy(), optimizer), learning()

        def loops(remat: bool) -> int:
            fwd = ForwardConfig(DIMS, TRAIN, jnp.dtype("float32"), remat, cudnn)
            options = {"optimizer": optimizer, "fwd": fwd, "loss_config": losses, "micro_batches": 1}
            return str(update.trace(state, batch, **options).jaxpr).count("scan[")

        assert loops(remat=False) == 2  # over chunks of log-probabilities, forward and backward
        assert loops(remat=True) > 2
