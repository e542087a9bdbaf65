"""Plans of the presets for TPU slices of several sizes: the tables of docs/scaling.md.

    python -m benchmarks.scaling [--case NAME ...] [--output DIR]

Each case is compiled by the TPU compiler on this machine, which needs libtpu but no TPU: about five minutes per case on
two cores. A plan is the output of ``python -m segzero_jax.plan --json``; with ``--output`` each is saved as
DIR/NAME.json, and an existing file is read instead of compiling again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.peer_group import need
from segzero_jax import config as configs
from segzero_jax.plan import make_plan

ROOT = Path(__file__).parent.parent
_LORA = {"model.lora_rank": 64}
# Name: preset, slice, and changes to the preset. A mesh with more than 16 rows needs more prompts per step.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "7b_v5e_4x4": ("seg_zero_7b", "v5e:4x4", {}),
    "7b_v6e_4x4": ("seg_zero_7b", "v6e:4x4", {}),
    "7b_v5e_8x8": ("seg_zero_7b", "v5e:8x8", {"mesh": "16x4", "train.micro_batch_size": 16}),
    "7b_v5e_16x16": (
        "seg_zero_7b",
        "v5e:16x16",
        {"mesh": "64x4", "train.batch_size": 64, "train.micro_batch_size": 64},
    ),
    "7b_v5e_16x16_data": (
        "seg_zero_7b",
        "v5e:16x16",
        {"mesh": "4x16x4", "train.batch_size": 64, "train.micro_batch_size": 64},
    ),
    "3b_v5e_2x4": ("seg_zero_3b", "v5e:2x4", {}),
    "7b_lora_v5e_2x4": ("seg_zero_7b", "v5e:2x4", {"mesh": "2x4", **_LORA, "train.micro_batch_size": 8}),
    "7b_lora_v5e_8x1": ("seg_zero_7b", "v5e:2x4", {"mesh": "8x1", **_LORA, "train.micro_batch_size": 8}),
    "7b_lora_v5e_2x2": ("seg_zero_7b", "v5e:2x2", {"mesh": "2x2", **_LORA, "train.micro_batch_size": 4}),
}


def made(name: str, folder: Path | None) -> dict[str, Any]:
    """A case's plan, parsed from JSON."""
    file = folder / f"{name}.json" if folder else None
    if file and file.is_file():
        return json.loads(file.read_text())
    preset, topology, changes = CASES[name]
    path = ROOT / "configs" / f"{preset}.yaml"
    config = configs.replace(configs.load(path), **changes)
    plan = asdict(make_plan(config, str(path.relative_to(ROOT)), topology, lambda phase: print(f"{name}: {phase}")))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plan, indent=1) + "\n")
    return plan


def table(plan: dict[str, Any]) -> str:
    """A Markdown table of each phase's memory and cost on one chip."""
    lines = [
        "| phase | runs | HBM GiB | TFLOP | GB of HBM | GB sent | seconds, all runs | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for phase in plan["phases"]:
        runs, sent = phase["runs"], sum((phase["collective_bytes"] or {}).values()) / 1e9
        if phase["seconds"] is None:  # It does not fit into memory, so it was not fully compiled.
            lines.append(f"| {phase['phase']} | {runs} | {phase['hbm_gib']:.2f} | ? | ? | ? | ? | ? |")
            continue
        short = lambda x: f"{x:.3g}" if x < 1000 else f"{x:.0f}"  # noqa: E731
        cost = [short(x) for x in (phase["flops"] / 1e12, phase["bytes"] / 1e9, sent)]
        cost.append(f"{runs * phase['seconds']:.2f}")
        lines.append(f"| {phase['phase']} | {runs} | {phase['hbm_gib']:.2f} | {' | '.join(cost)} | {phase['bound']} |")
    return "\n".join(lines)


def summary(name: str, plan: dict[str, Any]) -> str:
    """The Markdown table row of a case."""
    peak = max(plan["phases"], key=lambda phase: phase["hbm_gib"])
    memory = f"{peak['hbm_gib']:.2f} of {plan['hbm_limit_gib']:.2f} in {peak['phase']}"
    if plan["seconds_per_step"] is None:
        return f"| {name} | {plan['topology']} | {plan['mesh']} | {memory}: does not fit | - | - | - |"
    seconds = {phase["phase"]: phase["runs"] * phase["seconds"] for phase in plan["phases"]}
    longest = max(plan["phases"], key=lambda phase: seconds[phase["phase"]])
    return (
        f"| {name} | {plan['topology']} | {plan['mesh']} | {memory} | "
        f"{plan['seconds_per_step']:.1f} | {plan['samples_per_second_per_chip']:.3g} | "
        f"{longest['phase']} {seconds[longest['phase']]:.1f} s: {longest['bound']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="[all]")
    parser.add_argument("--output", type=Path, metavar="DIR", help="keep plans there, and read those that are there")
    args = parser.parse_args()
    need("dev", "libtpu")
    jax.config.update("jax_platforms", "cpu")
    plans = {name: made(name, args.output) for name in args.case}
    for name, plan in plans.items():
        print(f"\n{name}: {plan['topology']}, mesh {plan['mesh']}\n\n{table(plan)}")
    print("\n| case | slice | mesh | HBM GiB a chip | s a step | samples/s a chip | longest phase |")
    print("|---|---|---|---|---|---|---|")
    for name, plan in plans.items():
        print(summary(name, plan))


if __name__ == "__main__":
    main()
