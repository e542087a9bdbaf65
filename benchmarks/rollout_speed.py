"""Sampling one prompt group beside transformers' ``generate`` with a KV cache: tokens per second, greedy tokens equal.

    python -m benchmarks.rollout_speed [--tokens 128] [--rounds 3] [--cores 2] [--output FILE]

Policy, image and prompt of ``benchmarks/learning_phase.py``; 8 responses. transformers prefills 8 copies of the prompt,
our side one. Decoding time is the total minus the time to the first token. Takes about five minutes on two cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

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


def compare(ours: Side, peer: Side, tokens: int) -> None:
    """Samples once on both sides, which also warms them up. Raises Unequal if a token differs.

    Also raises if the same few tokens repeat: those would be equal even if the whole context were lost.
    """
    mine, theirs = (side("generate", tokens=tokens)["tokens"] for side in (ours, peer))
    for row, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            at = next(i for i in range(tokens) if a[i] != b[i])
            raise Unequal(f"response {row} differs from token {at} on: {a[at]} and {b[at]}")
        if len(set(a)) <= tokens // 2:
            raise Unequal(f"response {row} repeats itself, {len(set(a))} distinct tokens of {tokens}: no comparison")


def measure(ours: Side, peer: Side, tokens: int, rounds: int, group: int) -> dict[str, dict[str, float]]:
    """Median times and rates of both sides."""
    found = {}
    for name, made in take_turns(ours, peer, rounds, "generate", tokens=tokens).items():
        first, whole = (statistics.median(row[key] for row in made) for key in ("first", "whole"))
        rate = group * (tokens - 1) / statistics.median(row["whole"] - row["first"] for row in made)
        peak = max(row["peak_gib"] for row in made)
        found[name] = {"prefill s": first, "whole s": whole, "decode tokens/s": rate, "peak GiB": peak}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=at_least(2), default=128, help="new tokens of each response [128]")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="timed rollouts of each side [3]")
    parser.add_argument("--cores", type=at_least(1), default=2, help="cores of each side [2]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    need("reward,dev", "torch", "transformers")
    keep_to(args.cores)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), Shape())
        with sides(Path(name), Settings(cores=args.cores)) as (ours, peer):
            try:
                compare(ours, peer, args.tokens)
            except Unequal as error:
                sys.exit(f"the sides differ, no times: {error}")
            found = measure(ours, peer, args.tokens, args.rounds, Shape().group)
    print(f"{'':18}{'transformers':>14}{'ours':>10}{'ratio':>8}")
    for key, theirs in found["peer"].items():
        mine = found["ours"][key]
        better = mine / theirs if key.endswith("/s") else theirs / mine
        print(f"{key:18}{theirs:14.1f}{mine:10.1f}{better:8.1f}")
    if args.output:
        args.output.write_text(json.dumps({**found, **machine("torch", "transformers")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
