"""The papers' data sets: where they are on the Hugging Face hub, and the command that builds a set."""

import shlex
from pathlib import Path

from segzero_jax.config import Config

# Which split a repository is; None where the names of its files say it. The files of ReasonSeg_val say "test".
HUB: dict[str, dict[str, str | None]] = {
    "refCOCOg_9k_840": {"Ricky06662/refCOCOg_9k_840": None},
    "VisionReasoner_multi_object_1k_840": {"Ricky06662/VisionReasoner_multi_object_1k_840": None},
    "VisionReasoner_multi_object_7k_840": {"Ricky06662/VisionReasoner_multi_object_7k_840": None},
    "ReasonSeg": {"Ricky06662/ReasonSeg_val": "val", "Ricky06662/ReasonSeg_test": "test"},
}


def build_command(name: str, split: str, data_dir: str | Path) -> str:
    """What builds a data set with that split; ``--source DIR`` where the hub is not known to have it."""
    splits = HUB.get(name, {}).values()
    source = "" if None in splits or split in splits else " --source DIR"
    elsewhere = "" if str(data_dir) == Config().data.dir else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python -m segzero_jax.data.build {name}{source}{elsewhere}"
