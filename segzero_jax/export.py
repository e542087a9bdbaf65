"""``python -m segzero_jax.export --run DIR --out DIR``: a run's checkpoint as a directory that ``transformers`` loads.

With ``--adapters`` it holds only a run's adapters, as PEFT loads them. The export works in host memory, without an
accelerator, so it may run beside the training. The directory appears whole or not at all.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from segzero_jax import __version__
from segzero_jax.asking import ORIGIN, asked, find_checkpoint
from segzero_jax.checkpoint_paths import locate, storage_path
from segzero_jax.config import ConfigError, OneLineParser
from segzero_jax.hub import repository
from segzero_jax.local_path import check_folder, local_path
from segzero_jax.mesh import make_mesh
from segzero_jax.model import save_hf
from segzero_jax.model.lora import lost_to_rounding, merge
from segzero_jax.model.peft_files import save_peft
from segzero_jax.model.weights import CheckpointError
from segzero_jax.saved_policy import load_adapters, load_policy
from segzero_jax.terminal import write_line


class ExportError(ValueError):
    """A run that cannot be exported, or not to that directory; the message is one line."""


def export(
    run: str | Path,
    out: Path,
    step: int | None,
    dtype: str,
    *,
    adapters: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Writes one checkpoint of a run with the configuration, tokenizer and processor files of its ``model.path``.

    The adapters of a run with LoRA are merged into the weights that it started from.

    Args:
      run: a run directory, or its checkpoint directory; local or ``gs://``.
      out: a new or empty directory, or an earlier export, which is replaced; or a link to where one is to be.
      step: the step of the checkpoint; None for the newest.
      dtype: the dtype that the weights are rounded to.
      adapters: write only the adapters, without the weights that they apply to.
      say: receives a line on how much of the adapters' change is lost if they are merged into rounded weights.

    Returns:
      The files written.

    Raises:
      ExportError: ``out`` holds something else or cannot be replaced, or ``run`` is not a run.
      CheckpointError: the run has no such checkpoint, it is damaged, its bucket cannot be read now, its ``model.path``
        is gone, or it has no adapters to write alone.
      ConfigError: the run's configuration is of another version, or ``out`` would be inside a file.
    """
    _refuse_to_mix(out)
    # An existing directory is replaced whole; for a link, its target is replaced, on the target's disk.
    target = _target(out)
    name = _find(run, step)
    if adapters:
        learnt, config = load_adapters(name)
    else:
        policy, dims, merged_config = load_policy(name, jnp.float32)
        assert merged_config is not None
        if merged_config.model.lora_rank and (lost := lost_to_rounding(policy, jnp.dtype(dtype))):
            say(
                f"rounded to {dtype}, the merged matrices are off by {lost:.2g} of what the adapters change; "
                "--dtype=float32 and --adapters keep all of it"
            )
        policy, config = merge(policy), merged_config
    how = asked(config)
    if config.model.lora_rank and not adapters and dtype == "float32":
        # Rounded at loading, the adapters' change would be lost again; the run itself adds them unrounded.
        how["model.compute_dtype"] = "float32"
    origin = {
        "run": storage_path(run).name,
        "step": int(Path(name).name),
        "base_model": config.model.path,
        "dtype": dtype,
        "segzero_jax": __version__,
        "asked": how,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        if adapters:
            new.mkdir()
            model = config.model
            base = repository(model.path)  # PEFT accepts no revision here.
            files = save_peft(learnt, new, rank=model.lora_rank, alpha=model.lora_alpha, base=base, dtype=dtype)
        else:
            files = save_hf(policy, dims, new, dtype=dtype, carry_from=config.model.path)
        files.append(new / ORIGIN)
        files[-1].write_text(json.dumps(origin, indent=2) + "\n")
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
    return [out / file.name for file in files]


def _find(run: str | Path, step: int | None) -> str:
    """The path of a checkpoint. Raises as ``export`` does."""
    located = locate(run)
    if located is not None and located[1] is None:
        return find_checkpoint(str(run)) if step is None else str(located[0] / str(step))
    if located is None:
        raise ExportError(f"--run={run}: no checkpoints there; expected the directory of a training run")
    directory, named = located
    if step not in (None, named):
        raise ExportError(f"--run={run}: is step {named}, --step={step}; leave out --step, or the number in --run")
    return str(directory / str(named))


def _target(out: Path) -> Path:
    return Path(os.path.realpath(out))


def _refuse_to_mix(out: Path) -> None:
    if out.is_dir():
        target = _target(out)
        fixed = "where a disk is mounted" if os.path.ismount(target) else ""
        fixed = fixed or ("the current folder" if target == Path.cwd() else "")
        if fixed:
            raise ExportError(f"--out={out}: is {fixed}, which cannot be replaced; expected a folder in it")
        other = next((entry.name for entry in sorted(out.iterdir())), None)
        if other is None or (out / ORIGIN).is_file():
            return
        raise ExportError(f"--out={out}: holds {other}; expected a new directory or an earlier export")
    if out.exists():
        raise ExportError(f"--out={out}: is a file; expected a new directory or an earlier export")
    check_folder(out, f"--out={out}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = OneLineParser(
        prog="segzero_jax.export", description="Writes a run's checkpoint as a Hugging Face directory."
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        required=True,
        help="the directory of a training run, or that of its checkpoints, gs:// too",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="a new directory, or an earlier export")
    parser.add_argument("--step", metavar="N", type=_step, help="of the checkpoint [the newest]")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the exported weights [bfloat16; float32 with --adapters]",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="export only the LoRA adapters, in the format of PEFT [merge them into the weights]",
    )
    args = parser.parse_args(argv)
    dtype = args.dtype or ("float32" if args.adapters else "bfloat16")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about read-only access, which is intended.
    try:
        out = local_path(args.out, "--out", "export to a disk and copy it from there")
        with jax.set_mesh(make_mesh("1x1")):
            say = lambda text: write_line(sys.stdout, text)  # noqa: E731
            files = export(args.run, out, args.step, dtype, adapters=args.adapters, say=say)
    except (ExportError, CheckpointError, ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for file in files:
        write_line(sys.stdout, f"{file.stat().st_size:>14,} {file}")
    write_line(sys.stdout, f"wrote {args.out}")
    return 0


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: expected the number of a step")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
