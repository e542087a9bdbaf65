"""Checkpoints with Orbax: weights, optimizer, data position, configuration and identity, in one atomic save.

A checkpoint has four items: ``policy`` (all that inference needs; with LoRA the adapters), ``optimizer``, ``run``
(JSON: configuration, data position, identity, code, last lines) and ``manifest``. Arrays are stored under their path in
the tree, so a file can be read without our classes. The reference policy, which LoRA's adapters are applied to, is not
stored: it is ``model.path``, identified by its fingerprint.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo, PreservationContext, PreservationPolicy

from segzero_jax import config as configs
from segzero_jax import manifest
from segzero_jax.checkpoint_paths import in_short, reading, storage_path
from segzero_jax.code_version import Code, this_code
from segzero_jax.config import Config
from segzero_jax.failed_saves import remove_unfinished
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.local_path import is_url
from segzero_jax.model.weights import CheckpointError, StorageError

T = TypeVar("T")
# Keys that may change on resume: a run may be extended, moved, and given another mesh or server. A change of any other
# key makes it a different run.
_FREE_KEYS = (
    *("mesh", "run.", "eval.", "watch.", "data.dir", "data.workers", "model.path", "model.remat"),
    *("reward.server", "reward.local_model", "reward.timeout_s", "reward.missing", "reward.checkpoint_after_s"),
    *("reward.patience_s", "reward.ca_file", "reward.cert_file", "reward.key_file", "reward.token_file"),
    *("reward.tls_name", "train.steps", "train.micro_batch_size", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.keep_best"),
)
# Exit code of a run that could not save its last step or read its checkpoints.
STORAGE_FAILED = 7
# Errors of a failed save. TensorStore raises ValueError for a full disk; JaxRuntimeError means that hosts timed out
# waiting for one that could not write its part. Orbax keeps numbering its barriers, so the next save may succeed.
_DISK_FAILURES = (OSError, ValueError, jax.errors.JaxRuntimeError)
_NOT_ALL_CAME = ("DEADLINE_EXCEEDED", "Timed out while waiting for")


class SaveError(StorageError):
    """A checkpoint could not be written. Earlier ones are intact."""


@dataclass(frozen=True)
class Restored:
    """The state of a run after ``step`` steps.

    Attributes:
      data: position of the data iterator.
      code: the code that wrote the checkpoint.
      changed: custom reward functions whose files have changed since.
      lines: the last lines that the run had written, see ``MetricsWriter.recent``.
      config: the configuration that wrote the checkpoint.
    """

    step: int
    state: TrainState
    data: dict[str, Any]
    code: Code
    changed: list[str]
    lines: dict[str, Any]
    config: Config


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _without_params(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.opt_state, "updates": state.num_updates}


def _targets(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = jax.sharding.get_mesh()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))  # noqa: E731
    return {name: place(leaf) for name, leaf in _named_leaves(tree).items()}


def _rebuild(like: T, leaves: dict[str, Any]) -> T:
    names = _named_leaves(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


class _LastAndBest(PreservationPolicy):
    """Keeps the newest checkpoints and the one with the highest score."""

    def __init__(self, last: int, score: Callable[[int], float | None]) -> None:
        self._last = last
        self._score = score

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = set(sorted(steps)[-self._last :])
        try:
            scores = {step: score for step in steps if (score := self._score(step)) is not None}
        except OSError:  # What has the scores is gone: any of them may be the best.
            return [True] * len(steps)
        if scores:
            kept.add(max(scores, key=lambda step: (scores[step], step)))
        return [step in kept for step in steps]


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays with as little work as Orbax allows: on CPU, saving slows the training."""
    # A restore passes its own shardings; storing the writer's would take as long as storing small arrays.
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    # Weights are float noise: zstd would save only 7% of their size.
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always False: the run itself checks, between phases, and JAX expects a single sequence of such checks."""
        return False


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: holds one folder per step; a local path or ``gs://bucket/path``.
      keep: how many of the newest to keep; with at least two, one remains if another is damaged.
      score: the score of a step, None if it has none; the step with the highest is kept too, all if it raises OSError.
      read_only: for inspecting a run that may still be training.
    """

    def __init__(
        self,
        directory: str | Path | epath.Path,
        keep: int = 2,
        score: Callable[[int], float | None] = lambda step: None,
        read_only: bool = False,
    ):
        self.directory = storage_path(directory)
        # The bucket libraries (gcsfs, google.auth, aiohttp) raise errors of their own, without a common base class.
        self._failures: tuple[type[Exception], ...] = (Exception,) if is_url(self.directory) else _DISK_FAILURES
        options = (
            ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
            if read_only
            # Removes what a killed run left half-written.
            else ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep, score),
                cleanup_tmp_directories=True,
                # In the background, a folder that cannot be made is reported to nobody: the save waits ten minutes,
                # deaf to signals, and names another reason. In the foreground, other hosts would wait without end.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=jax.process_count() > 1),
            )
        )
        # Registered here rather than at the first save: otherwise a new process could not read existing checkpoints.
        handlers = {
            "policy": _array_handler(),
            "optimizer": _array_handler(),
            "run": ocp.JsonCheckpointHandler(),
            manifest.ITEM: manifest.ManifestHandler(),
        }
        with reading(self.directory):
            self._manager = _Manager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._manager.close()
        except self._failures as error:
            if kind is None:
                raise self._failed(error) from None
            # The block's own error matters more than a save that failed in the background.

    @property
    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: TrainState,
        data: dict[str, Any],
        config: Config,
        identity: Identity,
        lines: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts a save; returns once the arrays are copied, so that training may continue and donate them.

        Waits for an earlier save first. Does nothing if ``step`` is the last one saved. ``restore`` returns all but
        ``step``.

        Raises:
          SaveError: the earlier save has failed, or this one cannot start.
        """
        self.wait()
        if step == self.latest:
            return
        run = {
            "config": configs.to_dict(config),
            "data": data,
            "identity": identity._asdict(),
            "code": this_code()._asdict(),
            "lines": lines or {},
        }
        try:
            begun = self._manager.save(
                step,
                args=ocp.args.Composite(
                    policy=ocp.args.PyTreeSave(_named_leaves(state.params)),
                    optimizer=ocp.args.PyTreeSave(_named_leaves(_without_params(state))),
                    run=ocp.args.JsonSave(run),
                    manifest=manifest.ManifestSave(),
                ),
            )
        except self._failures as error:
            raise self._failed(error) from None
        if not begun:  # Orbax treats all steps up to the latest as saved.
            raise SaveError(
                f"{self.directory}: holds {self.latest}, an incomplete checkpoint; delete it, or copy it completely"
            )

    def wait(self) -> None:
        """Returns once the pending save is on disk. Raises SaveError."""
        try:
            self._manager.wait_until_finished()
        except self._failures as error:
            raise self._failed(error) from None

    def newest(self) -> tuple[int, list[str]]:
        """The newest step that is intact, and one line for each newer one that is damaged.

        Raises:
          CheckpointError: there is none.
          StorageError: a checkpoint cannot be read now.
        """
        damaged: list[str] = []
        for step in reversed(self.steps):
            problem = self.damage(step)
            if not problem:
                return step, damaged
            damaged.append(f"checkpoint {self.directory}/{step} is damaged ({problem})")
        if damaged:
            raise CheckpointError(f"{'; '.join(damaged)}; no other is left to resume from")
        raise CheckpointError(f"{self.directory}: no checkpoint to resume from; start without --resume")

    def damage(self, step: int, items: Sequence[str] = ("policy", "optimizer", "run")) -> str:
        """Describes the damage to a checkpoint's files, or to those of some items; empty if there is none.

        Raises:
          StorageError: they cannot be read now, which does not mean that they are damaged.
        """
        checkpoint = self.directory / str(step)
        with reading(checkpoint):
            return manifest.damage(checkpoint, items)

    def restore(self, step: int, like: TrainState, config: Config, identity: Identity) -> Restored:
        """Reads a checkpoint onto the ambient mesh, whatever mesh wrote it. Deletes newer ones, which are damaged.

        Args:
          step: see ``newest``.
          like: a state of the same shapes, or its ShapeDtypeStructs; the result has its shardings.

        Raises:
          CheckpointError: it comes from another configuration (the message names the differing keys), another reference
            policy, SAM 2 or data set, or it holds another model.
          StorageError: it cannot be read now.
        """
        run = self._run(step)
        earlier = self._check_config(step, run, config)
        saved = Identity(**run["identity"])
        self._check_identity(step, saved, identity, config)
        rest = self._tree(step, "optimizer", _without_params(like))
        state = TrainState(self.policy(step, like.params), rest["optimizer"], rest["updates"])
        for newer in [other for other in self.steps if other > step]:
            self._manager.delete(newer)
        now = identity.functions or {}
        changed = [name for name, source in (saved.functions or {}).items() if source != now.get(name)]
        return Restored(step, state, run["data"], Code(**run["code"]), changed, run["lines"], earlier)

    def check_config(self, step: int, config: Config) -> None:
        """Raises CheckpointError if ``step`` was written by another run, see ``run_difference``."""
        self._check_config(step, self._run(step), config)

    def _check_config(self, step: int, run: Mapping[str, Any], config: Config) -> Config:
        earlier = configs.build(run["config"], f"{self.directory}/{step}")
        if difference := run_difference(earlier, config):
            raise CheckpointError(
                f"{self.directory}/{step}: written with another configuration ({difference}); "
                "resume with the same one or choose another run.dir"
            )
        return earlier

    def config(self, step: int) -> Config:
        """The configuration of the run when it wrote ``step``."""
        return configs.build(self._run(step)["config"], f"{self.directory}/{step}")

    def lines(self, step: int) -> dict[str, Any]:
        """The last lines that the run had written by ``step``, see ``MetricsWriter.recent``."""
        lines: dict[str, Any] = self._run(step)["lines"]
        return lines

    def policy(self, step: int, like: T) -> T:
        """The trainable parameters, in the shardings of ``like``. Raises CheckpointError for another model."""
        return self._tree(step, "policy", like)

    def reference(self, step: int) -> str:
        """The fingerprint of the policy that the run started from."""
        return Identity(**self._run(step)["identity"]).reference

    def _check_identity(self, step: int, saved: Identity, now: Identity, config: Config) -> None:
        if saved.reference != now.reference:
            raise CheckpointError(
                f"{self.directory}/{step}: its reference policy has fingerprint {saved.reference}, "
                f"model.path={config.model.path} has {now.reference}; resume with the weights that the run began with"
            )
        if saved.sam2 != now.sam2 or (saved.sam2_dtype and saved.sam2_dtype != now.sam2_dtype):
            raise CheckpointError(
                f"{self.directory}/{step}: its rewards came from {_sam2(saved)}, reward.server={config.reward.server} "
                f"means {_sam2(now)}; resume with the same, or choose another run.dir"
            )
        for name, checksum in (saved.data or {}).items():
            found = (now.data or {}).get(name, "none")
            if found != checksum:
                raise CheckpointError(
                    f"{self.directory}/{step}: its {name} has checksum {checksum[:12]}, that in data.dir="
                    f"{config.data.dir} has {found[:12]}; resume with the data that the run began with, built from the "
                    "same source in the same way, or choose another run.dir"
                )

    def _failed(self, error: Exception) -> SaveError:
        """Removes what a failed save left and returns the reason as a SaveError. Re-raises other JaxRuntimeErrors."""
        reason = _why_not_saved(error)
        # The cleanup may fail for the same reason; then the next save that fails does it, or the next start.
        with contextlib.suppress(*self._failures):
            self._manager.reload()
            if jax.process_index() == 0:
                remove_unfinished(self.directory, self._failures)
        return SaveError(f"{self.directory}: {reason}")

    def _run(self, step: int) -> dict[str, Any]:
        with reading(self.directory / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def _tree(self, step: int, item: str, like: T) -> T:
        targets = _targets(like)
        checkpoint = self.directory / str(step)
        with reading(checkpoint):
            stored = {name: leaf.shape for name, leaf in self._manager.item_metadata(step)[item].items()}
        for name in sorted(stored.keys() | targets.keys()):
            ours = targets[name].shape if name in targets else None
            if stored.get(name) != ours:
                raise CheckpointError(
                    f"{checkpoint}: {name} has shape {stored.get(name)}, model.path has {ours}; "
                    "expected a checkpoint of the same model"
                )
        how = ocp.checkpoint_utils.construct_restore_args(targets)
        args = ocp.args.Composite(**{item: ocp.args.PyTreeRestore(targets, restore_args=how)})
        with reading(checkpoint):
            return _rebuild(like, self._manager.restore(step, args=args)[item])


def _why_not_saved(error: Exception) -> str:
    """The reason of a failed save, in one line. Re-raises any other JaxRuntimeError."""
    # A host whose own part failed still waits for the others, and that wait fails too: the cause is the context.
    while str(error).startswith(_NOT_ALL_CAME) and isinstance(error.__context__, Exception):
        error = error.__context__
    if str(error).startswith(_NOT_ALL_CAME):
        return "not all hosts have written their part in time"
    if isinstance(error, jax.errors.JaxRuntimeError):
        raise error
    return in_short(error)


def run_difference(earlier: Config, config: Config) -> str:
    """The keys that make two configurations different runs, in words; empty if a run may resume with ``config``."""
    keys = [key for key in configs.differing_keys(earlier, config) if not key.startswith(_FREE_KEYS)]
    return f"{', '.join(keys)} {'differs' if len(keys) == 1 else 'differ'}" if keys else ""


def _sam2(identity: Identity) -> str:
    if identity.sam2 is None:
        return "no SAM 2"
    dtype = f" in {identity.sam2_dtype}" if identity.sam2_dtype else ""
    return f"SAM 2 checkpoint {identity.sam2[:12] or '(unnamed)'}{dtype}"
