"""Plans, made by the TPU compiler on this CPU."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import pytest

from segzero_jax import config as configs
from segzero_jax.mesh import make_mesh
from segzero_jax.model.dims import RELEASED
from segzero_jax.model.splash import live_scores
from segzero_jax.plan import PhasePlan, Plan, PlanError, slices
from segzero_jax.plan.__main__ import Console, main, print_plan
from segzero_jax.plan.cost import Kernel, Program
from segzero_jax.plan.phases import advise, analyse, axis_bytes, kernel_flops, make_plan
from segzero_jax.plan.slices import CHIPS, Chip, make_topology_mesh, read_topology
from segzero_jax.plan.step import Step, find_dims, shard_bytes

ROOT = Path(__file__).parent.parent
PHASES = ["prefill", "reshard", "decode", "reference", "update"]


def run_plan(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, in a process that has not started JAX."""
    return run_python("-m", "segzero_jax.plan", *arguments, **more)


def run_python(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")} | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def toy() -> dict:
    # Float32 would be six passes of every product, in programs that take three times as long to compile. What is asked
    # of this plan does not depend on how well the compiler does.
    options = ["--topology=v5e:2x2", "--mesh=2x2", "--model.compute_dtype=bfloat16", "--json"]
    found = run_plan(*options, JAX_EXEC_TIME_OPTIMIZATION_EFFORT="-1")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.slow
def test_the_toy_run_compiles_for_four_chips(toy):
    assert [phase["phase"] for phase in toy["phases"]] == PHASES
    assert toy["fits"]
    assert all(phase["fits"] for phase in toy["phases"])
    for phase in toy["phases"]:
        assert phase["hbm_gib"] == pytest.approx(
            phase["arguments_gib"] + phase["temporaries_gib"] + phase["resident_gib"]
        )
        assert 0 < phase["hbm_gib"] < toy["hbm_limit_gib"] == 15.75
        assert phase["bytes"] > 0
        assert phase["seconds"] > 0
        assert sum(phase["collective_bytes"].values()) > 0


@pytest.mark.slow
def test_its_flops_are_the_hand_count(toy):
    phases = {phase["phase"]: phase for phase in toy["phases"]}
    dims = find_dims("toy")
    vision, layers, d, n, h = dims.vision, dims.layers, dims.hidden, dims.heads, dims.head_width
    layer = d * (n + 2 * dims.kv_heads) * h + n * h * d + 3 * d * dims.mlp
    chips, b, g, r, p = 4, 16, 8, 64, 64
    decode = 2 * b * g * (layers * layer + dims.vocab * d) / chips
    # Attention of one new token to all keys of its prompt and its response.
    decode += layers * 4 * b * g * (p + r) * n * h / chips
    assert phases["decode"]["flops"] == pytest.approx(decode, rel=0.02)
    # The kernel computes whole blocks of scores, with heads widened to 128; a picture is 64 patches, padded to 128.
    scores = layers * n * live_scores(p, r, p + g * r) + len(vision.full_attention) * vision.heads * 128**2
    attention = 4 * 128 * b * scores
    block = 4 * vision.hidden**2 + 3 * vision.hidden * vision.mlp
    merger = (4 * vision.hidden) ** 2 + 4 * vision.hidden * vision.out
    tower = 64 * (vision.patch_width * vision.hidden + vision.depth * block) + 16 * merger
    tower += 2 * (vision.depth - len(vision.full_attention)) * 64 * vision.window_slots * vision.hidden
    tokens, answered = b * (p + g * r), b * g * r
    products = 2 * (tokens * layers * layer + b * tower)
    head = 2 * answered * dims.vocab * d
    assert phases["reference"]["flops"] == pytest.approx((products + head + attention) / chips, rel=0.02)
    # Backward is twice forward; of attention, 7 products to 2. The head's chunks are computed once more.
    update = (3 * products + 4 * head + 4.5 * attention) / chips
    assert phases["update"]["flops"] == pytest.approx(update, rel=0.03)


@pytest.mark.slow
def test_a_step_is_its_phases(toy):
    phases = {phase["phase"]: phase for phase in toy["phases"]}
    assert phases["decode"]["runs"] == toy["response_tokens"] == 64
    assert [phase["runs"] for name, phase in phases.items() if name != "decode"] == [1] * 4
    seconds = sum(phase["runs"] * phase["seconds"] for phase in toy["phases"])
    assert toy["seconds_per_step"] == pytest.approx(seconds)
    assert toy["samples_per_second_per_chip"] == pytest.approx(128 / seconds / 4)


def test_several_updates_run_on_mini_batches_and_need_old_log_probabilities():
    run = configs.replace(
        configs.Config(), **{"train.mini_batch_size": 4, "train.micro_batch_size": 2, "grpo.iterations": 3}
    )
    with jax.set_mesh(make_mesh("1x1")):
        step = Step(run, find_dims("toy"), jax.sharding.get_mesh())
        programs = {name: (runs, lower, beside) for name, runs, lower, beside in step.programs()}
        assert list(programs) == ["prefill", "reshard", "decode", "reference", "old_logps", "update"]
        runs, lower, beside = programs["update"]
        assert runs == 4 * 3
        assert programs["old_logps"][0] == 1
        ((_, batch), _) = lower().args_info
        assert batch.prompts.tokens_bp.shape[0] == batch.rollout.tokens_bgr.shape[0] == 4
        assert batch.old_logps_bgr.shape == batch.ref_logps_bgr.shape == (4, 8, 64)
        assert shard_bytes(beside) > shard_bytes((step.reference_policy, step.patches)), "the batch they are cut from"
        (policy, _, tokens), _ = programs["old_logps"][1]().args_info
        assert jax.tree.leaves(policy)[0].dtype == "float32"
        assert tokens.shape[0] == 16
        free = Step(configs.replace(run, **{"grpo.kl_coef": 0.0}), find_dims("toy"), jax.sharding.get_mesh())
        assert [name for name, *_ in free.programs()] == ["prefill", "reshard", "decode", "old_logps", "update"], (
            "no reference"
        )


def test_adapters_are_planned_with_one_policy_that_they_and_the_reference_share():
    run = configs.replace(configs.Config(), **{"model.lora_rank": 4, "model.compute_dtype": "bfloat16"})
    bytes_of = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    with jax.set_mesh(make_mesh("1x1")):
        step = Step(run, find_dims("toy"), jax.sharding.get_mesh())
        programs = {name: (lower, beside) for name, _, lower, beside in step.programs()}
        assert list(programs) == ["vision", "prefill", "reshard", "decode", "reference", "update"]
        policy, adapters = bytes_of(step.base), bytes_of(step.state.params)
        assert bytes_of(step.state) == pytest.approx(3 * adapters, rel=1e-3), "with two moments"
        assert 8 * adapters < policy
        held = {name: bytes_of(lower().args_info) + bytes_of(beside) for name, (lower, beside) in programs.items()}
        # The policy once, the state, and the reference's own adapters in bfloat16, or while it works the policy's.
        pictures, prompts = bytes_of(step.patches), bytes_of(step.prompts)
        assert held["reference"] == pytest.approx(policy + 3.5 * adapters + prompts, rel=0.01)
        assert held["update"] == pytest.approx(policy + 3.5 * adapters + prompts, rel=0.02)
        assert held["vision"] == pytest.approx(policy + 3.5 * adapters + pictures, rel=0.01)
        assert held["prefill"] == pytest.approx(policy + 3.5 * adapters + prompts, rel=0.01)
        caches = bytes_of(step.prefilled)
        assert held["decode"] == pytest.approx(2 * policy + 4 * adapters + prompts + caches, rel=0.01)


THE_7B = """
import json, sys, jax
from dataclasses import asdict
from segzero_jax import config
from segzero_jax.plan.phases import analyse
from segzero_jax.plan.slices import CHIPS, make_topology_mesh
from segzero_jax.plan.step import Step, find_dims
jax.config.update("jax_platforms", "cpu")
run = config.load("configs/seg_zero_7b.yaml")
mesh = make_topology_mesh(run.mesh, "v5e:4x4")
with jax.set_mesh(mesh):
    step = Step(run, find_dims(run.model.path), mesh)
    programs = [program for program in step.programs() if program[0] in sys.argv[1:]]
    phases = [analyse(*program, CHIPS["v5e"], mesh.devices.shape, step.attention_scores()) for program in programs]
    print(json.dumps([asdict(phase) for phase in phases]))
"""


ROUNDED = """
import re, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from segzero_jax.config import Config
from segzero_jax.model.layers import mrope_angles
from segzero_jax.plan.slices import make_topology_mesh
from segzero_jax.plan.step import Step, find_dims
jax.config.update("jax_platforms", "cpu")
mesh = make_topology_mesh("2x2", "v5e:2x2")
with jax.set_mesh(mesh):
    positions = jax.ShapeDtypeStruct((4, 3, 1152), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    angles = jax.jit(lambda positions: mrope_angles(positions, (16, 24, 24), 1e6)).lower(positions)
    decode = Step(Config(), find_dims("toy"), mesh).lower_decode()
    for lowered in (angles, decode):
        text = lowered.compile().as_text()
        products = [line for line in text.splitlines() if " convolution(" in line]
        exact = sum("operand_precision={highest,highest}" in line for line in products)
        print(len(re.findall("bf16.* convert[(]", text)), len(products) - exact, exact > 0)
"""


@pytest.mark.slow
def test_a_tpu_rounds_neither_positions_nor_what_is_to_be_float32():
    """It multiplies in bfloat16 unless told otherwise, where 257 is 256."""
    found = run_python("-c", ROUNDED)
    assert found.stdout.splitlines() == ["0 0 False", "0 0 True"], found.stderr


def plan_of_the_7b(*programs: str) -> dict[str, dict]:
    """The preset as it is: 16 prompts with 8 answers of up to 1,300 tokens, all parameters trained, on a v5e-16."""
    found = run_python("-c", THE_7B, *programs)
    assert found.returncode == 0, found.stderr
    return {phase["phase"]: phase for phase in json.loads(found.stdout)}


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
def test_the_7b_updates_on_sixteen_chips_of_16_gb():
    update = plan_of_the_7b("update")["update"]
    assert update["fits"]
    assert 12 < update["hbm_gib"] <= 15.75
    # Decoder and head, forward, recomputed and backward; the last product of a recomputed block is not needed.
    layer = 3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944
    tokens, answered = 16 * (1408 + 8 * 1300), 16 * 8 * 1300
    flops = 28 * 2 * tokens * (4 * layer - 3584 * 18944) + 4 * 2 * answered * 152064 * 3584
    # The rest is attention and the vision tower.
    assert 1.1 < update["flops"] * 16 / flops < 1.2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_decode_step_of_the_7b_reads_weights_and_caches_once():
    phases = plan_of_the_7b("prefill", "decode")
    assert phases["prefill"]["fits"]
    assert phases["decode"]["fits"]
    weights = 2 * (2 * 152064 * 3584 + 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944))
    caches = 2 * 2 * 28 * 4 * 128 * (16 * 1408 + 128 * 1300)
    assert phases["decode"]["bytes"] <= 1.3 * (weights + caches) / 16
    # What a chip sends is activations: less than one weight matrix of one block.
    sent = phases["decode"]["collective_bytes"]
    assert sent["all-gather"] < 2 * 3584 * 18944


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5e:4by4"], "--topology=v5e:4by4: expected v5e:4x4, v6e:4x4 or v5p:2x2x4"),
        (["--topology=v9:4x4"], "--topology=v9:4x4: expected"),
        (["--topology=v5e:4x4x1"], "--topology=v5e:4x4x1: expected"),
        (["--topology=v5e:4x4", "--mesh=2x2"], "--mesh=2x2: 4 chips, --topology=v5e:4x4 has 16; make them equal"),
        (["--topology=v5e:2x2", "--mesh=1x4", "--model.path=none"], "model.path=none: no config.json"),
        (["--topology=v5e:²x4"], "--topology=v5e:²x4: expected"),
        (["--topology=v5e:3x5", "--mesh=3x5"], "a host has 2x2 chips, so the first two sides are expected to be 1 or"),
        (["--topology=v5e:2x4", "--mesh=1x8"], "8 (train)"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("segzero_jax.plan: ")
    assert error.count("\n") == 1


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    def missing(**options):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(slices.topologies, "get_topology_desc", missing)
    monkeypatch.setattr(slices.importlib.util, "find_spec", lambda name: None)
    assert main(["--topology=v5e:2x2", "--mesh=2x2"]) == 2
    assert "needs the TPU compiler: pip install 'jax[tpu]'" in capsys.readouterr().err


def test_every_chip_has_a_slice():
    for name, shape, mesh in (
        ("v5e", "4x4", "4x4"),
        ("v6e", "2x4", "2x4"),
        ("v5p", "2x2x4", "4x4"),
        ("v5e", "1x1", "1x1"),
        # Mesh axes that each take a part of one side of the slice.
        ("v6e", "8x8", "16x4"),
        ("v6e", "4x4", "2x8"),
        ("v5p", "4x4x4", "8x8"),
    ):
        found = make_topology_mesh(mesh, f"{name}:{shape}")
        assert found.size == math.prod(map(int, shape.split("x")))
        assert read_topology(f"{name}:{shape}")[0] is CHIPS[name]
    assert make_topology_mesh("16x16", "v5e:16x16").size == 256


def test_released_models_are_planned_without_their_files():
    seven = find_dims("Qwen/Qwen2.5-VL-7B-Instruct")
    assert seven == RELEASED["Qwen/Qwen2.5-VL-7B-Instruct"]
    assert (seven.head_width, seven.vision.head_width, seven.vision.patch_width) == (128, 80, 1176)


@pytest.mark.parametrize(("written", "gib"), [("60.50G", 60.5), ("512.00M", 0.5)])
def test_a_phase_that_needs_more_than_the_chip_has(written, gib):
    """Its size is read from what the compiler says, and what else is in memory is added."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
                f"({written}) exceeds available HBM (15.75G)."
            )

    beside = jax.ShapeDtypeStruct((2**28,), "float32", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    found = analyse("update", 4, Lowered, (beside,), CHIPS["v5e"], (1, 4, 4), {})
    assert (found.runs, found.fits, found.hbm_gib, found.resident_gib, found.seconds) == (4, False, gib + 1, 1.0, None)


ON_TWO_AXES = """HloModule on_two_axes

ENTRY %main (y: f32[64,32]) -> f32[64,32] {
  %y = f32[64,32]{1,0} parameter(0)
  %tensor = f32[64,32]{1,0} all-reduce(%y), channel_id=1, replica_groups={{0,1}}
  ROOT %fsdp = f32[64,32]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,2}}
}
"""


def analysed(text: str, limit: float) -> PhasePlan:
    """The plan of a program of 4 GiB beside 1 GiB, for a slow chip on a mesh of 2 x 2."""
    gib = 2**30
    memory = SimpleNamespace(
        peak_memory_in_bytes=3 * gib, generated_code_size_in_bytes=gib, argument_size_in_bytes=2 * gib
    )
    lowered = Mock(**{"compile.return_value.memory_analysis.return_value": memory})
    lowered.compile.return_value.as_text.return_value = text
    beside = jax.ShapeDtypeStruct((2**28,), "float32", sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    chip = Chip(hbm_gib=limit, flops_per_s=1e9, hbm_bytes_per_s=math.inf, link_bytes_per_s=1e3)
    return analyse("update", 4, lambda: lowered, (beside,), chip, (1, 2, 2), {})


@pytest.mark.parametrize(("limit", "fits"), [(5.0, True), (4.9, False)])
def test_a_phase_holds_what_lies_beside_it_too(limit, fits):
    """A program's own code is in memory as well."""
    found = analysed(ON_TWO_AXES, limit)
    assert (found.arguments_gib, found.temporaries_gib, found.resident_gib, found.hbm_gib) == (2, 2, 1, 5)
    assert found.fits == fits


def test_a_program_waits_for_one_collective_after_the_other():
    found = analysed(ON_TWO_AXES, 5)
    assert found.waiting_seconds == found.seconds == 2 * 4 * 64 * 32 / 1e3
    assert found.bound == "interconnect"


BESIDE_OTHER_WORK = """HloModule beside_other_work

%gathering (x: f32[16,32]) -> f32[64,32] {
  %x = f32[16,32]{1,0} parameter(0)
  ROOT %whole = f32[64,32]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%all-reduce-scatter (y: f32[64,32]) -> f32[16,32] {
  %y = f32[64,32]{1,0} parameter(0)
  %sum = f32[64,32]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1,2,3}}
  %index = s32[] constant(0)
  ROOT %part = f32[16,32]{1,0} dynamic-slice(%sum, %index, %index), dynamic_slice_sizes={16,32}
}

ENTRY %main (x: f32[16,32]) -> f32[16,32] {
  %x = f32[16,32]{1,0} parameter(0)
  %started = f32[64,32]{1,0} fusion(%x), kind=kCustom, calls=%gathering
  %sent = (f32[16,32]{1,0}, f32[16,32]{1,0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %come = f32[16,32]{1,0} collective-permute-done(%sent)
  %summed = f32[16,32]{1,0} fusion(%started), kind=kCustom, calls=%all-reduce-scatter
  ROOT %alone = f32[16,32]{1,0} all-reduce(%summed), channel_id=4, replica_groups={{0,1}}
}
"""


def test_only_collectives_with_nothing_beside_are_waited_for():
    cost = Program(BESIDE_OTHER_WORK).cost
    array = 4 * 16 * 32
    four, two = (0, 1, 2, 3), (0, 1)
    # Gathered: three quarters of the whole; summed and scattered: as much; permuted: all; summed by two: all.
    assert cost.sent == {four: 3 * array + 3 * array, two: 2 * array}
    assert cost.waiting == {four: 3 * array, two: array}


def test_a_phase_takes_as_long_as_what_overlaps_with_nothing_and_then_its_busiest_link():
    """Two axes send at once, each half of what goes across both."""
    found, array = analysed(BESIDE_OTHER_WORK, 5), 4 * 16 * 32 / 1e3
    assert found.waiting_seconds == pytest.approx((3 / 2 + 1) * array)
    assert found.seconds == pytest.approx(found.waiting_seconds + (3 / 2 + 1) * array)
    assert found.bound == "interconnect"


def phase(name: str) -> PhasePlan:
    return PhasePlan(name, 1, 1.0, 20.0, 1.0, 22.0, False, 1e12, 1e9, {}, 1.0, "HBM")


@pytest.mark.parametrize(("dtype", "passes"), [("float32", 6), ("bfloat16", 1)])
def test_a_product_of_float32_numbers_is_six(dtype, passes, monkeypatch):
    chips: list[Chip] = []
    monkeypatch.setattr("segzero_jax.plan.phases.analyse", lambda name, *given: chips.append(given[3]) or phase(name))
    run = configs.replace(configs.Config(), **{"mesh": "2x2", "model.compute_dtype": dtype})
    make_plan(run, None, "v5e:2x2", lambda name: None)
    assert {chip.flops_per_s for chip in chips} == {CHIPS["v5e"].flops_per_s / passes}
    assert {chip.hbm_bytes_per_s for chip in chips} == {CHIPS["v5e"].hbm_bytes_per_s}


def test_advice_names_what_is_not_yet_done():
    preset = configs.load(ROOT / "configs/seg_zero_7b.yaml")
    wasteful = configs.replace(preset, **{"model.remat": False, "train.micro_batch_size": 16})
    said = "\n".join(advise(wasteful, [phase("update")]))
    assert "--model.remat=true" in said
    assert "--train.micro_batch_size=4: one prompt with its answers a row of the mesh" in said
    many = configs.replace(preset, **{"train.batch_size": 64, "train.micro_batch_size": 64})
    assert "--train.micro_batch_size=16: one prompt with its answers a chip" in advise(many, [phase("update")])
    odd = configs.replace(preset, **{"train.batch_size": 24, "train.micro_batch_size": 24})
    assert "--train.micro_batch_size=4" in "\n".join(advise(odd, [phase("update")])), "24 is no multiple of 16"
    assert "--rollout.max_response_tokens=650: shorter answers" in said
    assert "remat" not in "\n".join(advise(preset, [phase("update")]))
    for frozen in (False, True):
        tower = configs.replace(preset, **{"model.freeze_vision": frozen})
        assert ("--model.freeze_vision=true" in "\n".join(advise(tower, [phase("update")]))) != frozen
    parts = configs.replace(preset, **{"train.mini_batch_size": 8, "train.micro_batch_size": 4})
    said = "\n".join(advise(parts, [phase("prefill")]))
    assert "--train.batch_size=4 --train.mini_batch_size=4: fewer prompts a step" in said, "all that is larger"
    for name in ("vision", "reshard", "prefill", "decode", "reference", "old_logps", "update"):
        said = "\n".join(advise(parts, [phase(name)]))
        assert ("fewer prompts a step" in said) == (name in ("prefill", "reshard", "decode")), (
            "its caches of all prompts"
        )
    assert advise(preset, []) == []
    for key, what in (("train.moment_dtype", "2 bytes less"), ("model.compute_dtype", "half the bytes")):
        for dtype in ("float32", "bfloat16"):
            said = "\n".join(advise(configs.replace(preset, **{key: dtype}), [phase("update")]))
            assert (f"--{key}=bfloat16: {what}" in said) == (dtype == "float32")
    for name in ("vision", "reshard", "prefill", "decode", "reference", "old_logps", "update"):
        said = "\n".join(advise(preset, [phase(name)]))
        assert ("shorter answers" in said) == (name in ("decode", "reference", "old_logps", "update"))
        assert "a larger slice, such as --mesh=8x4" in said


def test_an_attention_kernel_costs_its_live_blocks():
    scope = "jit(update)/jvp(while)/body/splash"
    forward = Kernel("splash_mha_fwd_segmented.3", scope, 5, ((1, 8, 8), (2, 7, 1024, 128), (2, 1, 1024, 128)))
    scores = {(False, 1024): 500, (True, 1024): 1024**2}  # Stream and image are padded to the same length.
    assert kernel_flops(forward, scores) == 5 * 2 * 2 * 2 * 7 * 500 * 128
    assert kernel_flops(forward._replace(name="splash_mha_dkv.1"), scores) == 5 * 2 * 4 * 2 * 7 * 500 * 128
    of_image = forward._replace(scope="jit(update)/transpose(jvp(attend_image))/splash")
    assert kernel_flops(of_image, scores) == 5 * 2 * 2 * 2 * 7 * 1024**2 * 128
    with pytest.raises(PlanError, match="unknown_kernel"):
        kernel_flops(forward._replace(name="unknown_kernel"), scores)


def test_every_axis_of_the_mesh_has_links_of_its_own():
    """On 2x4: groups along tensor, along fsdp, a permutation along tensor, and one that crosses both."""
    sent = {(0, 1, 2, 3): 30.0, (0, 4): 8.0, (1, 0): 5.0, (0, 1, 2, 3, 4, 5, 6, 7): 2.0}
    assert axis_bytes(sent, (1, 2, 4)) == [0.0, 8.0 + 1.0, 30.0 + 5.0 + 1.0]


PLAN = Plan("configs/x.yaml", "4x4", "v5e:4x4", 16, 15.75, 1408, 1300, False, 12.0, 0.67, [phase("update")], ["more"])


@pytest.mark.parametrize("form", [[], ["--json"]])
@pytest.mark.parametrize(("fits", "code"), [(True, 0), (False, 1)])
def test_the_exit_code_says_whether_the_run_fits(form, fits, code, monkeypatch):
    monkeypatch.setattr("segzero_jax.plan.__main__.make_plan", lambda *_: replace(PLAN, fits=fits))
    assert main(["--topology=v5e:4x4", *form]) == code


def test_the_table_fits_a_narrow_terminal(capsys):
    print_plan(PLAN, Console(width=80))
    said = capsys.readouterr().out
    assert "does not fit: 22.00 GiB of 15.75 GiB a chip, in update" in said
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def test_no_number_of_the_table_is_cut(capsys):
    """Wherever it goes: a log is 80 wide."""
    decode = PhasePlan("decode", 1300, 4.9, 2.23, 1.0, 8.13, True, 1.21e11, 1.64e9, {"all": 6.02e7}, 0.002, "HBM", 2e-4)
    update = PhasePlan(
        "update", 1, 14.5, 8.6, 1.0, 14.5, True, 7.11e14, 1.461e12, {"all": 1.38e11}, 3.61, "interconnect", 1.234
    )
    console = Console(width=80)
    print_plan(Plan("x.yaml", "4x4", "v5e:4x4", 16, 15.75, 1408, 1300, True, 7.3, 1.09, [decode, update], []), console)
    said = capsys.readouterr().out
    (first,) = (line.split() for line in said.splitlines() if line.strip().startswith("decode"))
    assert " ".join(first) == "decode 1300 4.90 2.23 1.00 8.13 0.121 1.64 0.0602 0.002 0.0002 HBM"
    (second,) = (line.split() for line in said.splitlines() if line.strip().startswith("update "))
    assert " ".join(second) == "update 1 14.50 8.60 1.00 14.50 711 1.46e+03 138 3.61 1.23 interconnect"
