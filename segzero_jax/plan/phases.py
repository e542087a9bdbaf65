"""Memory and cost of each phase of a step on one chip of a slice."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from segzero_jax.config import Config
from segzero_jax.mesh import parse_mesh
from segzero_jax.model.attention import IMAGE_SCOPE
from segzero_jax.model.weights import check_fits
from segzero_jax.plan.cost import Cost, Kernel, Program
from segzero_jax.plan.groups import crossed_axes
from segzero_jax.plan.slices import Chip, PlanError, make_topology_mesh, read_topology
from segzero_jax.plan.step import Step, find_dims, shard_bytes

_GIB = 2**30


@dataclass(frozen=True)
class PhasePlan:
    """One phase on one chip. FLOPs, bytes and seconds are per run of the phase.

    Attributes:
      phase: its name.
      runs: runs per step: decode runs once per token, the update once per mini-batch and iteration.
      arguments_gib, temporaries_gib: memory of its program; results that replace arguments are counted once.
      resident_gib: memory of the run's other data at that time.
      hbm_gib: the sum.
      fits: whether the sum is within the chip's limit.
      flops, bytes: FLOPs of matrix products; main-memory traffic. None if the program could not be compiled.
      collective_bytes: bytes sent over the links, by kind of collective.
      seconds: the longest of compute, memory and link time, as if they overlapped, after what does not overlap.
      bound: the longest of compute, memory and link time, with one link for each mesh axis.
      waiting_seconds: link time of collectives that the program does nothing beside, one after another.
    """

    phase: str
    runs: int
    arguments_gib: float
    temporaries_gib: float
    resident_gib: float
    hbm_gib: float
    fits: bool
    flops: float | None = None
    bytes: float | None = None
    collective_bytes: dict[str, float] | None = None
    seconds: float | None = None
    bound: str | None = None
    waiting_seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """The output of ``--json``."""

    config: str | None
    mesh: str
    topology: str
    chips: int
    hbm_limit_gib: float
    prompt_tokens: int
    response_tokens: int
    fits: bool
    seconds_per_step: float | None
    samples_per_second_per_chip: float | None
    phases: list[PhasePlan]
    advice: list[str] = field(default_factory=list)


def analyse(
    name: str,
    runs: int,
    lower: Callable[[], Any],
    beside: Sequence[Any],
    chip: Chip,
    mesh: Sequence[int],
    attention: Mapping[tuple[bool, int], int],
) -> PhasePlan:
    """Compiles a program and reads its memory and cost from it.

    Decoding is described by one of its steps, with an equal part of what surrounds them.

    Args:
      name, runs, lower, beside: see ``Step.programs``.
      mesh: sizes of the mesh axes.
      attention: see ``Step.attention_scores``.
    """
    resident = shard_bytes(beside) / _GIB
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(?([\d.]+)([MG])\)? exceeds|Used ([\d.]+)([MG])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        size, unit = (needed[1], needed[2]) if needed[1] else (needed[3], needed[4])
        own = float(size) / (1024 if unit == "M" else 1)
        return PhasePlan(name, runs, 0.0, own, resident, own + resident, fits=False)
    memory = compiled.memory_analysis()
    own = (memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes) / _GIB
    arguments = memory.argument_size_in_bytes / _GIB
    program = Program(compiled.as_text())
    cost = program.cost
    if name == "decode":
        around, cost, runs = program.split("decode_step")
        cost.add(around, 1 / runs)
    flops = total_flops(cost, attention)
    waiting = _one_by_one(cost.waiting, mesh) / chip.link_bytes_per_s
    beside_others = {group: size - cost.waiting.get(group, 0.0) for group, size in cost.sent.items()}
    times = {
        "compute": flops / chip.flops_per_s,
        "HBM": cost.bytes / chip.hbm_bytes_per_s,
        "interconnect": max(axis_bytes(beside_others, mesh)) / chip.link_bytes_per_s,
    }
    seconds = waiting + max(times.values())
    times["interconnect"] += waiting
    return PhasePlan(
        phase=name,
        runs=runs,
        arguments_gib=arguments,
        temporaries_gib=own - arguments,
        resident_gib=resident,
        hbm_gib=own + resident,
        fits=own + resident <= chip.hbm_gib,
        flops=flops,
        bytes=cost.bytes,
        collective_bytes=cost.collectives,
        seconds=seconds,
        bound=max(times, key=times.__getitem__),
        waiting_seconds=waiting,
    )


def axis_bytes(sent: Mapping[tuple[int, ...], float], mesh: Sequence[int]) -> list[float]:
    """Bytes that a chip sends along each mesh axis, all axes at once; traffic across several is divided evenly.

    Args:
      sent: see ``Cost.sent``.
    """
    along = [0.0] * len(mesh)
    for group, size in sent.items():
        axes = crossed_axes(group, mesh)
        for axis in axes:
            along[axis] += size / len(axes)
    return along


def _one_by_one(sent: Mapping[tuple[int, ...], float], mesh: Sequence[int]) -> float:
    """Bytes over one link in collectives that follow one another; those across several axes use a link of each."""
    return sum(size / max(1, len(crossed_axes(group, mesh))) for group, size in sent.items())


def total_flops(cost: Cost, attention: Mapping[tuple[bool, int], int]) -> float:
    """FLOPs of matrix products, including those in attention kernels."""
    return cost.flops + sum(kernel_flops(kernel, attention) for kernel in cost.kernels)


def kernel_flops(kernel: Kernel, attention: Mapping[tuple[bool, int], int]) -> float:
    """FLOPs of a splash attention call: 2 matrix products per block in its forward pass, 3 and 4 in its backward."""
    products = next((n for name, n in (("_fwd", 2), ("_dq", 3), ("_dkv", 4)) if name in kernel.name), None)
    image = IMAGE_SCOPE in kernel.scope
    known = (shape for shape in kernel.shapes if len(shape) >= 3 and (image, shape[-2]) in attention)
    queries = next(known, None)
    if products is None or queries is None:
        raise PlanError(f"kernel {kernel.name} of {kernel.scope}: expected splash attention of {list(attention)}")
    return kernel.calls * 2.0 * products * math.prod(queries[:-2]) * attention[image, queries[-2]] * queries[-1]


def make_plan(config: Config, config_path: str | None, topology: str, report: Callable[[str], None]) -> Plan:
    """Compiles all phases of a step of this run for a slice.

    Args:
      config: the run's; its mesh must have as many chips as the slice.
      config_path: named in the result.
      topology: the slice, such as "v5e:4x4".
      report: is told which phase is being compiled, which takes minutes.

    Raises:
      PlanError, MeshError, CheckpointError: the slice, the mesh or the model is invalid, or they do not fit together.
    """
    chip, _, _ = read_topology(topology)
    if config.model.compute_dtype == "float32":
        # A float32 product takes six products of bfloat16 parts.
        chip = replace(chip, flops_per_s=chip.flops_per_s / 6)
    mesh = make_topology_mesh(config.mesh, topology)
    dims = find_dims(config.model.path)
    check_fits(mesh, dims, config.train.batch_size, config.train.micro_batch_size)
    phases: list[PhasePlan] = []
    with jax.set_mesh(mesh):
        step = Step(config, dims, mesh)
        attention = step.attention_scores()
        for name, runs, lower, beside in step.programs():
            report(name)
            phases.append(analyse(name, runs, lower, beside, chip, mesh.devices.shape, attention))
    times = [phase.runs * phase.seconds for phase in phases if phase.seconds is not None]
    seconds = sum(times) if len(times) == len(phases) else None
    samples = config.train.batch_size * config.rollout.group_size
    return Plan(
        config=config_path,
        mesh=config.mesh,
        topology=topology,
        chips=mesh.size,
        hbm_limit_gib=chip.hbm_gib,
        prompt_tokens=step.prompt_tokens,
        response_tokens=step.response_tokens,
        fits=all(phase.fits for phase in phases),
        seconds_per_step=seconds,
        samples_per_second_per_chip=samples / seconds / mesh.size if seconds else None,
        phases=phases,
        advice=advise(config, [phase for phase in phases if not phase.fits]),
    )


def advise(config: Config, over: Sequence[PhasePlan]) -> list[str]:
    """Changes that may make the phases fit that do not."""
    advice = []
    data, fsdp, tensor = parse_mesh(config.mesh)
    for phase in over:
        if phase.phase == "update":
            if not config.model.remat:
                advice.append("--model.remat=true: recompute blocks in the backward pass")
            places = {data * fsdp * tensor: "chip", data * fsdp: "row of the mesh"}
            whole = config.train.micro_batch_size
            smaller = [size for size in places if size < whole and whole % size == 0]
            if smaller:
                advice.append(
                    f"--train.micro_batch_size={smaller[0]}: one prompt with its answers a {places[smaller[0]]}"
                )
            if config.train.moment_dtype == "float32":
                advice.append("--train.moment_dtype=bfloat16: 2 bytes less a parameter")
            if not config.model.vision_stays:
                advice.append("--model.freeze_vision=true: no moments of the vision tower, no backward pass through it")
        if config.model.compute_dtype == "float32":
            advice.append("--model.compute_dtype=bfloat16: half the bytes of activations, reference and caches")
        if phase.phase in ("reference", "old_logps", "update", "decode"):
            shorter = config.rollout.max_response_tokens // 2
            advice.append(f"--rollout.max_response_tokens={shorter}: shorter answers")
        if phase.phase in ("prefill", "reshard", "decode") and config.train.batch_size > data * fsdp:
            names = (f"{name}_size" for name in ("batch", "mini_batch", "micro_batch"))
            larger = [name for name in names if getattr(config.train, name) > data * fsdp]
            advice.append(" ".join(f"--train.{name}={data * fsdp}" for name in larger) + ": fewer prompts a step")
    if over:
        advice.append(f"a larger slice, such as --mesh={2 * fsdp * data}x{tensor}: weights and moments spread over it")
    return list(dict.fromkeys(advice))
