"""A run's directory: opened for one run only, and what of it is done."""

from pathlib import Path

from segzero_jax import config as configs
from segzero_jax import jsonl
from segzero_jax.config import Config, ConfigError


def has_evaluation(config: Config, run_dir: Path, step: int) -> bool:
    """Whether all held-out splits were evaluated after ``step`` updates."""
    file = run_dir / "evaluations.jsonl"
    done = {row["split"] for row in jsonl.read(file) if row["step"] == step} if file.exists() else set()
    return done >= {split_label(name) for name in config.data.eval_splits}


def split_label(name: str) -> str:
    """A held-out split as metrics and files name it: "ReasonSeg/val" would be a folder."""
    return name.replace("/", "-")


def open_run(config: Config, resume: bool) -> Path:
    """Makes the run directory and writes ``config.yaml``; refuses to mix two runs in one directory."""
    run_dir = Path(config.run.dir).expanduser()
    begun = (run_dir / "metrics.jsonl").exists() or any(run_dir.glob("checkpoints/[0-9]*"))
    if not resume and begun:
        raise ConfigError(
            f"run.dir={run_dir}: holds a run already; add --resume to go on with it, or choose another run.dir"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    jsonl.replace(run_dir / "config.yaml", configs.to_yaml(config).encode())
    return run_dir
