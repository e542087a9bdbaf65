"""The papers' data sets: their places on the Hugging Face hub, and the command that builds a set."""

import shlex
from pathlib import Path

from segzero_jax.config import Config

# The split of each repository; None if the names of its files tell. The files of ReasonSeg_val are named "test".
HUB: dict[str, dict[str, str | None]] = {
    "refCOCOg_9k_840": {"Ricky06662/refCOCOg_9k_840": None},
    "VisionReasoner_multi_object_1k_840": {"Ricky06662/VisionReasoner_multi_object_1k_840": None},
    "VisionReasoner_multi_object_7k_840": {"Ricky06662/VisionReasoner_multi_object_7k_840": None},
    "ReasonSeg": {"Ricky06662/ReasonSeg_val": "val", "Ricky06662/ReasonSeg_test": "test"},
}


def build_command(name: str, split: str, data_dir: str | Path) -> str:
    """The command that builds a data set with that split, with ``--source DIR`` if it is not known to be on the hub."""
    splits = HUB.get(name, {}).values()
    source = "" if None in splits or split in splits else " --source DIR"
    elsewhere = "" if str(data_dir) == Config().data.dir else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python -m segzero_jax.data.build {name}{source}{elsewhere}"
