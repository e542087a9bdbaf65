"""A run's directory: opening it for one run only, finding what is already done, and which step was best."""

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from etils import epath

from segzero_jax import config as configs
from segzero_jax import jsonl
from segzero_jax.checkpoint import Checkpoints, StorageError, run_difference
from segzero_jax.checkpoint_paths import checkpoint_directory, complete_steps, refuse_unfinished, storage_path
from segzero_jax.config import Config, ConfigError
from segzero_jax.evaluation import MODES, summary_names
from segzero_jax.file_lock import FolderHeld, hold
from segzero_jax.local_path import local_path
from segzero_jax.metrics import MetricsWriter
from segzero_jax.pods import Pod
from segzero_jax.record import metric_keys
from segzero_jax.shared_storage import check_storage
from segzero_jax.terminal import write_line

_SAVED = "saved.json"


class Beginning(NamedTuple):
    """How a run begins.

    Attributes:
      step: steps already done; the checkpoint of that step is restored. None starts from scratch.
      done: whether no step and no evaluation is left.
      saved: steps that had checkpoints at that time.
    """

    step: int | None
    done: bool
    saved: tuple[int, ...] = ()


def look(config: Config, resume: bool) -> tuple[Beginning, list[str]]:
    """How the run would begin, given what is in its directories; changes nothing.

    An interrupted run resumes from its newest intact checkpoint, or starts over if it had none yet.

    Args:
      resume: whether a checkpoint is required.

    Returns:
      How the run begins, and a line for each damaged checkpoint that is skipped.

    Raises:
      ConfigError: the directory is not on this machine, holds another run, or has no checkpoint to resume from.
      CheckpointError: its checkpoints are all damaged, or belong to another run.
    """
    run_dir = run_directory(config)
    directory = checkpoint_directory(config)
    if not complete_steps(directory):
        _check_nothing_there(config, run_dir, directory)
        if resume:
            raise ConfigError(f"run.dir={run_dir}: no checkpoint to resume from; start without --resume")
        return Beginning(None, done=False), []
    with Checkpoints(directory, read_only=True) as checkpoints:
        step, damaged = checkpoints.newest()
        checkpoints.check_config(step, config)
    _check_run_dir(config, run_dir, step)
    done = step >= config.train.steps and not missing_splits(config, run_dir, step)
    return Beginning(step, done), [f"{line}: going on from step {step}" for line in damaged]


def run_directory(config: Config) -> Path:
    """The directory of a run's files, on this machine's disk. Raises ConfigError for a URL."""
    return local_path(config.run.dir, "run.dir", "only run.checkpoint_dir may be in a bucket")


def begin(config: Config, resume: bool, pod: Pod) -> Beginning:
    """How a run begins on all its hosts, which must resume from the same checkpoint and share checkpoint storage.

    Raises:
      ConfigError: hosts see different checkpoints, or not what host 0 writes there; or as in ``check_keep_best`` and
        ``look``.
      CheckpointError: as in ``look``.
      StorageError: a host cannot write to the checkpoint directory, see ``check_storage``.
    """
    check_keep_best(config)
    run_directory(config)  # Refuses a URL before checkpoints are looked for in it.
    saved = tuple(complete_steps(checkpoint_directory(config)))
    beginning, passed_over = look(config, resume)
    seen = pod.exchange("the newest checkpoint", str(beginning.step))
    other = next((host for host, step in enumerate(seen) if step != seen[0]), None)
    if other is not None:
        raise ConfigError(
            f"{checkpoint_directory(config)}: the newest checkpoint is {seen[0]} on {pod.host(0)}, {seen[other]} on "
            f"{pod.host(other)}; run.checkpoint_dir has to be storage that all hosts share, such as gs://bucket/path"
        )
    if pod.first:
        for line in passed_over:
            write_line(sys.stderr, line)
    done = pod.from_first("what is left to do", lambda: beginning.done)
    if not done:
        # On a first start no host sees a checkpoint, whether or not they share storage.
        check_storage(config, pod)
    return Beginning(beginning.step, done, saved)


def _check_nothing_there(config: Config, run_dir: Path, directory: epath.Path) -> None:
    """Checks, where there is no checkpoint, that none should be there, so that the run may begin."""
    refuse_unfinished(directory)
    _refuse_another_run(config, run_dir)
    _refuse_lost_checkpoints(run_dir, directory)
    _check_best_is_chosen(config)


def _check_run_dir(config: Config, run_dir: Path, step: int) -> None:
    """Checks, where there are checkpoints up to ``step``, that the run's other files, if present, belong to it.

    And that the directory they were last written to does not hold newer ones: the run would repeat, and drop, steps.
    """
    if not (run_dir / "config.yaml").exists():
        return
    _refuse_another_run(config, run_dir)
    earlier = configs.load(run_dir / "config.yaml")
    if run_directory(earlier).resolve() != run_dir.resolve():
        return  # Moved or copied: the places that it names may be another run's by now.
    before, directory = checkpoint_directory(earlier), checkpoint_directory(config)
    newer: list[int] = []
    if storage_path(before) != storage_path(directory):
        with suppress(StorageError, ConfigError):  # If it cannot be read, it may be gone for good.
            newer = [other for other in complete_steps(before) if other > step]
    if newer:
        raise ConfigError(
            f"run.checkpoint_dir={directory}: its newest checkpoint is of step {step}, the run in run.dir={run_dir} "
            f"has one of step {newer[-1]} in {before}; go on with that place, or bring its checkpoints here"
        )


def _refuse_another_run(config: Config, run_dir: Path) -> None:
    """Refuses a directory whose metrics are from a different configuration or lack their config.yaml."""
    if not (run_dir / "metrics.jsonl").exists():
        return
    earlier = run_dir / "config.yaml"
    if not earlier.exists():
        raise ConfigError(f"run.dir={run_dir}: holds a run already, without its config.yaml; choose another run.dir")
    if difference := run_difference(configs.load(earlier), config):
        raise ConfigError(
            f"run.dir={run_dir}: holds a run already, with another configuration ({difference}); "
            "go on with the same one or choose another run.dir"
        )


def _refuse_lost_checkpoints(run_dir: Path, directory: epath.Path) -> None:
    """Refuses to start a run over its own metrics when its checkpoints are not where they should be."""
    if not (run_dir / "metrics.jsonl").exists():
        return
    earlier = configs.load(run_dir / "config.yaml")
    before = checkpoint_directory(earlier)
    if steps := complete_steps(before):
        raise ConfigError(
            f"run.checkpoint_dir={directory}: no checkpoint, those of the run in run.dir={run_dir} are in {before}, to "
            f"step {steps[-1]}; go on with that place, bring them here, or choose another run.dir"
        )
    if (saved := _saved_step(run_dir)) is not None:
        raise _lost(directory, run_dir, saved)
    rows = jsonl.read(run_dir / "metrics.jsonl")
    # Earlier versions did not note it. A save begins after its step's line is written, and the one before it is
    # complete by then.
    begun = [row["step"] for row in rows[:-1] if checkpoint_due(earlier, row["step"])]
    if len(begun) > 1 and not any(row.get("checkpoint/failed") for row in rows):
        raise _lost(directory, run_dir, begun[-2])


def _lost(directory: epath.Path, run_dir: Path, step: int) -> ConfigError:
    return ConfigError(
        f"{directory}: no checkpoint, though the run in run.dir={run_dir} has saved step {step}; is the disk mounted? "
        "Bring them back, or choose another run.dir"
    )


def note_saved(run_dir: Path, step: int) -> None:
    """Notes in ``run_dir`` that ``step`` has been saved: a start that finds no checkpoint must not begin anew."""
    with suppress(OSError):  # A full disk does not undo the save.
        jsonl.replace(run_dir / _SAVED, json.dumps({"step": step}).encode())


def _saved_step(run_dir: Path) -> int | None:
    """The step that ``note_saved`` noted last; None if there is no readable note."""
    try:
        return int(json.loads((run_dir / _SAVED).read_bytes())["step"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def refuse_moved(config: Config, preset: str | None) -> None:
    """Refuses a run's own ``config.yaml`` as the preset if its ``run.dir`` is not the directory that it is in.

    The run was moved or copied; it would begin anew at its old place, or continue another copy.

    Raises:
      ConfigError: so it is.
    """
    if preset is None or Path(preset).name != "config.yaml":
        return
    folder = Path(preset).expanduser().parent
    if (folder / "metrics.jsonl").exists() and folder.resolve() != run_directory(config).resolve():
        raise ConfigError(
            f"--config={preset}: its run.dir={config.run.dir} is not the folder of the run that it is in; "
            f"add --run.dir={folder}, or another one for a new run"
        )


def check_same_run(config: Config) -> None:
    """Checks, like ``look``, that the run's directories do not hold another run, but reads no arrays.

    Raises:
      ConfigError: ``run.dir`` holds another run, or one whose checkpoints are gone; or as in ``look``.
      JsonLinesError: a file of the run is damaged.
      CheckpointError: the checkpoints belong to another run, or are incomplete.
    """
    directory = checkpoint_directory(config)
    run_dir = run_directory(config)
    if not complete_steps(directory):
        _check_nothing_there(config, run_dir, directory)
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        # A start reports a damaged checkpoint and resumes from the one before.
        whole = [step for step in checkpoints.steps if not checkpoints.damage(step, ["run"])]
        if whole:
            checkpoints.check_config(whole[-1], config)
    _check_run_dir(config, run_dir, whole[-1] if whole else 0)


def missing_splits(config: Config, run_dir: Path, step: int) -> list[str]:
    """The held-out splits still to be evaluated after ``step`` steps."""
    if not evaluation_due(config, step):
        return []
    file = run_dir / "evaluations.jsonl"
    done = {row["split"] for row in jsonl.read(file) if row["step"] == step} if file.exists() else set()
    return [label for label in _labels(config) if label not in done]


def split_label(name: str) -> str:
    """The name of a held-out split in metrics and file names, where "ReasonSeg/val" would be a folder."""
    return name.replace("/", "-")


def _labels(config: Config) -> list[str]:
    return list(dict.fromkeys(split_label(name) for name in config.data.eval_splits))


def evaluation_due(config: Config, step: int) -> bool:
    """Whether held-out splits are evaluated after ``step`` steps."""
    return step in (0, config.train.steps) or (config.eval.every > 0 and step % config.eval.every == 0)


def checkpoint_due(config: Config, step: int) -> bool:
    """Whether the state after ``step`` is saved: at intervals, at the end, and where it may prove to be the best."""
    judged = _best_evaluation(config) is not None and evaluation_due(config, step)
    return judged or step == config.train.steps or step % config.train.checkpoint_every == 0


def score(config: Config, run_dir: Path, step: int) -> float | None:
    """What ``train.keep_best`` names, after ``step`` steps; None if not measured. OSError if ``run_dir`` is gone."""
    wanted: dict[str, int | str] = {"step": step}
    key, file = config.train.keep_best, run_dir / "metrics.jsonl"
    evaluation = _best_evaluation(config)
    if evaluation is not None:
        split, mode, key = evaluation
        wanted, file = wanted | {"split": split, "mode": mode}, run_dir / "evaluations.jsonl"
    rows = jsonl.read(file) if key and (file.exists() or not run_dir.exists()) else []
    if evaluation is not None:
        # A resume may have changed the number of questions, and with it what a number means.
        rows = [row for row in rows if (row["split"], row["mode"]) == evaluation[:2]]
        rows = [row for row in rows if row.get("count") == rows[-1].get("count")]
    return next((row.get(key) for row in rows if wanted.items() <= row.items()), None)


def _best_evaluation(config: Config) -> tuple[str, str, str] | None:
    """The split, mode and number in ``train.keep_best``; None if it does not name an evaluation."""
    parts = config.train.keep_best.rsplit("/", 2)
    label = split_label(parts[0])
    return (label, parts[1], parts[2]) if len(parts) == 3 and label in _labels(config) else None


def check_keep_best(config: Config) -> None:
    """Raises ConfigError if the run will not measure ``train.keep_best``: no best checkpoint would be kept."""
    name, known = config.train.keep_best, _scores(config)
    if not name or name in known:
        return
    if name in _scores(configs.replace(config, **{"reward.server": "local"})):
        raise ConfigError(
            f"train.keep_best={name}: is measured by SAM 2, expected reward.server=local or host:port, got none"
        )
    same_end = [other for other in known if other.rpartition("/")[2] == name.rpartition("/")[2]]
    close = difflib.get_close_matches(name, known, n=1) or same_end
    raise ConfigError(
        f"train.keep_best={name}: expected SPLIT/MODE/NUMBER of an evaluation, of data.eval_splits="
        f"[{', '.join(config.data.eval_splits)}], or a key of metrics.jsonl, "
        + (f"did you mean {close[0]!r}?" if close else f"such as {known[0]!r}")
    )


def _check_best_is_chosen(config: Config) -> None:
    """Raises ConfigError if a new run would only measure its last step, which is kept anyway."""
    if _best_evaluation(config) and not 0 < config.eval.every < config.train.steps:
        raise ConfigError(
            f"train.keep_best={config.train.keep_best}: is measured after the last step alone with eval.every="
            f"{config.eval.every}, expected eval.every from 1 to below train.steps={config.train.steps}"
        )


def _scores(config: Config) -> list[str]:
    """Everything that ``train.keep_best`` can name, with splits as in ``data.eval_splits`` and as in file names."""
    splits = dict.fromkeys([*config.data.eval_splits, *_labels(config)])
    numbers = summary_names(scored=config.reward.server != "none")
    evaluated = [f"{split}/{mode}/{number}" for split in splits for mode in MODES for number in numbers]
    return evaluated + metric_keys(config)


@contextmanager
def held(config: Config, beginning: Beginning) -> Iterator[None]:
    """Locks the run directory for this process while it trains.

    Raises:
      ConfigError: it cannot be created or written to.
      FolderHeld: another process, on this machine or one that shares the disk, trains there.
      StorageError: another process trained there between ``begin`` and now; the same command resumes from its work.
    """
    run_dir = run_directory(config)
    with _locked(run_dir):
        directory = checkpoint_directory(config)
        if tuple(complete_steps(directory)) != beginning.saved:
            raise StorageError(
                f"{directory}: another process has saved or deleted there meanwhile; start this run again"
            )
        if not (run_dir / "config.yaml").exists():
            open_run(config)
        if beginning.step is None:
            (run_dir / _SAVED).unlink(missing_ok=True)  # An earlier run's, whose files are gone.
        yield


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """The lock of a run directory. Raises FolderHeld, and ConfigError if it cannot be written to."""
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(run_dir, "run"))
        except FolderHeld:
            raise
        except OSError as error:
            raise ConfigError(f"run.dir={run_dir}: cannot be written to: {error.strerror or error}") from None
        yield


def open_run(config: Config) -> Path:
    """Makes the run directory and writes ``config.yaml``.

    Replace an earlier start's file only after truncating its lines: that configuration tells which of them had a save.
    """
    run_dir = run_directory(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    jsonl.replace(run_dir / "config.yaml", configs.to_yaml(config).encode())
    return run_dir


def complete(config: Config, beginning: Beginning, pod: Pod, say: Callable[[str], None]) -> None:
    """Reports that a run is done, and adds what its directory here lacks and the last checkpoint has.

    On a machine that did not make the run, that is the configuration and the last lines. Raises FolderHeld if another
    process trains there, for more steps.
    """
    step, directory = beginning.step, checkpoint_directory(config)
    assert step is not None, "a run that is done has a checkpoint"
    with Checkpoints(directory, read_only=True) as checkpoints:
        lines = checkpoints.lines(step)
    if not pod.first:
        return
    with _locked(run_directory(config)):
        steps = config.train.steps
        done = f"all {steps} steps are done" if step == steps else f"{step} steps are done, train.steps={steps}"
        say(f"{config.run.dir}: {done}, checkpoints are in {directory}; raise train.steps to go on")
        run_dir = Path(config.run.dir).expanduser()
        if not (run_dir / "config.yaml").exists():
            open_run(config)
        with MetricsWriter(run_dir, steps, show_progress=False) as writer:
            if writer.add_missing(lines):
                # Only rebuilds TensorBoard's files; there is nothing to truncate.
                writer.truncate_after(max(step, writer.last_step or 0))
            say_missing(writer, step, say)


def say_missing(writer: MetricsWriter, step: int, say: Callable[[str], None]) -> None:
    """Reports how many steps up to ``step`` have no line in ``metrics.jsonl``, if any: a lost disk had them."""
    missing = len(set(range(1, step + 1)) - {row["step"] for row in writer.steps()})
    if missing:
        say(f"metrics.jsonl lacks the lines of {missing} steps up to {step}")
