"""A run's directory: opened for one run only, what of it is done, and which of its steps was best."""

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from etils import epath

from segzero_jax import config as configs
from segzero_jax import jsonl
from segzero_jax.checkpoint import Checkpoints, StorageError, run_difference
from segzero_jax.checkpoint_paths import checkpoint_directory, complete_steps, refuse_unfinished
from segzero_jax.config import Config, ConfigError
from segzero_jax.evaluation import MODES, summary_names
from segzero_jax.file_lock import FolderHeld, hold
from segzero_jax.local_path import local_path
from segzero_jax.metrics import MetricsWriter
from segzero_jax.pods import Pod
from segzero_jax.record import metric_keys
from segzero_jax.shared_storage import check_shared
from segzero_jax.terminal import write_line


class Beginning(NamedTuple):
    """How a run begins.

    Attributes:
      step: steps done before it; the checkpoint of that step is restored, None is a run from the start.
      done: no step and no evaluation is left.
      saved: steps that had checkpoints by then.
    """

    step: int | None
    done: bool
    saved: tuple[int, ...] = ()


def look(config: Config, resume: bool) -> tuple[Beginning, list[str]]:
    """Whether there is something to go on with in the run's directories; changes nothing.

    A run that was cut off goes on from its newest intact checkpoint, or from the start where it had none yet.

    Args:
      resume: there has to be a checkpoint.

    Returns:
      How the run begins, and a line for each damaged checkpoint that is passed over.

    Raises:
      ConfigError: the directory is none of this machine's, holds another run, or no checkpoint to resume from.
      CheckpointError: its checkpoints are all damaged, or another run's.
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
    _check_run_dir(config, run_dir)
    done = step >= config.train.steps and not missing_splits(config, run_dir, step)
    return Beginning(step, done), [f"{line}: going on from step {step}" for line in damaged]


def run_directory(config: Config) -> Path:
    """Where a run's files are, on this machine's disk. Raises ConfigError for a URL."""
    return local_path(config.run.dir, "run.dir", "run.checkpoint_dir is what may lie in a bucket")


def begin(config: Config, resume: bool, pod: Pod) -> Beginning:
    """How a run begins on all its hosts, which share what they go on from and have one place for checkpoints.

    Raises:
      ConfigError: hosts see different checkpoints, or not what the first one writes there; or as ``check_keep_best``
        and ``look`` do.
      CheckpointError: as ``look`` does.
      StorageError: a host cannot write where checkpoints go.
    """
    check_keep_best(config)
    run_directory(config)  # Before checkpoints are looked for in it.
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
        # At a first start none has a checkpoint, whatever they share.
        check_shared(checkpoint_directory(config), pod)
    return Beginning(beginning.step, done, saved)


def _check_nothing_there(config: Config, run_dir: Path, directory: epath.Path) -> None:
    """Where there is no checkpoint: whether that is how it should be, so that the run may begin."""
    refuse_unfinished(directory)
    _refuse_another_run(config, run_dir)
    _refuse_lost_checkpoints(run_dir, directory)
    _check_best_is_chosen(config)


def _check_run_dir(config: Config, run_dir: Path) -> None:
    """Where there are checkpoints: whether the run's other files are its own, as far as they are there."""
    if (run_dir / "config.yaml").exists():
        _refuse_another_run(config, run_dir)


def _refuse_another_run(config: Config, run_dir: Path) -> None:
    """A directory with metrics but no checkpoint is begun anew only by the run that left it."""
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
    """A run whose checkpoints are not where they should be is not begun anew over what it has written."""
    if not (run_dir / "metrics.jsonl").exists():
        return
    earlier = configs.load(run_dir / "config.yaml")
    before = checkpoint_directory(earlier)
    if steps := complete_steps(before):
        raise ConfigError(
            f"run.checkpoint_dir={directory}: no checkpoint, those of the run in run.dir={run_dir} are in {before}, to "
            f"step {steps[-1]}; go on with that place, bring them here, or choose another run.dir"
        )
    rows = jsonl.read(run_dir / "metrics.jsonl")
    # A save has begun behind its step's line, and the one before it is whole by then.
    begun = [row["step"] for row in rows[:-1] if checkpoint_due(earlier, row["step"])]
    if len(begun) > 1 and not any(row.get("checkpoint/failed") for row in rows):
        raise ConfigError(
            f"{directory}: no checkpoint, though the run in run.dir={run_dir} has saved step {begun[-2]}; is the disk "
            "mounted? Bring them back, or choose another run.dir"
        )


def check_same_run(config: Config) -> None:
    """Raises where the run's directories hold another run, as ``look`` does, but reads no arrays.

    Raises:
      ConfigError: ``run.dir`` holds another run, or one whose checkpoints are gone; or as ``look`` does.
      JsonLinesError: what the run has written is damaged.
      CheckpointError: the checkpoints are another run's, or a part of one.
    """
    directory = checkpoint_directory(config)
    run_dir = run_directory(config)
    if not complete_steps(directory):
        _check_nothing_there(config, run_dir, directory)
        return
    with Checkpoints(directory, read_only=True) as checkpoints:
        # Of a damaged one a start says so, and goes on from the one before.
        whole = [step for step in checkpoints.steps if not checkpoints.damage(step, ["run"])]
        if whole:
            checkpoints.check_config(whole[-1], config)
    _check_run_dir(config, run_dir)


def missing_splits(config: Config, run_dir: Path, step: int) -> list[str]:
    """The held-out splits that are still to be evaluated after ``step`` steps, if any are."""
    if not evaluation_due(config, step):
        return []
    file = run_dir / "evaluations.jsonl"
    done = {row["split"] for row in jsonl.read(file) if row["step"] == step} if file.exists() else set()
    return [label for label in _labels(config) if label not in done]


def split_label(name: str) -> str:
    """A held-out split as metrics and files name it: "ReasonSeg/val" would be a folder."""
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
    """The number that ``train.keep_best`` names, after ``step`` steps; None where it was not measured."""
    wanted: dict[str, int | str] = {"step": step}
    key, file = config.train.keep_best, run_dir / "metrics.jsonl"
    evaluation = _best_evaluation(config)
    if evaluation is not None:
        split, mode, key = evaluation
        wanted, file = wanted | {"split": split, "mode": mode}, run_dir / "evaluations.jsonl"
    rows = jsonl.read(file) if key and file.exists() else []
    return next((row.get(key) for row in rows if wanted.items() <= row.items()), None)


def _best_evaluation(config: Config) -> tuple[str, str, str] | None:
    """Split, mode and number, where ``train.keep_best`` names those of an evaluation."""
    parts = config.train.keep_best.rsplit("/", 2)
    label = split_label(parts[0])
    return (label, parts[1], parts[2]) if len(parts) == 3 and label in _labels(config) else None


def check_keep_best(config: Config) -> None:
    """Raises ConfigError where ``train.keep_best`` names nothing that the run will measure: nothing would be kept."""
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
    """Raises ConfigError where a run that begins would measure its last step alone, which is kept anyway."""
    if _best_evaluation(config) and not 0 < config.eval.every < config.train.steps:
        raise ConfigError(
            f"train.keep_best={config.train.keep_best}: is measured after the last step alone with eval.every="
            f"{config.eval.every}, expected eval.every from 1 to below train.steps={config.train.steps}"
        )


def _scores(config: Config) -> list[str]:
    """All that ``train.keep_best`` can name; splits as ``data.eval_splits`` writes them and as files do."""
    splits = dict.fromkeys([*config.data.eval_splits, *_labels(config)])
    numbers = summary_names(scored=config.reward.server != "none")
    evaluated = [f"{split}/{mode}/{number}" for split in splits for mode in MODES for number in numbers]
    return evaluated + metric_keys(config)


@contextmanager
def held(config: Config, beginning: Beginning) -> Iterator[None]:
    """Keeps the run directory for this process alone, as long as it trains.

    Raises:
      ConfigError: it cannot be made, or written to.
      FolderHeld: another process of this machine, or of one that shares the disk, trains there.
      StorageError: one has, between this process's ``begin`` and now; the same command begins with what it left.
    """
    run_dir = run_directory(config)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(run_dir, "run"))
        except FolderHeld:
            raise
        except OSError as error:
            raise ConfigError(f"run.dir={run_dir}: cannot be written to: {error.strerror or error}") from None
        directory = checkpoint_directory(config)
        if tuple(complete_steps(directory)) != beginning.saved:
            raise StorageError(
                f"{directory}: another process has saved or deleted there meanwhile; start this run again"
            )
        if not (run_dir / "config.yaml").exists():
            open_run(config)
        yield


def open_run(config: Config) -> Path:
    """Makes the run directory and writes ``config.yaml``.

    Over an earlier start's only once its lines that go are gone: what they say of saves goes by that configuration.
    """
    run_dir = run_directory(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    jsonl.replace(run_dir / "config.yaml", configs.to_yaml(config).encode())
    return run_dir


def complete(config: Config, beginning: Beginning, pod: Pod, say: Callable[[str], None]) -> None:
    """Of a run that is done: says so, and adds what its directory here lacks and the last checkpoint has.

    On a machine that did not make the run, that is the configuration and the last lines. Raises FolderHeld where
    another process trains there, for more steps.
    """
    step, directory = beginning.step, checkpoint_directory(config)
    assert step is not None, "a run that is done has a checkpoint"
    with Checkpoints(directory, read_only=True) as checkpoints:
        lines = checkpoints.lines(step)
    if not pod.first:
        return
    with hold(run_directory(config), "run"):
        steps = config.train.steps
        say(f"{config.run.dir}: all {steps} steps are done, checkpoints are in {directory}; raise train.steps to go on")
        run_dir = Path(config.run.dir).expanduser()
        if not (run_dir / "config.yaml").exists():
            open_run(config)
        with MetricsWriter(run_dir, steps, show_progress=False) as writer:
            if writer.add_missing(lines):
                # For TensorBoard's files, which are made anew; there is nothing to forget.
                writer.truncate_after(max(step, writer.last_step or 0))
            say_missing(writer, step, say)


def say_missing(writer: MetricsWriter, step: int, say: Callable[[str], None]) -> None:
    """Says how many steps up to ``step`` have no line in ``metrics.jsonl``, if any: those that a lost disk had."""
    missing = len(set(range(1, step + 1)) - {row["step"] for row in writer.steps()})
    if missing:
        say(f"metrics.jsonl lacks the lines of {missing} steps up to {step}")
