"""Which meshes are meshes, and which fit."""

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from segzero_jax.mesh import ROLLOUT, TRAIN, MeshError, make_mesh, parse_mesh
from segzero_jax.model.weights import check_fits, read_dims


def test_two_numbers_are_fsdp_and_tensor_three_begin_with_data() -> None:
    assert parse_mesh("4x2") == (1, 4, 2)
    assert parse_mesh("2x4x2") == (2, 4, 2)
    assert dict(make_mesh("4x2").shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert make_mesh("2x2x2").axis_types == (AxisType.Explicit,) * 3


@pytest.mark.parametrize("text", ["", "4", "4x", "0x4", "-1x4", "4x4x4x4", "axb", "4*4"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(MeshError, match="expected"):
        parse_mesh(text)


def test_a_mesh_larger_than_the_job_names_both_sides() -> None:
    with pytest.raises(MeshError, match=rf"64 devices.*{len(jax.devices())}"):
        make_mesh("8x8")


def test_layouts_name_mesh_axes() -> None:
    assert TRAIN.spec("batch", None, "heads") == P(("data", "fsdp"), None, "tensor")
    assert TRAIN.spec("embed", "mlp") == P("fsdp", "tensor")
    assert ROLLOUT.spec("embed", "mlp") == P(None, ("fsdp", "tensor"))
    assert ROLLOUT.spec("mlp_batch", None, "vocab") == P("data", None, ("fsdp", "tensor"))


@pytest.mark.parametrize("mesh", ["1x1", "4x4", "2x4x2", "16x1", "1x8", "2x1x8"])
def test_the_toy_policy_fits(mesh: str) -> None:
    if mesh in ("1x8", "2x1x8"):
        with pytest.raises(MeshError, match="4 attention heads of the vision tower do not divide by tensor = 8"):
            check_fits(make_mesh(mesh), read_dims("toy"), 16, 16)
    else:
        check_fits(make_mesh(mesh), read_dims("toy"), 16, 16)


@pytest.mark.parametrize(("batch", "micro"), [(6, 4), (8, 2)])
def test_prompts_must_divide(batch: int, micro: int) -> None:
    with pytest.raises(MeshError, match=r"prompts.* do not divide by .*= 4"):
        check_fits(make_mesh("4x2"), read_dims("toy"), batch, micro)
