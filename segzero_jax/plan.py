"""Whether a run fits a TPU slice and what it costs there: ``python -m segzero_jax.plan --config C --topology v5e:4x4``.

Every phase of a step is compiled for the named slice by the TPU compiler itself, on a machine without one (libtpu, the
extra ``tpu``), with the shapes, shardings and programs of ``train``. Memory is what the compiler reserves; FLOPs, bytes
and collectives are counted in the programs it made (``hlo.py``); seconds are a roofline from published peaks and assume
that computing, memory and links overlap perfectly: a lower bound, not a forecast.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.table import Table

from segzero_jax import config as configs
from segzero_jax.config import Config, ConfigError
from segzero_jax.grpo import LossSettings, UpdateBatch, initial_state, make_optimizer, reference_logps, update
from segzero_jax.hlo import Cost, Kernel, Program
from segzero_jax.mesh import AXES, ROLLOUT, TRAIN, Layout, MeshError, parse_mesh
from segzero_jax.model.attention import Stream, choose_kernel
from segzero_jax.model.dims import RELEASED, Dims
from segzero_jax.model.policy import Pass, Policy, embed_images
from segzero_jax.model.splash import live_scores, padded_length
from segzero_jax.model.weights import CheckpointError, abstract_policy, check_fits, read_dims
from segzero_jax.rollout import Sampling, padding_multiple, rollout_layout, sample
from segzero_jax.types import PromptBatch, Rollout

_GIB = 2**30
# Which tokens end a response or are never sampled decides nothing about cost: Qwen2.5-VL's.
_END_IDS, _PAD_ID, _VISUAL_IDS = (151645, 151643), 151643, (151652, 151653, 151654, 151655, 151656)


class PlanError(ValueError):
    """A plan that cannot be made; one line."""


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip (docs.cloud.google.com/tpu/docs: v5e, v5p, v6e).

    Attributes:
      hbm_gib: what the compiler lets a program use.
      flops: bfloat16, per second.
      hbm: bytes per second.
      link: bytes per second one way over one of the chip's links. A mesh axis is taken to have one link each way, as at
        the end of a row; a ring that closes has two.
    """

    hbm_gib: float
    flops: float
    hbm: float
    link: float


CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(15.75, 197e12, 819e9, 400e9 / 8),
    "v5p": Chip(95.74, 459e12, 2765e9, 1200e9 / 12),
    "v6e": Chip(31.25, 918e12, 1638e9, 800e9 / 8),
}


@dataclass(frozen=True)
class PhasePlan:
    """One phase on one chip. FLOPs, bytes and seconds are of one run of the phase.

    Attributes:
      phase: its name. Prefill and decode are parts of one program and share its memory.
      runs: how often it runs in a step: decode once a token.
      arguments_gib, temporaries_gib: of its program; results in the place of arguments are counted once.
      resident_gib: what else of the run lies in memory meanwhile.
      hbm_gib: the sum.
      fits: whether that is within the chip's limit.
      flops, bytes: of matrix products; of main memory. None where the program could not be compiled.
      collective_bytes: sent over the links, by kind.
      seconds: the longest of computing, memory and links.
      bound: which of them that is.
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


@dataclass(frozen=True)
class Plan:
    """What ``--json`` prints."""

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


def read_topology(text: str) -> tuple[Chip, str, tuple[int, ...]]:
    """``"v5e:4x4"`` -> the chip, its generation, and the slice's shape. Raises PlanError."""
    generation, _, shape = text.partition(":")
    sizes = shape.split("x")
    flat = 2 if generation in ("v5e", "v6e") else 3
    if generation not in CHIPS or len(sizes) != flat or not all(size.isdigit() and int(size) for size in sizes):
        raise PlanError(f"--topology={text}: expected v5e:4x4, v6e:4x4 or v5p:2x2x4, sizes as you like")
    return CHIPS[generation], generation, tuple(map(int, sizes))


def make_topology_mesh(mesh: str, topology: str) -> jax.sharding.Mesh:
    """The mesh over the chips of a slice that is not there.

    Raises:
      PlanError: no such slice, or libtpu is not installed.
      MeshError: the mesh has another number of chips.
    """
    _, _, shape = read_topology(topology)
    sizes = parse_mesh(mesh)
    if math.prod(sizes) != math.prod(shape):
        raise MeshError(
            f"--mesh={mesh}: {math.prod(sizes)} chips, --topology={topology} has {math.prod(shape)}; make them equal"
        )
    # What libtpu asks of a machine that has no TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # The compiler takes no chip: it may run beside another process that has libtpu loaded.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A host has 2 x 2 chips, or is smaller than that.
    host = (*(min(2, size) for size in shape[:2]), 1)
    try:
        slice_ = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host, num_slices=1
        )
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if importlib.util.find_spec("libtpu") is None:
            raise PlanError(f"--topology={topology}: needs the TPU compiler: pip install 'jax[tpu]'") from None
        raise PlanError(f"--topology={topology}: no such slice: {reason}") from None
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=slice_.devices)


def find_dims(path: str) -> Dims:
    """The dimensions of ``model.path``: of a directory, or of a released model, whose weights need not be here."""
    if path in RELEASED and not Path(path).is_dir():
        return RELEASED[path]
    return read_dims(path)


class Step:
    """A training step in abstract values: the programs of ``train`` and the shapes and shardings they meet, no numbers.

    Args:
      config: the run.
      dims: its policy's.
      mesh: ambient too (``jax.set_mesh``) while a method is called.
      batch, group: prompts and responses a prompt; the run's own unless given.
    """

    def __init__(
        self,
        config: Config,
        dims: Dims,
        mesh: jax.sharding.Mesh,
        batch: int | None = None,
        group: int | None = None,
    ) -> None:
        self.config, self.dims, self.mesh = config, dims, mesh
        limits = config.rollout
        multiple = padding_multiple(limits.max_prompt_tokens)
        self.batch, self.group = batch or config.train.batch_size, group or limits.group_size
        self.prompt_tokens = -(-limits.max_prompt_tokens // multiple) * multiple
        self.response_tokens = limits.max_response_tokens
        windows = -(-config.data.image_size // dims.vision.window)
        self.patch_slots = windows**2 * dims.vision.window_slots
        dtype, kernel = jnp.dtype(config.model.compute_dtype), choose_kernel(mesh)
        self.train_pass = Pass(dims, TRAIN, dtype, config.model.remat, kernel)
        self.rollout_pass = Pass(dims, ROLLOUT, dtype, kernel=kernel)
        self.loss = LossSettings(config.grpo, limits.temperature, _VISUAL_IDS, config.model.freeze_vision)
        self.optimizer = make_optimizer(config.train, config.model.freeze_vision)
        self.master = self._policy(TRAIN, jnp.float32)
        self.reference_policy = self._policy(TRAIN, dtype)
        self.rollout_policy = self._policy(ROLLOUT, dtype)
        self.state = self._on_mesh(jax.eval_shape(partial(initial_state, optimizer=self.optimizer), self.master))
        self.patches = self._patches()
        embed = partial(embed_images, setup=self.train_pass)
        frozen = config.model.freeze_vision
        self.prompts = self._on_mesh(jax.eval_shape(embed, self.master, self.patches)) if frozen else self.patches
        b, g, r = self.batch, self.group, self.response_tokens
        self.responses = Rollout(
            tokens_bgr=self._rows((b, g, r), jnp.int32),
            length_bg=self._rows((b, g), jnp.int32),
            logps_bgr=self._rows((b, g, r), jnp.float32),
            finished_bg=self._rows((b, g), jnp.bool_),
        )

    @property
    def stream(self) -> Stream:
        return Stream(self.prompt_tokens, self.group, self.response_tokens)

    def programs(self) -> Iterator[tuple[str, Callable[[], Any], Sequence[Any]]]:
        """In the order of a step: name, what lowers it, and what else lies in memory while it runs."""
        if self.config.model.freeze_vision:
            yield "vision", self.lower_vision, (self.state.optimizer, self.reference_policy)
        yield "reshard", self.lower_reshard, (self.state.optimizer, self.reference_policy)
        yield "rollout", self.lower_rollout, (self.state, self.reference_policy)
        yield "reference", self.lower_reference, (self.state,)
        yield "update", self.lower_update, (self.reference_policy,)

    def lower_vision(self) -> Any:
        return embed_images.lower(self.master, self.patches, setup=self.train_pass)

    def lower_reshard(self) -> Any:
        return rollout_layout(self.dims, self.rollout_pass.dtype).lower(self.master)

    def lower_rollout(self) -> Any:
        limits = self.config.rollout
        tokens = (limits.max_response_tokens, _END_IDS, _PAD_ID, _VISUAL_IDS)
        sampling = Sampling(self.group, *tokens, limits.temperature, limits.top_p, limits.top_k)
        key = self._on_mesh(jax.eval_shape(lambda: jax.random.key(0)))
        return sample.lower(self.rollout_policy, self.prompts, key, setup=self.rollout_pass, sampling=sampling)

    def lower_reference(self) -> Any:
        setup = self.train_pass._replace(remat=False)
        tokens = self.responses.tokens_bgr
        return reference_logps.lower(self.reference_policy, self.prompts, tokens, setup=setup, settings=self.loss)

    def lower_update(self) -> Any:
        b, g, r = self.batch, self.group, self.response_tokens
        learnt = UpdateBatch(
            self.prompts,
            self.responses,
            advantages_bg=self._rows((b, g), jnp.float32),
            keep_bg=self._rows((b, g), jnp.bool_),
            ref_logps_bgr=self._rows((b, g, r), jnp.float32),
        )
        parts = self.batch // self.config.train.micro_batch_size
        settings = {"optimizer": self.optimizer, "setup": self.train_pass, "settings": self.loss}
        return update.lower(self.state, learnt, micro_batches=parts, **settings)

    def attention_scores(self) -> dict[int, int]:
        """Scores that the attention kernel computes for one head, by the padded length of its sequence."""
        p, _, r = self.stream
        return {
            padded_length(self.patch_slots): padded_length(self.patch_slots) ** 2,
            padded_length(p): live_scores(p, 1, p),
            padded_length(self.stream.tokens): live_scores(p, r, self.stream.tokens),
        }

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._array(shape, dtype, TRAIN.spec("batch", *(None,) * (len(shape) - 1)))

    def _on_mesh(self, tree: Any, dtype: Any = None) -> Any:
        """What ``jax.eval_shape`` made, with its shardings on the mesh."""
        spec = lambda leaf: leaf.sharding.spec if leaf.sharding else PartitionSpec()  # noqa: E731
        return jax.tree.map(lambda leaf: self._array(leaf.shape, dtype or leaf.dtype, spec(leaf)), tree)

    def _policy(self, layout: Layout, dtype: Any) -> Policy:
        return self._on_mesh(abstract_policy(self.dims, layout), dtype)

    def _patches(self) -> PromptBatch:
        b, p, s = self.batch, self.prompt_tokens, self.patch_slots
        return PromptBatch(
            tokens_bp=self._rows((b, p), jnp.int32),
            length_b=self._rows((b,), jnp.int32),
            positions_b3p=self._rows((b, 3, p), jnp.int32),
            next_position_b=self._rows((b,), jnp.int32),
            image_index_bp=self._rows((b, p), jnp.int32),
            patches_bisc=self._rows((b, 1, s, self.dims.vision.patch_width), jnp.float32),
            patch_hw_bis2=self._rows((b, 1, s, 2), jnp.int32),
            patch_valid_bis=self._rows((b, 1, s), jnp.bool_),
        )


def shard_bytes(tree: Any) -> int:
    """Bytes that one chip holds of abstract values."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def analyse(
    name: str, lower: Callable[[], Any], beside: Sequence[Any], chip: Chip, attention: Mapping[int, int]
) -> list[PhasePlan]:
    """Compiles a program and reads its memory and cost from it. The rollout is two phases: prefill and decode.

    Args:
      name, lower, beside: see ``Step.programs``.
      attention: see ``Step.attention_scores``.
    """
    names = ["prefill", "decode"] if name == "rollout" else [name]
    resident = shard_bytes(beside) / _GIB
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(?([\d.]+)([MG])\)? exceeds|Used ([\d.]+)([MG])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        size, unit = (needed[1], needed[2]) if needed[1] else (needed[3], needed[4])
        own = float(size) / (1024 if unit == "M" else 1)
        return [PhasePlan(phase, 1, 0.0, own, resident, own + resident, fits=False) for phase in names]
    memory = compiled.memory_analysis()
    own = (memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes) / _GIB
    arguments = memory.argument_size_in_bytes / _GIB
    program = Program(compiled.as_text())
    if name == "rollout":
        around, turn, turns = program.split("decode_step")
        costs = [(around, 1), (turn, turns)]
    else:
        costs = [(program.cost, 1)]
    phases = []
    for phase, (cost, runs) in zip(names, costs, strict=True):
        flops = total_flops(cost, attention)
        times = {"compute": flops / chip.flops, "HBM": cost.bytes / chip.hbm}
        times["interconnect"] = sum(cost.collectives.values()) / chip.link
        bound = max(times, key=times.__getitem__)
        phases.append(
            PhasePlan(
                phase=phase,
                runs=runs,
                arguments_gib=arguments,
                temporaries_gib=own - arguments,
                resident_gib=resident,
                hbm_gib=own + resident,
                fits=own + resident <= chip.hbm_gib,
                flops=flops,
                bytes=cost.bytes,
                collective_bytes=cost.collectives,
                seconds=times[bound],
                bound=bound,
            )
        )
    return phases


def total_flops(cost: Cost, attention: Mapping[int, int]) -> float:
    """FLOPs of matrix products, those of attention kernels too."""
    return cost.flops + sum(kernel_flops(kernel, attention) for kernel in cost.kernels)


def kernel_flops(kernel: Kernel, attention: Mapping[int, int]) -> float:
    """FLOPs of a splash attention call: its forward pass is 2 matrix products a block, its backward passes 3 and 4."""
    products = next((n for name, n in (("_fwd", 2), ("_dq", 3), ("_dkv", 4)) if name in kernel.name), None)
    queries = next(shape for shape in kernel.shapes if len(shape) >= 3 and shape[-2] in attention)
    if products is None:
        raise PlanError(f"kernel {kernel.name}: expected one of splash attention's")
    return kernel.calls * 2.0 * products * math.prod(queries[:-2]) * attention[queries[-2]] * queries[-1]


def make_plan(config: Config, config_path: str | None, topology: str, report: Callable[[str], None]) -> Plan:
    """Compiles all phases of a step of this run for a slice.

    Args:
      config: its mesh has as many chips as the slice.
      config_path: named in the result.
      topology: such as "v5e:4x4".
      report: told which phase is being compiled; it takes minutes.

    Raises:
      PlanError, MeshError, CheckpointError: the slice, the mesh or the model is not one, or they do not go together.
    """
    chip, _, _ = read_topology(topology)
    mesh = make_topology_mesh(config.mesh, topology)
    dims = find_dims(config.model.path)
    check_fits(mesh, dims, config.train.batch_size, config.train.micro_batch_size)
    phases: list[PhasePlan] = []
    with jax.set_mesh(mesh):
        step = Step(config, dims, mesh)
        attention = step.attention_scores()
        for name, lower, beside in step.programs():
            report(name)
            phases += analyse(name, lower, beside, chip, attention)
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
    """What to change so that the phases that do not fit may."""
    advice = []
    data, fsdp, tensor = parse_mesh(config.mesh)
    for phase in over:
        if phase.phase == "update":
            if not config.model.remat:
                advice.append("--model.remat=true: recompute blocks in the backward pass")
            if config.train.micro_batch_size > data * fsdp:
                advice.append(f"--train.micro_batch_size={data * fsdp}: one prompt with its answers a row of the mesh")
            if config.train.moment_dtype == "float32":
                advice.append("--train.moment_dtype=bfloat16: 2 bytes less a parameter")
            if not config.model.freeze_vision:
                advice.append("--model.freeze_vision=true: no moments of the vision tower, no backward pass through it")
        if config.model.compute_dtype == "float32":
            advice.append("--model.compute_dtype=bfloat16: half the bytes of activations, reference and caches")
        if phase.phase in ("reference", "update", "decode"):
            shorter = config.rollout.max_response_tokens // 2
            advice.append(f"--rollout.max_response_tokens={shorter}: shorter answers")
        if phase.phase in ("prefill", "decode") and config.train.batch_size > data * fsdp:
            advice.append(f"--train.batch_size={data * fsdp}: fewer prompts a step")
    if over:
        advice.append(f"a larger slice, such as --mesh={2 * fsdp * data}x{tensor}: weights and moments spread over it")
    return list(dict.fromkeys(advice))


def print_plan(plan: Plan, console: Console) -> None:
    """A table for people, and the verdict."""
    table = Table(
        title=f"{plan.config or 'the toy run'} on {plan.topology}, mesh {plan.mesh}",
        caption=f"prompts of {plan.prompt_tokens}, answers of {plan.response_tokens} tokens; "
        "one chip's memory in GiB and traffic in GB; seconds are a lower bound",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for title in ("phase", "runs", "args", "temps", "beside", "HBM", "TFLOP", "GB", "sent", "s"):
        table.add_column(title, justify="left" if title == "phase" else "right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for phase in plan.phases:
        known = phase.seconds is not None
        sent = sum((phase.collective_bytes or {}).values())
        gib = (phase.arguments_gib, phase.temporaries_gib, phase.resident_gib, phase.hbm_gib)
        cost = ((phase.flops or 0) / 1e12, (phase.bytes or 0) / 1e9, sent / 1e9, phase.seconds or 0)
        row = [f"{value:.2f}" for value in gib] + [f"{value:.3g}" if known else "?" for value in cost]
        table.add_row(phase.phase, str(phase.runs), *row, phase.bound or "?", style=None if phase.fits else "bold red")
    console.print(table)
    peak = max(plan.phases, key=lambda phase: phase.hbm_gib)
    verdict = "fits" if plan.fits else "does not fit"
    print(f"{verdict}: {peak.hbm_gib:.2f} GiB of {plan.hbm_limit_gib:.2f} GiB a chip, in {peak.phase}")
    if plan.seconds_per_step:
        rate = plan.samples_per_second_per_chip
        print(f"at least {plan.seconds_per_step:.1f} s a step, at most {rate:.3g} samples/s a chip (roofline)")
    if plan.advice:
        print("to make it fit:\n" + "\n".join(f"  {line}" for line in plan.advice))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 when all phases fit, 1 when one does not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="segzero_jax.plan", description="Compiles a training step for a TPU slice without one: memory, cost, time."
    )
    parser.add_argument("--topology", required=True, metavar="NAME", help="the slice: v5e:4x4, v6e:4x4, v5p:2x2x4")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    args, config = configs.parse_command_line(parser, argv)
    # Nothing runs here: on a TPU host, the chips stay free.
    jax.config.update("jax_platforms", "cpu")
    console = Console(stderr=True)
    try:
        with console.status("compiling") as status:
            tell = lambda name: status.update(f"compiling {name}")  # noqa: E731
            plan = make_plan(config, args.config, args.topology, tell)
    except (PlanError, ConfigError, MeshError, CheckpointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(asdict(plan), indent=1))
    else:
        print_plan(plan, Console())
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
