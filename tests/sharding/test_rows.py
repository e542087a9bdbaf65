"""Which rows of a batch a host reads and scores, and where slices lie in a mesh: on chips that are not there."""

import re
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from segzero_jax.mesh import AXES, FSDP, TRAIN, Layout, MeshError, arrange, batch_rows, prepare_cpu
from segzero_jax.model.dims import RELEASED
from segzero_jax.model.forward import training_layout
from segzero_jax.plan.slices import make_topology_mesh


@pytest.mark.parametrize("mesh", ["4x4", "16x1", "1x16", "2x4x2", "8x2"])
@pytest.mark.parametrize("size", [16, 32])
def test_every_row_is_held_where_its_shards_are_and_one_host_s_own(mesh: str, size: int) -> None:
    grid = make_topology_mesh(mesh, "v5e:4x4")
    hosts = sorted({device.process_index for device in grid.devices.flat})
    assert len(hosts) == 4
    sharding = NamedSharding(grid, TRAIN.spec("batch"))
    shares = [batch_rows(grid, size, host) for host in hosts]
    for host, rows in zip(hosts, shares, strict=True):
        needed: set[int] = set()
        for device, index in sharding.devices_indices_map((size,)).items():
            if device.process_index == host:
                assert index is not None
                needed |= set(range(*index[0].indices(size)))
        assert set(rows.held) == needed
        assert rows.held == sorted(rows.held)
        assert set(rows.own) <= needed
        assert len(rows.own) == size // 4
    assert sorted(row for rows in shares for row in rows.own) == list(range(size))


def test_hosts_that_tensor_spans_hold_the_same_rows() -> None:
    """A host of a v5e has 2 x 2 chips, so on 4x4 two hosts hold the same half of the batch."""
    shares = [batch_rows(make_topology_mesh("4x4", "v5e:4x4"), 8, host) for host in range(4)]
    assert [rows.held for rows in shares] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    assert [rows.own for rows in shares] == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(
    ("mesh", "micro_batch", "layout"),
    [
        ("4x4", 16, FSDP),
        ("4x4", 32, FSDP),
        ("4x4", 8, TRAIN),
        ("2x2x4", 16, FSDP),
        ("2x2x4", 4, TRAIN),
        # There is nothing to choose without a tensor axis.
        ("16x1", 16, TRAIN),
    ],
)
def test_prompts_alone_are_divided_where_every_device_has_some(mesh: str, micro_batch: int, layout: Layout) -> None:
    dims = RELEASED["Qwen/Qwen2.5-VL-7B-Instruct"]
    grid = make_topology_mesh(mesh, "v5e:4x4")
    assert training_layout(dims, grid, micro_batch) is layout
    # Four divide this width, eight do not.
    assert training_layout(replace(dims, hidden=3588), grid, micro_batch) is TRAIN


def two_slices() -> Sequence[jax.Device]:
    make_topology_mesh("4x4", "v5e:4x4")  # sets what libtpu asks for
    found = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", chips_per_host_bounds=(2, 2, 1), num_slices=2
    )
    # As a job may list them: in no order of slices.
    return sorted(found.devices, key=lambda device: (device.coords, device.slice_index))


@pytest.mark.parametrize("mesh", ["2x4x4", "4x2x4", "2x16x1"])
def test_only_the_data_axis_goes_from_slice_to_slice(mesh: str) -> None:
    grid = arrange(mesh, two_slices())
    assert grid.axis_names == AXES
    assert "x".join(map(str, grid.axis_sizes)) == mesh
    slices = np.vectorize(lambda device: device.slice_index)(grid.devices)
    per_slice = grid.shape["data"] // 2
    assert [set(part.flat) for part in slices] == [{0}] * per_slice + [{1}] * per_slice
    assert len(set(grid.devices.flat)) == 32


@pytest.mark.parametrize(("mesh", "given"), [("8x4", 1), ("1x8x4", 1)])
def test_slices_that_do_not_divide_data_are_refused(mesh: str, given: int) -> None:
    with pytest.raises(MeshError) as error:
        arrange(mesh, two_slices())
    assert str(error.value) == (
        f"--mesh={mesh}: data = {given} does not divide among 2 slices of 16 chips; expected DATAxFSDPxTENSOR with "
        "data a multiple of 2, such as 2x4x4"
    )


def test_a_virtual_mesh_must_divide_among_its_processes() -> None:
    with pytest.raises(MeshError, match=re.escape("--mesh=3x2: 6 devices do not divide among 4 processes")):
        prepare_cpu("3x2", 4)
