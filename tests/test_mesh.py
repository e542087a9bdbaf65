import dataclasses
import os
import subprocess
import sys
from glob import glob
from types import SimpleNamespace

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from tiny import DIMS

from segzero_jax.mesh import AXES, ROLLOUT, TRAIN, MeshError, kv_copies, make_mesh, parse_mesh
from segzero_jax.model.dims import Dims, VisionDims
from segzero_jax.model.weights import check_fits, read_dims

SIZES = st.integers(1, 4096)
VISION = VisionDims(hidden=1280, depth=32, heads=16, mlp=3420, out=3584)
SEVEN = Dims(152064, 3584, 28, 28, 4, 18944, (16, 24, 24), tied=False, vision=VISION)
THREE = Dims(151936, 2048, 36, 16, 2, 11008, (16, 24, 24), True, dataclasses.replace(VISION, out=2048))


@given(SIZES, SIZES, SIZES)
def test_a_mesh_is_two_or_three_sizes(data, fsdp, tensor):
    assert parse_mesh(f"{fsdp}x{tensor}") == (1, fsdp, tensor)
    assert parse_mesh(f"{data}X{fsdp}x{tensor}") == (data, fsdp, tensor)


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "4x4x4x4", "-1x4", "4 x 4", "4x4.0", "²x2", "fourxfour"])
def test_anything_else_is_refused_in_one_line(text):
    with pytest.raises(MeshError) as error:
        parse_mesh(text)
    assert str(error.value) == f"--mesh={text}: expected FSDPxTENSOR or DATAxFSDPxTENSOR, such as 4x4 or 2x4x4"


@pytest.mark.parametrize(("text", "shape"), [("1x1", (1, 1, 1)), ("4x4", (1, 4, 4)), ("2x4x2", (2, 4, 2))])
def test_a_mesh_has_explicit_axes_over_the_first_devices(text, shape):
    mesh = make_mesh(text)
    assert mesh.axis_names == AXES
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert set(mesh.devices.flat) <= set(jax.devices())


def test_too_few_devices_are_named():
    with pytest.raises(
        MeshError, match=r"^--mesh=8x4: needs 32 devices, this job has 16 \(cpu\); choose factors of that$"
    ):
        make_mesh("8x4")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_accelerators_must_all_be_used(platform, monkeypatch):
    devices = [SimpleNamespace(platform=platform, device_kind="some chip")] * 8
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(MeshError, match="needs 4 devices, this job has 8"):
        make_mesh("2x2")


def test_a_cpu_shows_as_many_devices_as_asked_for():
    code = "from segzero_jax import mesh; mesh.prepare_cpu('3x2'); print(mesh.make_mesh('3x2').size)"
    environment = {"JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "6\n", done.stderr


def test_a_layout_turns_logical_axes_into_mesh_axes():
    assert TRAIN.spec(None, "embed", "heads", None) == PartitionSpec(None, "fsdp", "tensor", None)
    assert TRAIN.spec("batch", None) == PartitionSpec(("data", "fsdp"), None)
    assert ROLLOUT.spec("vocab", "embed") == PartitionSpec(("fsdp", "tensor"), None)
    assert TRAIN.over("heads") == ("tensor",)
    assert ROLLOUT.over("mlp") == ("fsdp", "tensor")
    assert ROLLOUT.over("embed") == ()


@pytest.mark.parametrize(("mesh", "copies"), [("1x1", 1), ("1x2", 1), ("1x4", 2), ("2x8", 4)])
def test_two_key_value_heads_are_repeated_up_to_the_tensor_axis(mesh, copies):
    with jax.set_mesh(make_mesh(mesh)):
        assert kv_copies(2) == copies


def abstract(text: str) -> AbstractMesh:
    return AbstractMesh(parse_mesh(text), AXES)


@pytest.mark.parametrize(
    ("dims", "mesh", "batch"),
    [
        *((read_dims("toy"), mesh, 16) for mesh in ("1x1", "4x4", "2x4x2", "16x1")),
        (SEVEN, "4x4", 16),
        (SEVEN, "2x4x4", 16),
        (SEVEN, "8x4", 128),
        (THREE, "2x4", 16),
        (THREE, "4x4", 16),
        (DIMS, "4x4", 16),
    ],
)
def test_what_fits(dims, mesh, batch):
    check_fits(abstract(mesh), dims, batch, batch)


REFUSED = [
    (DIMS, "4x4", 6, 6, "6 prompts cannot be split evenly over data x fsdp = 4 (train)"),
    (DIMS, "2x4x2", 16, 4, "4 prompts of a micro-batch cannot be split evenly over data x fsdp = 8 (train)"),
    (SEVEN, "2x8", 16, 16, "28 attention heads cannot be split evenly over tensor = 8 (train)"),
    (THREE, "3x1", 3, 3, "2048 units of the model width cannot be split evenly over fsdp = 3 (train)"),
    (dataclasses.replace(DIMS, mlp=126), "1x4", 16, 16, "126 MLP units cannot be split evenly over tensor = 4 (train)"),
    (
        dataclasses.replace(DIMS, mlp=136),
        "4x4",
        16,
        16,
        "136 MLP units cannot be split evenly over fsdp x tensor = 16 (rollout)",
    ),
    (
        dataclasses.replace(DIMS, vocab=500),
        "4x4",
        16,
        16,
        "500 vocabulary entries cannot be split evenly over fsdp x tensor = 16 (rollout)",
    ),
    (
        dataclasses.replace(DIMS, heads=18, kv_heads=3, hidden=144),
        "1x2",
        16,
        16,
        "3 key-value heads and tensor = 2: neither is a multiple of the other",
    ),
    (DIMS, "1x8", 16, 16, "4 attention heads of the vision tower cannot be split evenly over tensor = 8 (train)"),
]


@pytest.mark.parametrize(("dims", "mesh", "batch", "micro_batch", "message"), REFUSED)
def test_what_does_not_fit_is_named_in_one_line(dims, mesh, batch, micro_batch, message):
    with pytest.raises(MeshError) as error:
        check_fits(abstract(mesh), dims, batch, micro_batch)
    assert str(error.value).startswith(f"--mesh={mesh}: {message}; choose another mesh")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 36}, "36 units of the vision tower's width cannot be split evenly over fsdp = 8"),
        ({"mlp": 66}, "66 MLP units of the vision tower cannot be split evenly over tensor = 4"),
        (
            {"hidden": 24, "heads": 16, "merge": 1},
            "24 units of the vision merger cannot be split evenly over tensor = 16",
        ),
        ({"out": 68}, "68 units of the vision output cannot be split evenly over fsdp = 8"),
    ],
)
def test_the_vision_tower_must_fit_too(change, message):
    dims = dataclasses.replace(DIMS, vision=dataclasses.replace(DIMS.vision, **change))
    with pytest.raises(MeshError, match=message):
        check_fits(abstract("8x16" if "heads" in change else "8x4"), dataclasses.replace(dims, heads=16), 16, 16)


def test_a_machine_without_a_tpu_hears_nothing_of_libtpu() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS" and not name.startswith("TPU_")
    }
    code = "from segzero_jax.mesh import make_mesh, prepare_cpu; prepare_cpu('1x2'); make_mesh('1x2')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    # Where there is a TPU, it may be busy or have more devices.
    may_be_one = glob("/dev/accel*") + glob("/dev/vfio/*")
    assert may_be_one or (done.returncode == 0 and "tpu" not in done.stderr.lower()), done.stderr
