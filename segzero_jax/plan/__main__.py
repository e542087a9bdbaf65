"""``python -m segzero_jax.plan --config C --mesh M --topology v5e:4x4``."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import jax
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from segzero_jax import config as configs
from segzero_jax.config import ConfigError
from segzero_jax.mesh import MeshError
from segzero_jax.model.weights import CheckpointError
from segzero_jax.plan.phases import Plan, make_plan
from segzero_jax.plan.slices import PlanError
from segzero_jax.terminal import write_line


def print_plan(plan: Plan, console: Console) -> None:
    """Prints a table for people, and the verdict."""
    table = Table(
        title=f"{plan.config or 'the toy run'} on {plan.topology}, mesh {plan.mesh}",
        caption=f"prompts of {plan.prompt_tokens}, answers of {plan.response_tokens} tokens; "
        "one chip's memory in GiB and traffic in GB; s: seconds, a lower bound, of which "
        "waits: link traffic that nothing overlaps",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for title in ("phase", "runs", "args", "temps", "beside", "HBM", "TFLOP", "GB", "sent", "s", "waits"):
        table.add_column(title, justify="left" if title == "phase" else "right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for phase in plan.phases:
        known = phase.seconds is not None
        sent = sum((phase.collective_bytes or {}).values())
        gib = (phase.arguments_gib, phase.temporaries_gib, phase.resident_gib, phase.hbm_gib)
        seconds = (phase.seconds or 0, phase.waiting_seconds or 0)
        cost = ((phase.flops or 0) / 1e12, (phase.bytes or 0) / 1e9, sent / 1e9, *seconds)
        row = [f"{value:.2f}" for value in gib] + [f"{value:.3g}" if known else "?" for value in cost]
        table.add_row(phase.phase, str(phase.runs), *row, phase.bound or "?", style=None if phase.fits else "bold red")
    # Rich would truncate numbers if there is less room; a terminal that is too narrow breaks lines instead.
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, needed)
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

            def tell(name: str) -> None:
                # A phase takes minutes, also without a terminal.
                if console.is_terminal:
                    status.update(f"compiling {name}")
                else:
                    write_line(sys.stderr, f"compiling {name}")

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
