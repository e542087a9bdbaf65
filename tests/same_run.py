"""Whether two run directories hold the same run, to the last bit; times apart."""

import json
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from test_tensorboard import events


def lines(file: Path) -> list[dict]:
    """Whole lines, times apart."""
    text = file.read_text() if file.exists() else ""
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens_per_second"} for row in rows]


def scalars(run: Path) -> list[tuple[int, str, float]]:
    """What TensorBoard is told, times apart."""
    found = []
    for path in (run / "tensorboard").iterdir():
        for event in events(path):
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return sorted(
        (step, tag, value) for step, tag, value in found if not fnmatch(tag, "time/*") and "tokens_per" not in tag
    )


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        return {
            f"{item}/{name}": np.asarray(value)
            for item in ("policy", "optimizer")
            for name, value in reader.restore(checkpoint / item).items()
        }


def assert_same(run: Path, whole: Path, step: int) -> None:
    """Metrics, evaluations, rollouts, TensorBoard's numbers, and the checkpoint of the last step."""
    assert lines(run / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert lines(run / "evaluations.jsonl") == lines(whole / "evaluations.jsonl")
    for folder in ("rollouts", "evaluations"):
        names = sorted(path.name for path in (whole / folder).glob("*.jsonl"))
        assert sorted(path.name for path in (run / folder).glob("*.jsonl")) == names
        for name in names:
            assert lines(run / folder / name) == lines(whole / folder / name), name
    assert scalars(run) == scalars(whole)
    ours, theirs = (arrays(path / f"checkpoints/{step}") for path in (run, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
