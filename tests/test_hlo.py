"""Costs of compiled programs against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from segzero_jax.mesh import make_mesh
from segzero_jax.plan.cost import Kernel, Program
from segzero_jax.plan.groups import crossed_axes
from segzero_jax.plan.hlo import HloError


def compiled(function, *shapes: tuple[int, ...]) -> Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def step(x, w):
        return jnp.tanh(x @ w), None

    program = compiled(lambda x, ws: jax.lax.scan(step, x, ws)[0], (8, 32), (7, 32, 32))
    assert program.cost.flops == 7 * 2 * 8 * 32 * 32


def test_loops_in_loops():
    def outer(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0] * 2.0, None

    program = compiled(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (8, 32), (3, 5, 32, 32))
    assert program.cost.flops == 3 * 5 * 2 * 8 * 32 * 32


def test_a_slice_is_read_not_the_array_it_is_taken_of():
    """Twenty layers are read once in twenty steps, not twenty times."""
    program = compiled(lambda x, ws: jax.lax.scan(lambda x, w: (x + w.sum(0), None), x, ws)[0], (128,), (20, 512, 128))
    layer = 4 * 512 * 128
    assert 20 * layer <= program.cost.bytes <= 20 * layer * 4


GPU = """HloModule gpu

%one_layer (stack: f32[36,8,4]) -> bf16[1,8,4] {
  %stack = f32[36,8,4]{2,1,0} parameter(0)
  %narrow = bf16[36,8,4]{2,1,0} convert(%stack)
  ROOT %layer = bf16[1,8,4]{2,1,0} slice(%narrow), slice={[3:4], [0:8], [0:4]}
}

ENTRY %main (stack: f32[36,8,4]) -> bf16[1,8,4] {
  %weights = f32[36,8,4]{2,1,0} parameter(0)
  ROOT %out = bf16[1,8,4]{2,1,0} fusion(%weights), kind=kLoop, calls=%one_layer
}
"""


def test_a_slice_of_what_is_made_narrower_is_read_as_wide_as_it_was() -> None:
    assert Program(GPU).cost.bytes == 8 * 4 * 4 + 8 * 4 * 2


def test_a_loop_may_count_in_steps():
    """How XLA writes a product that is computed beside the permutation of its pieces."""
    run = lambda x, w: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 2, c[1] @ w), (0, x))[1]  # noqa: E731
    assert compiled(run, (8, 32), (32, 32)).cost.flops == 5 * 2 * 8 * 32 * 32


def test_a_loop_without_a_constant_end_is_refused():
    with pytest.raises(HloError, match="counts up to a constant"):
        _ = compiled(lambda x: jax.lax.while_loop(lambda x: x.sum() < 3, lambda x: x * 1.5, x), (8,)).cost


def test_a_conditional_is_refused():
    with pytest.raises(HloError, match="conditional"):
        _ = compiled(lambda x: jax.lax.cond(x.sum() < 3, jnp.sin, jnp.cos, x), (8,)).cost


def test_a_program_splits_at_the_loop_whose_body_is_a_scope():
    def prefill(x, w):
        # One operation bears the other loop's name, as when XLA finds that both need it.
        with jax.named_scope("turn"):
            x = jnp.tanh(x)
        return jnp.tanh(x @ w @ w) @ w, None

    def turn(x, w):
        with jax.named_scope("turn"):
            return jnp.tanh(x @ w @ w @ w), None

    run = lambda x, ws: jax.lax.scan(turn, jax.lax.scan(prefill, x, ws[:3])[0], ws)[0]  # noqa: E731
    around, each, turns = compiled(run, (8, 32), (7, 32, 32)).split("turn")
    product = 2 * 8 * 32 * 32
    assert (around.flops, each.flops, turns) == (3 * 3 * product, 3 * product, 7)


def test_loops_that_go_on_where_the_one_before_ended_are_one():
    """Nine turns of which the last four work on twice as much: a turn costs 13 / 9 of the first ones'."""

    def turns(end):
        def turn(carry):
            with jax.named_scope("turn"):
                return carry[0] + 1, jnp.tanh(carry[1] @ carry[2] @ carry[2] @ carry[2]), carry[2]

        return lambda carry: jax.lax.while_loop(lambda carry: carry[0] < end, turn, carry)

    def run(x, w):
        step, x, w = turns(5)((0, x, w))
        return turns(9)((step, jnp.concatenate([x, x]), w))[1]

    around, each, number = compiled(run, (8, 32), (32, 32)).split("turn")
    assert (around.flops, number) == (0, 9)
    assert each.flops == pytest.approx(3 * 2 * 8 * 32 * 32 * 13 / 9)


def test_what_is_no_program_is_refused():
    with pytest.raises(HloError, match="ENTRY"):
        Program("HloModule empty")


def test_collectives_by_kind_and_bytes_sent():
    """Over 4 chips in a ring a chip sends 3/4 of a gathered array, and twice 3/4 of a summed one."""
    with jax.set_mesh(make_mesh("4x1")):
        spec = PartitionSpec("fsdp", None)

        def run(x):
            whole = jax.sharding.reshard(x, PartitionSpec(None, None))
            return jnp.einsum("ij,ik->jk", x, x, out_sharding=PartitionSpec(None, None)), whole * 2

        x = jax.ShapeDtypeStruct(
            (64, 16), jnp.float32, sharding=jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
        )
        program = Program(jax.jit(run).lower(x).compile().as_text())
    assert program.cost.collectives == {"all-gather": 64 * 16 * 4 * 3 / 4, "all-reduce": 2 * 16 * 16 * 4 * 3 / 4}
    assert sorted(kind for kind, _ in program.collectives()) == ["all-gather", "all-reduce"]


TPU = """HloModule tpu

%all-reduce-scatter.1 (input.1: f32[64,32]) -> f32[64,8] {
  %input.1 = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0:T(8,128)} all-reduce(%input.1), channel_id=3, replica_groups={{0,4,8,12}}
  ROOT %slice.1 = f32[64,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={64,8}
}

%batched (a: bf16[4,16,8], b: bf16[4,16,8]) -> f32[4,16,16] {
  %a = bf16[4,16,8]{2,1,0} parameter(0)
  %b = bf16[4,16,8]{2,1,0} parameter(1)
  ROOT %c = f32[4,16,16]{2,1,0:S(1)} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
}

ENTRY %main (x: bf16[4,16,8], y: f32[64,32]) -> f32[64,8] {
  %x = bf16[4,16,8]{2,1,0} parameter(0)
  %y = f32[64,32]{1,0} parameter(1)
  %plain = bf16[16,32]{1,0:T(8,128)(2,1)} convolution(%p, %q), dim_labels=bf_io->bf
  %p = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %q = bf16[8,32]{1,0} copy(%x)
  %scores = f32[4,16,16]{2,1,0:T(8,128)S(1)} fusion(%x, %x), kind=kOutput, calls=%batched
  %kernel.5 = bf16[2,512,128]{2,1,0} custom-call(%k), custom_call_target="tpu_custom_call", attributes={a={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="f/image"}
  %k = bf16[2,512,128]{2,1,0:S(1)} broadcast(%x)
  ROOT %out = f32[64,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_forms_that_a_tpu_program_has():
    """Matrix products are convolutions, a batch is a dilation, a reduce-scatter is a fusion; S(1) is on-chip memory."""
    cost = Program(TPU).cost
    assert cost.flops == 2 * 16 * 8 * 32 + 4 * 2 * 16 * 16 * 8
    assert cost.collectives == {"reduce-scatter": 64 * 32 * 4 * 3 / 4}
    assert cost.kernels == [Kernel("kernel.5", "f/image", 1, ((2, 512, 128),))]
    x, y = 2 * 4 * 16 * 8, 4 * 64 * 32
    copies = (x + 0) + (x + 2 * 8 * 32)  # p is written on-chip
    products = (0 + 2 * 8 * 32 + 2 * 16 * 32) + 2 * x  # p is read on-chip, the scores stay there
    kernel = 0 + 2 * 2 * 512 * 128 + x  # its operand is on-chip
    assert cost.bytes == copies + products + kernel + y + 4 * 64 * 8


BESIDE = """HloModule beside

%begun (y: f32[64,32]) -> f32[256,32] {
  %y = f32[64,32]{1,0} parameter(0)
  ROOT %g = f32[256,32]{1,0} all-gather(%y), channel_id=132, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

%between (y: f32[64,32]) -> f32[256,32] {
  %y = f32[64,32]{1,0} parameter(0)
  ROOT %g = f32[256,32]{1,0:S(1)} all-gather(%y), channel_id=132, replica_groups=[4,4]<=[4,4]T(1,0), dimensions={0}
}

ENTRY %main (y: f32[64,32]) -> f32[256,32] {
  %y = f32[64,32]{1,0} parameter(0)
  %room = f32[256,32]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = f32[256,32]{1,0} fusion(%y), kind=kCustom, calls=%begun
  %run = f32[256,32]{1,0:S(1)} fusion(%y), kind=kCustom, calls=%between
  ROOT %done = f32[256,32]{1,0} fusion(%y), kind=kCustom, calls=%begun
}
"""


def test_what_is_gathered_beside_other_work_is_sent_once() -> None:
    """Its start, what runs meanwhile and its end all repeat it, the middle one with its result on the chip."""
    program = Program(BESIDE)
    sent = 256 * 32 * 4 * 3 / 4
    assert program.cost.collectives == {"all-gather": sent}
    assert program.cost.sent == {(0, 4, 8, 12): sent}
    assert [kind for kind, _ in program.collectives()] == ["all-gather"]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        (f"({', '.join(['f32[16,32]'] * 4)}) all-to-all(%y, %y, %y, %y)", {"all-to-all": 4 * 16 * 32 * 4 * 3 / 4}),
        ("f32[64,32] all-to-all(%y), dimensions={0}", {"all-to-all": 64 * 32 * 4 * 3 / 4}),
        ("f32[16,32] reduce-scatter(%y), dimensions={0}", {"reduce-scatter": 64 * 32 * 4 * 3 / 4}),
    ],
)
def test_what_four_chips_exchange_is_all_but_each_one_s_own_quarter(written: str, sent: dict[str, float]) -> None:
    lines = ("%y = f32[64,32] parameter(0)", f"ROOT %out = {written}, replica_groups={{{{0,4,8,12}}}}")
    text = "ENTRY %main (y: f32[64,32]) -> f32[64,32] {\n  " + "\n  ".join(lines) + "\n}\n"
    assert Program(f"HloModule exchange\n\n{text}").cost.collectives == sent


def test_room_that_is_set_aside_is_not_traffic() -> None:
    without = "\n".join(line for line in BESIDE.splitlines() if "AllocateBuffer" not in line)
    assert Program(BESIDE).cost.bytes == Program(without).cost.bytes > 0


@pytest.mark.parametrize(
    ("written", "group", "axes"),
    [
        ("replica_groups={{0,4,8,12},{1,5,9,13}}", (0, 4, 8, 12), [0]),
        ("source_target_pairs={{2,3},{3,0}}", (2, 3), [1]),
        ("source_target_pairs={{0,0},{1,4},{4,1},{5,5}}", (1, 4), [0, 1]),
        ("replica_groups=[1,16]<=[16]", tuple(range(16)), [0, 1]),
        ("replica_groups=[4,4]<=[16]", (0, 1, 2, 3), [1]),
        ("replica_groups=[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12), [0]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4] {'axis_0'}", (0, 4, 8, 12), [0]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3), [1]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=4], device_ids=([4,4]T(1,0)) {'axis_1'}", (0, 4, 8, 12), [0]),
        ("replica_groups=mesh['x'=2,'y'=2,'z'=4], device_ids=([16]) {'x','y'}", (0, 4, 8, 12), [0]),
    ],
)
def test_the_chips_of_a_collective_as_xla_writes_them(written: str, group: tuple[int, ...], axes: list[int]) -> None:
    text = BESIDE.replace("replica_groups=[4,4]<=[4,4]T(1,0)", written)
    (found,) = Program(text).cost.sent
    assert found == group
    assert crossed_axes(found, (4, 4)) == axes


def test_chips_that_cannot_be_read_are_not_none() -> None:
    with pytest.raises(HloError, match="g: expected groups of chips"):
        _ = Program(BESIDE.replace("replica_groups=[4,4]<=[4,4]T(1,0)", "replica_groups={}")).cost


ASYNC = """HloModule async

ENTRY %main (y: f32[64,32], i: s32[]) -> f32[256,32] {
  %y = f32[64,32]{1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %begun = (f32[64,32]{1,0}, f32[256,32]{1,0}) all-gather-start(%y), channel_id=1, replica_groups=[4,4]<=[16]
  %near = (f32[64,32]{1,0:S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%y)
  %passed = f32[64,32]{1,0} collective-permute(%y), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %all = f32[256,32]{1,0} all-gather-done(%begun)
  %copied = f32[64,32]{1,0:S(1)} copy-done(%near)
  ROOT %out = f32[256,32]{1,0} dynamic-update-slice(%all, %copied, %i, %i)
}
"""


def test_what_runs_beside_other_work_is_moved_once_and_only_what_is_put_in_is_written() -> None:
    """An end moves nothing; a copy onto the chip is a read of main memory; what is passed on is sent whole."""
    cost, part = Program(ASYNC).cost, 4 * 64 * 32
    assert cost.collectives == {"all-gather": 4 * part * 3 / 4, "collective-permute": part}
    gathered, copied, passed, put_in = 2 * 4 * part, part, 2 * part, 2 * part
    assert cost.bytes == gathered + copied + passed + put_in


UPDATED = """HloModule updated

%put (room: f32[9,8,4], x: f32[1,8,4], i: s32[]) -> f32[9,8,4] {
  %room = f32[9,8,4]{2,1,0} parameter(0)
  %x = f32[1,8,4]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[9,8,4]{2,1,0} dynamic-update-slice(%room, %x, %i, %i, %i)
}

%put_two (room: f32[9,8,4], x: f32[1,8,4], i: s32[]) -> (f32[9,8,4], f32[1,8,4]) {
  %room = f32[9,8,4]{2,1,0} parameter(0)
  %x = f32[1,8,4]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %twice = f32[1,8,4]{2,1,0} add(%x, %x)
  %new = f32[9,8,4]{2,1,0} dynamic-update-slice(%room, %twice, %i, %i, %i)
  ROOT %both = (f32[9,8,4]{2,1,0}, f32[1,8,4]{2,1,0}) tuple(%new, %twice)
}

ENTRY %main (room: f32[9,8,4], x: f32[1,8,4], i: s32[]) -> f32[9,8,4] {
  %room = f32[9,8,4]{2,1,0} parameter(0)
  %x = f32[1,8,4]{2,1,0} parameter(1)
  %i = s32[]{:S(6)} parameter(2)
  %two = (f32[9,8,4]{2,1,0}, f32[1,8,4]{2,1,0}) fusion(%room, %x, %i), kind=kLoop, calls=%put_two
  ROOT %out = f32[9,8,4]{2,1,0} fusion(%room, %x, %i), kind=kLoop, calls=%put
}
"""


def test_a_fusion_that_puts_a_slice_into_an_array_moves_the_slice() -> None:
    """As a decode step does with its keys, and a loop with what it keeps of every turn."""
    piece = 4 * 8 * 4
    assert Program(UPDATED).cost.bytes == (piece + 2 * piece) + (piece + piece)


@pytest.mark.parametrize(
    ("window", "size", "results", "products"),
    [
        ("size=3 pad=1_1", 3, 8, 3 * 8 - 2),  # the ends have one neighbour each
        ("size=3 pad=2_0", 3, 8, 3 * 8 - 3),
        ("size=2 stride=2", 2, 4, 2 * 4),
        ("size=2 pad=3_0 rhs_dilate=3", 2, 8, 5 + 8),
    ],
)
def test_a_convolution_multiplies_by_no_padding(window: str, size: int, results: int, products: int) -> None:
    """Along eight places, from four channels to five, for two rows."""
    text = f"""HloModule convolution

ENTRY %main (x: f32[2,8,4], w: f32[{size},4,5]) -> f32[2,{results},5] {{
  %x = f32[2,8,4] parameter(0)
  %w = f32[{size},4,5] parameter(1)
  ROOT %y = f32[2,{results},5] convolution(%x, %w), window={{{window}}}, dim_labels=b0f_0io->b0f
}}
"""
    assert Program(text).cost.flops == 2 * 2 * products * 4 * 5
