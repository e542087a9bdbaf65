"""The learning phase of one prompt group beside PyTorch's: time, memory, loss and gradients.

    python -m benchmarks.learning_phase [--rounds 3] [--cores 2] [--output FILE]

Seg-Zero's shapes (840 x 840 image, prompt of 1,150 tokens, 8 responses of 150), a Qwen2.5-VL of 46 M parameters,
float32, the same weights. PyTorch runs old, reference and update on the repeated layout. Our side runs reference and
update of the prefix group; on-policy, old and new log-probabilities are the same. The sides take turns of two steps,
the second of which is timed. Takes about fifteen minutes and 20 GB on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.peer_group import (
    Settings,
    Shape,
    Side,
    Unequal,
    at_least,
    keep_to,
    machine,
    need,
    sides,
    take_turns,
    write,
)

# Largest relative differences between the sides. On-policy, the loss is the mean advantage plus a small share of KL,
# the only part that depends on reference and policy.
LIMITS = {"loss": 1e-4, "kl": 1e-4, "grad_norm": 3e-4, "gradients": 1e-3}
PHASES = ("old", "reference", "update")


def compare(ours: Side, peer: Side, directory: Path) -> dict[str, float]:
    """Runs one step of both sides from the same weights; returns the differences of loss, KL and gradients.

    Raises:
      Unequal: a difference exceeds its limit.
    """
    files = [str(directory / f"{name}.npz") for name in ("ours", "peer")]
    mine, theirs = (side("learn", gradients=file) for side, file in zip((ours, peer), files, strict=True))
    found = {name: abs(mine[name] - theirs[name]) / abs(theirs[name]) for name in ("loss", "kl", "grad_norm")}
    with np.load(files[0]) as a, np.load(files[1]) as b:
        if set(a) != set(b):
            raise Unequal(f"tensors differ by name: {sorted(set(a) ^ set(b))[:3]}")
        found["gradients"] = max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in a)
    for name, limit in LIMITS.items():
        if not found[name] <= limit:
            raise Unequal(f"{name} differ by {found[name]:.2g} (relative), expected at most {limit:g}")
    return found


def measure(ours: Side, peer: Side, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by phase, and the largest peak memory."""
    found = {}
    for name, made in take_turns(ours, peer, rounds, "learn").items():
        seconds = {phase: statistics.median(row[phase] for row in made) for phase in PHASES}
        total = statistics.median(sum(row[phase] for phase in PHASES) for row in made)
        found[name] = {**seconds, "total": total, "peak_gib": max(row["peak_gib"] for row in made)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=3, help="timed steps of each side [3]")
    parser.add_argument("--cores", type=at_least(1), default=2, help="cores of each side [2]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    need("reward,dev", "torch", "transformers")
    keep_to(args.cores)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), Shape())
        with sides(Path(name), Settings(cores=args.cores)) as (ours, peer):
            try:
                apart = compare(ours, peer, Path(name))
            except Unequal as error:
                sys.exit(f"the sides differ, no times: {error}")
            found = measure(ours, peer, args.rounds)
    print("relative differences: " + ", ".join(f"{name} {value:.1e}" for name, value in apart.items()))
    print(f"{'':12}{'PyTorch':>10}{'ours':>10}{'ratio':>8}")
    for phase in (*PHASES, "total"):
        theirs, mine = found["peer"][phase], found["ours"][phase]
        print(f"{phase + ' s':12}{theirs:10.1f}{mine:10.1f}{f'{theirs / mine:8.1f}' if mine else '':8}")
    theirs, mine = found["peer"]["peak_gib"], found["ours"]["peak_gib"]
    print(f"{'peak GiB':12}{theirs:10.1f}{mine:10.1f}{theirs / mine:8.1f}")
    if args.output:
        result = {"apart": apart, **found, **machine("torch", "transformers")}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
