"""The main job: ``python -m segzero_jax.train --mesh=4x4``. Its steps are in ``loop.py``.

This module is the frame around them: a run starts or resumes, and ends with a checkpoint, a page and an exit code.
"""

import argparse
import contextlib
import errno
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax

from segzero_jax import config as configs
from segzero_jax import evaluation
from segzero_jax.agreement import check_alike
from segzero_jax.checkpoint import STORAGE_FAILED, Checkpoints, Restored, StorageError
from segzero_jax.checkpoint_paths import checkpoint_directory
from segzero_jax.code_version import this_code
from segzero_jax.config import Config, ConfigError, check_local_model
from segzero_jax.data.batches import Batches, WorkerLost, training_batches
from segzero_jax.data.checks import check_same
from segzero_jax.data.pipeline import DataError, Source, Splits, open_splits, questions
from segzero_jax.failed_saves import ignore_late_reports
from segzero_jax.file_lock import FolderHeld
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity, fingerprint
from segzero_jax.job import Job, answer, prepare
from segzero_jax.jsonl import JsonLinesError
from segzero_jax.keeper import Keeper
from segzero_jax.loop import Evaluation, Loop
from segzero_jax.mesh import MeshError, make_mesh, prepare_cpu
from segzero_jax.metrics import MetricsError, MetricsWriter, SilentWriter
from segzero_jax.model.policy import Policy
from segzero_jax.model.weights import CheckpointError
from segzero_jax.own_rewards import RewardFunction, check_same_files, load_functions, sources
from segzero_jax.patches import ImageError
from segzero_jax.patience import Patience
from segzero_jax.pods import HOST_LOST, HostLost, Pod, PodError, join
from segzero_jax.preemption import Preemption, Stopped
from segzero_jax.processor import PromptTooLong
from segzero_jax.profiling import Profiler, parse_steps
from segzero_jax.recipe_check import check_splits
from segzero_jax.record import print_summary
from segzero_jax.report import RunError, write_report
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway, read_access
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_service import reward_service
from segzero_jax.rewards import component_names
from segzero_jax.run_dir import (
    Beginning,
    begin,
    complete,
    held,
    missing_splits,
    note_saved,
    open_run,
    refuse_moved,
    say_missing,
    score,
    split_label,
)
from segzero_jax.scoring import Scorer
from segzero_jax.terminal import end_process, write_line
from segzero_jax.time_account import PhaseTimer
from segzero_jax.watch import DIVERGED, HUNG, Diverged, Watch

# Errors that a user can cause; anything else is a bug and keeps its traceback.
USER_ERRORS = (
    ConfigError,
    DataError,
    MeshError,
    PodError,
    CheckpointError,
    FolderHeld,
    MetricsError,
    JsonLinesError,
    ImageError,
    PromptTooLong,
    RewardServerError,
    RunError,
)
# A disk that is full, or away: a network disk whose server is gone, a device that fails.
_NO_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)


def open_questions(config: Config, pod: Pod) -> Splits:
    """The run's questions, the same on all hosts. Raises DataError as ``open_split`` and ``check_same``."""
    splits = open_splits(config.data.names, config.data.eval_splits, config.data.dir)
    check_same(splits.checksums(), pod)
    return splits


def make_evaluation(
    job: Job,
    held_out: Sequence[Source],
    scorer: Scorer,
    keeper: Keeper,
    writer: MetricsWriter,
    preemption: Preemption,
    timer: PhaseTimer,
) -> Evaluation:
    """A function ``(step, rollout weights)`` that evaluates the held-out splits that are missing and writes results.

    Its wait for the reward service does not add to the age of the phase in progress in ``timer``: it does not hang.
    """
    waiting = lambda seconds: timer.move(seconds, "evaluation")  # noqa: E731
    config = job.config
    splits = {
        split_label(name): [source[i] for i in source.first(config.eval.examples)]
        for name, source in zip(config.data.eval_splits, held_out, strict=True)
    }

    def evaluate(step: int, weights: Policy) -> None:
        run_dir = Path(config.run.dir).expanduser()
        for name in job.pod.from_first("what is evaluated", lambda: missing_splits(config, run_dir, step)):
            examples = splits[name]
            writer.message(f"evaluating {name} after {step} steps: {len(examples)} questions")
            with Patience(
                config.reward, writer.message, keeper.keep, preemption.check, job.pod, count=waiting
            ) as patience:
                summaries, rows = evaluation.evaluate_split(
                    examples,
                    lambda asked, greedy: answer(job, weights, asked, greedy, before_batch=preemption.check),
                    scorer,
                    job.frame,
                    config.reward.recipe,
                    lambda example: writer.write_image(example.id, example.image),
                    patience,
                )
            writer.write_evaluation(step, name, summaries, rows)

    return evaluate


def run(config: Config, resume: bool, pod: Pod, profile: str | None = None) -> None:
    """One run from configuration to report; on several hosts each does its part, and host 0 writes.

    Raises Stopped once the last finished step of a stopped run is saved, if it got that far.

    Args:
      resume: whether a checkpoint to resume from is required.
      profile: the steps to trace, see ``parse_steps``; None for none.
    """
    timer = PhaseTimer()
    check_local_model(config)
    with Preemption(alone=pod.count == 1) as preemption:
        check_alike(config, pod)
        mesh = make_mesh(config.mesh)
        access = read_access(config.reward)
        functions = load_functions(config.reward.functions, component_names(config.reward.recipe, True))
        beginning = begin(config, resume, pod)
        if beginning.done:
            complete(config, beginning, pod, partial(write_line, sys.stdout))
        else:
            _continue(config, mesh, access, functions, beginning, pod, preemption, profile, timer)
        if pod.first:
            run_dir = Path(config.run.dir).expanduser()
            # First: it needs less of the run's files than the page, any of which may be damaged.
            print_summary(run_dir)
            page = write_report(run_dir)
            write_line(sys.stdout, f"report: {page}")


def _continue(
    config: Config,
    mesh: jax.sharding.Mesh,
    access: Access,
    functions: Mapping[str, RewardFunction],
    beginning: Beginning,
    pod: Pod,
    preemption: Preemption,
    profile: str | None,
    timer: PhaseTimer,
) -> None:
    """Trains from the last checkpoint, or from the start, to the end."""
    begun = beginning.step
    first_step = (begun or 0) + 1
    profiled = range(0) if profile is None else parse_steps(profile, first_step, config.train.steps)
    run_dir = Path(config.run.dir).expanduser()
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        splits = open_questions(config, pod)
        check_same_files(sources(functions), pod)
        job, state, reference = prepare(config, mesh, pod, partial(check_splits, splits, config))
        size, rows, workers = config.train.batch_size, job.rows.held, config.data.workers
        batches = training_batches(questions(splits), size, config.seed, rows, job.collate, workers)
        stack.enter_context(contextlib.closing(batches))
        if pod.first:
            stack.enter_context(held(config, beginning))
        # On its first start, a run soon reports that no server serves; later, one has served, and the run waits for it.
        patience_s = config.reward.timeout_s if begun is None else config.reward.patience_s
        client = stack.enter_context(reward_service(config, access, run_dir, pod, patience_s))
        identity = _identity(job, state, splits, functions, client)
        writer = MetricsWriter(run_dir, config.train.steps, show_progress=True) if pod.first else SilentWriter(run_dir)
        stack.enter_context(writer)
        best, keep = partial(score, config, run_dir), config.train.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(checkpoint_directory(config), keep, best))
        if begun is not None:
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            del state  # Two states may not fit.
            restored = checkpoints.restore(begun, like, config, identity)
            state = restored.state
            _take_up(restored, config, batches, writer)
        removed = writer.truncate_after(-1 if begun is None else begun)
        if pod.first:
            open_run(config)
        say_missing(writer, begun or 0, writer.message)
        keeper = Keeper(checkpoints, config, identity, writer.message, pod, writer.recent, partial(note_saved, run_dir))
        keeper.finished(begun or 0, state, batches.get_state())
        scorer = Scorer(config.reward, job.frame, client, pod, functions)
        evaluate = make_evaluation(job, splits.held_out, scorer, keeper, writer, preemption, timer)
        own = f"host_{pod.index}" if pod.count > 1 else ""  # JAX names folders by the second and owns all in them.
        profiler = Profiler(run_dir / "profile" / own, profiled, timer, writer.message)
        watch = stack.enter_context(Watch(config.watch, run_dir, timer, writer, removed, checkpoints, profiler))
        for line in configs.notes(config):
            writer.message(line)
        preemption.begin(writer.message)
        with _last_step_saved(keeper, watch, run_dir, pod):
            unmeasured = pod.from_first(
                "evaluation before it", lambda: bool(missing_splits(config, run_dir, begun or 0))
            )
            loop = Loop(job, reference, batches, scorer, keeper, writer, evaluate, preemption, watch)
            loop.train(state, first_step, evaluate_first=unmeasured)
        watch.done()


def _identity(
    job: Job, state: TrainState, splits: Splits, functions: Mapping[str, RewardFunction], client: RewardClient | None
) -> Identity:
    sam2, sam2_dtype = (client.checkpoint_sha256, client.dtype) if client else (None, None)
    reference = fingerprint(state.params if job.base is None else job.base, job.train_fwd.dtype)
    return Identity(reference, sam2, splits.checksums(), sources(functions), sam2_dtype)


def _take_up(restored: Restored, config: Config, batches: Batches[Any], writer: MetricsWriter) -> None:
    """Continues with the data and the lines of a restored run, and reports what has changed since."""
    batches.set_state(restored.data)
    writer.message(f"going on after step {restored.step}")
    if restored.code.source != this_code().source:
        writer.message(f"the code was {restored.code} then, and is {this_code()}: numbers may differ")
    for name in restored.changed:
        writer.message(f"the file of the reward function {name} has changed: numbers may differ")
    for key in ("eval.examples", "eval.samples"):
        before, now = (attrgetter(key)(config) for config in (restored.config, config))
        if before != now:
            writer.message(f"{key} was {before} then, and is {now}: evaluations before and after cannot be compared")
    writer.add_missing(restored.lines)


@contextlib.contextmanager
def _last_step_saved(keeper: Keeper, watch: Watch, run_dir: Path, pod: Pod) -> Iterator[None]:
    """Saves the last finished step after the block, also if the block is told to stop or something is lost.

    Raises StorageError if ``run_dir`` is full or gone.
    """
    try:
        yield
    except Stopped:
        with watch.last_save():
            keeper.keep_or_fail()
        raise
    except WorkerLost:
        # With several hosts, the others do not know of it, and all save or none.
        if pod.count == 1:
            with watch.last_save():
                keeper.keep()
        raise
    except OSError as error:
        if not _is_of_storage(error, run_dir):
            raise
        # Checkpoints may be elsewhere. With several hosts, the others do not know of it, and all save or none.
        saved = False
        if pod.count == 1:
            with watch.last_save():
                saved = keeper.keep()
        kept = "the last finished step is saved" if saved else "steps since the last checkpoint are lost"
        its = error.filename is None or _is_in(run_dir, error.filename)
        where = f"run.dir={run_dir}: cannot be written to: " if its else ""
        raise StorageError(f"{where}{error}; {kept}") from None
    with watch.last_save():
        keeper.keep_or_fail()


def _is_of_storage(error: OSError, run_dir: Path) -> bool:
    """Whether a disk is full or away, or it is about a file in ``run_dir``, which may have been removed or renamed."""
    return error.errno in _NO_DISK or _is_in(run_dir, error.filename)


def _is_in(run_dir: Path, name: Any) -> bool:
    return isinstance(name, str | Path) and Path(name).is_relative_to(run_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return _main(argv)[0]


def _main(argv: Sequence[str] | None = None) -> tuple[int, bool]:
    """The exit code, and whether something was interrupted that Python may crash on or wait for at its exit."""
    parser = argparse.ArgumentParser(
        prog="segzero_jax.train",
        description="Trains a policy with GRPO; without --config, the toy run.",
        epilog="A run.dir that holds a run is resumed. Exit codes: 0 done, or stopped by SIGTERM with the last "
        "finished step saved; 2 a mistake to be corrected; 3 the reward service could not be reached; "
        f"{HOST_LOST} another host of the run was lost, or a process that makes batches; "
        f"{DIVERGED} no update of too many steps in a row was finite; "
        f"{HUNG} a phase took longer than watch.kill_after_s; {STORAGE_FAILED} the last step could not be saved, or "
        "checkpoints not be read, or run.dir is full or gone; 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--resume", action="store_true", help="refuse to start without a checkpoint to go on from")
    parser.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="FIRST-LAST",
        help="trace these steps into run.dir/profile; alone, the third and fourth that this command makes",
    )
    args, config = configs.parse_command_line(parser, argv)
    pod = Pod(prog=parser.prog)
    try:
        if "run.dir" not in args:
            refuse_moved(config, args.config)
        pod = join(parser.prog, f"the same command goes on from the last checkpoint in {checkpoint_directory(config)}")
        prepare_cpu(config.mesh, pod.count)
        # Orbax logs a traceback for errors that it then raises, which we report in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        ignore_late_reports()
        run(config, args.resume, pod, args.profile)
        return pod.leave(0), False
    except Stopped as stopped:
        return pod.leave(130 if stopped.interrupted else 0, f"stopped by {stopped}; the same command goes on"), True
    except RewardServiceAway as error:
        return pod.leave(3, str(error)), False
    except HostLost as error:
        return pod.leave(HOST_LOST, str(error)), False
    except WorkerLost as error:
        return pod.leave(HOST_LOST, str(error)), True
    except Diverged as error:
        return pod.leave(DIVERGED, str(error)), False
    except StorageError as error:
        return pod.leave(STORAGE_FAILED, str(error)), False
    except USER_ERRORS as error:
        return pod.leave(2, str(error)), False
    except KeyboardInterrupt:
        return pod.leave(130, "stopped at once; the same command goes on from the last checkpoint"), True
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
            return pod.leave(2, str(error)), False
        if isinstance(error, OSError) and _is_of_storage(error, Path(config.run.dir).expanduser()):
            return pod.leave(STORAGE_FAILED, str(error)), False
        pod.await_blame(error)
        pod.leave(1, f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    code, cut_short = _main()
    if cut_short:
        # A program whose compilation a signal interrupted, or a Grain process that was lost.
        end_process(code)
    sys.exit(code)
