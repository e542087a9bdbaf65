"""Linear layers: the result is einsum's, and gradients of weights stay float32."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import DIMS, random_policy

from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.layers import linear, rms_norm, rotate
from segzero_jax.model.policy import ForwardConfig, _embed

ANY = PartitionSpec()
CASES = {
    "one axis": ("btd,df->btf", (2, 5, 8), (8, 6), None),
    "with a bias": ("btd,dnh->btnh", (2, 5, 8), (8, 3, 4), (3, 4)),
    "two axes summed": ("btnh,nhd->btd", (2, 5, 3, 4), (3, 4, 8), (8,)),
    "fused projections": ("bsd,dcnh->cbsnh", (2, 5, 8), (8, 3, 2, 4), (3, 2, 4)),
    "a weight the other way round": ("bgd,vd->bgv", (2, 5, 8), (16, 8), None),
}


def numbers(*shapes: tuple[int, ...] | None) -> list[jax.Array | None]:
    rng = np.random.default_rng(0)
    return [None if shape is None else jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_einsum(case: str) -> None:
    subscripts, *shapes = CASES[case]

    def plain(x, weight, bias):
        y = jnp.einsum(subscripts, x, weight)
        if bias is None:
            return (y**2).sum()
        rest = [axis for axis, letter in enumerate(subscripts.split("->")[1]) if letter in subscripts.split(",")[0]]
        return ((y + jnp.expand_dims(bias, rest)) ** 2).sum()

    with jax.set_mesh(make_mesh("1x1")):
        arguments = numbers(*shapes)
        ours = lambda *arguments: (linear(subscripts, *arguments, ANY) ** 2).sum()  # noqa: E731
        found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arguments)
        expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4), found, expected)


def test_a_gradient_is_summed_over_devices_in_float32() -> None:
    """16 devices with a row each: plain differentiation rounds each share to bfloat16 first and is ten times off."""
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh("16x1")):
        x = jax.device_put(jnp.asarray(rng.random((16, 64, 32)), jnp.bfloat16), PartitionSpec("fsdp", None, None))
        weight = jnp.asarray(rng.standard_normal((32, 24)), jnp.float32)
        bias = jnp.zeros(24)
        scale = jnp.asarray(rng.random((16, 64, 24)), jnp.bfloat16)
        scale = jax.device_put(scale, PartitionSpec("fsdp", None, None))
        rows = PartitionSpec("fsdp", None, None)

        def plain(weight, bias):
            y = jnp.einsum("btd,df->btf", x, weight.astype(x.dtype), out_sharding=rows) + bias.astype(x.dtype)
            return (y * scale).astype(jnp.float32).sum()

        def ours(weight, bias):
            return (linear("btd,df->btf", x, weight, bias, rows) * scale).astype(jnp.float32).sum()

        gradients = [jax.device_get(jax.jit(jax.grad(f, argnums=(0, 1)))(weight, bias)) for f in (ours, plain)]
    exact = np.einsum("btd,btf->df", np.asarray(x, np.float64), np.asarray(scale, np.float64))
    errors = [np.abs(np.asarray(dw) - exact).max() / exact.max() for dw, _ in gradients]
    assert errors[0] < 1e-6
    assert errors[0] < errors[1] / 10
    bias_errors = [np.abs(np.asarray(db) - np.asarray(scale, np.float64).sum((0, 1))).max() for _, db in gradients]
    assert bias_errors[0] < bias_errors[1] / 10


@pytest.mark.parametrize(
    ("computed", "shape", "roundings"),
    [(lambda x, scale: rms_norm(x, scale, 1e-6), (8,), 3), (rotate, (1, 2, 4), 1)],
    ids=["norm", "rotation"],
)
def test_of_bfloat16_activations_results_alone_are_rounded(
    computed: Callable[..., jax.Array], shape: tuple[int, ...], roundings: int
) -> None:
    """And a norm's scale and what it multiplies, as in Qwen2.5-VL. XLA for CPUs may leave other roundings out."""
    program = jax.make_jaxpr(computed)(jnp.ones((1, 2, 2, 8), "bfloat16"), jnp.ones(shape))
    made = [step.primitive.name for step in program.eqns for out in step.outvars if out.aval.dtype == "bfloat16"]
    assert made == ["convert_element_type"] * roundings


def test_the_gradient_of_a_norm_s_scale_is_not_rounded_to_what_activations_are() -> None:
    """Though the scale itself is, when it is used."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal((4, 64, 32)), "bfloat16") for _ in range(2))
    scale = jnp.asarray(1 + rng.standard_normal(32) / 3, "float32")
    scored = lambda scale: (rms_norm(x, scale, 1e-6).astype("float32") * weight).sum()  # noqa: E731
    found = np.asarray(jax.jit(jax.grad(scored))(scale))
    wide = np.asarray(x, np.float64)
    normed = np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6), jnp.bfloat16).astype(np.float64)
    np.testing.assert_allclose(found, (normed * np.asarray(weight, np.float64)).sum((0, 1)), rtol=1e-4)
    np.testing.assert_array_equal(rms_norm(x, scale, 1e-6), rms_norm(x, scale.astype("bfloat16"), 1e-6))


def test_the_gradient_of_a_token_s_embedding_is_summed_in_float32() -> None:
    """A thousand ones: in bfloat16 their sum would stay at 256."""
    tokens, fwd = np.full((1, 1000), 7), ForwardConfig(DIMS, TRAIN, jnp.dtype("bfloat16"))
    with jax.set_mesh(make_mesh("1x1")):
        loss = lambda policy: _embed(policy, tokens, fwd).astype(jnp.float32).sum()  # noqa: E731
        gradient = np.asarray(jax.jit(jax.grad(loss))(random_policy()).embed_vd[...])
    assert (gradient[7] == 1000).all()
    assert not np.delete(gradient, 7, axis=0).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types(dtype: str) -> None:
    with jax.set_mesh(make_mesh("1x1")):
        x, weight, bias = numbers((2, 5, 8), (8, 6), (6,))
        assert x is not None
        x = x.astype(dtype)
        assert linear("btd,df->btf", x, weight, bias, ANY).dtype == dtype
        assert linear("btd,df->btf", x, weight, None, ANY, jnp.float32).dtype == jnp.float32
        loss = lambda *arguments: linear("btd,df->btf", *arguments, ANY).astype(jnp.float32).sum()  # noqa: E731
        dx, dw, db = jax.grad(loss, argnums=(0, 1, 2))(x, weight, bias)
    assert (dx.dtype, dw.dtype, db.dtype) == (dtype, jnp.float32, jnp.float32)
