"""Checkpoints with Orbax: weights, optimizer, data position and configuration, saved together and atomically.

A checkpoint has three items: ``policy`` (all that inference needs), ``optimizer``, and ``run`` (JSON: configuration,
data position, version). Arrays are stored under their path in the tree, so a file can be read without our classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from segzero_jax import __version__
from segzero_jax import config as configs
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.hub import is_checkpoint
from segzero_jax.model.dims import Dims
from segzero_jax.model.policy import Policy
from segzero_jax.model.weights import CheckpointError, abstract_policy, load_hf, read_dims

T = TypeVar("T")
# A resumed run may go on for longer, elsewhere, on another mesh, with another server; all else makes it another run.
_FREE_KEYS = (
    *("mesh", "run.", "eval.", "data.dir", "model.path", "reward.server", "reward.local_model", "reward.timeout_s"),
    *("reward.missing", "reward.checkpoint_after_s", "reward.patience_s", "reward.ca_file", "reward.cert_file"),
    *("reward.key_file", "reward.token_file", "reward.tls_name"),
    *("model.remat", "train.steps", "train.micro_batch_size", "train.checkpoint_every", "train.keep_checkpoints"),
)


@dataclass(frozen=True)
class Restored:
    """A run as it stood after ``step`` updates."""

    step: int
    state: TrainState
    data: dict[str, Any]


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _without_policy(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.optimizer, "updates": state.updates}


def _targets(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = jax.sharding.get_mesh()
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))  # noqa: E731
    return {name: place(leaf) for name, leaf in _named_leaves(tree).items()}


def _rebuild(like: T, leaves: dict[str, Any]) -> T:
    names = _named_leaves(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


class Checkpoints:
    """The checkpoints of one run directory.

    Args:
      run_dir: they are in its ``checkpoints/``, one directory per step.
      keep: how many; older ones are deleted.
      read_only: for a look at a run that may be going on.
    """

    def __init__(self, run_dir: str | Path, keep: int = 1, read_only: bool = False):
        self.directory = Path(run_dir).expanduser().resolve() / "checkpoints"
        options = (
            ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
            if read_only
            # What a killed run left half-written goes.
            else ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        )
        # Named here rather than at the first save: a fresh process could not read what another has written.
        handlers = {
            "policy": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The last complete checkpoint's step."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: Config) -> None:
        """Starts writing; returns once the arrays are copied, so that training may go on and donate them.

        A step that is the last one saved is left as it is.
        """
        if step == self.latest:
            return
        run = {"config": configs.to_dict(config), "data": data, "version": __version__}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                policy=ocp.args.StandardSave(_named_leaves(state.policy)),
                optimizer=ocp.args.StandardSave(_named_leaves(_without_policy(state))),
                run=ocp.args.JsonSave(run),
            ),
        )

    def wait(self) -> None:
        """Until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def restore(self, like: TrainState, config: Config) -> Restored:
        """Reads the last checkpoint onto the ambient mesh, whatever mesh wrote it.

        Args:
          like: a state of the same shapes; its shardings are what the result has.

        Raises:
          CheckpointError: there is none, it comes from another configuration (the differing keys are named), or it
            holds another model.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"{self.directory}: no checkpoint to resume from; start without --resume")
        saved = self.config(step)
        differing = [key for key in configs.differing_keys(saved, config) if not key.startswith(_FREE_KEYS)]
        if differing:
            raise CheckpointError(
                f"{self.directory}/{step}: written with another configuration ({', '.join(differing)} differ); "
                "resume with the same one or choose another run.dir"
            )
        rest = self._tree(step, "optimizer", _without_policy(like))
        state = TrainState(self.policy(step, like.policy), rest["optimizer"], rest["updates"])
        return Restored(step, state, self._run(step)["data"])

    def config(self, step: int) -> Config:
        """The configuration of the run when it wrote ``step``."""
        return configs.build(self._run(step)["config"], f"{self.directory}/{step}")

    def policy(self, step: int, like: Policy) -> Policy:
        """The weights alone, in the shardings of ``like``. Raises CheckpointError when they are another model's."""
        return self._tree(step, "policy", like)

    def _run(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]

    def _tree(self, step: int, item: str, like: T) -> T:
        targets = _targets(like)
        stored = {name: leaf.shape for name, leaf in self._manager.item_metadata(step)[item].items()}
        for name in sorted(stored.keys() | targets.keys()):
            ours = targets[name].shape if name in targets else None
            if stored.get(name) != ours:
                raise CheckpointError(
                    f"{self.directory}/{step}: {name} has shape {stored.get(name)}, model.path means {ours}; "
                    "expected the checkpoint of the same model"
                )
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(targets)})
        return _rebuild(like, self._manager.restore(step, args=args)[item])


def load_policy(path: str | Path, dtype: Any) -> tuple[Policy, Dims, Config | None]:
    """Weights for inference: a Hugging Face checkpoint, a run directory, or one of its ``checkpoints/STEP``.

    Returns:
      The policy on the ambient mesh, its dimensions, and the run's configuration where it comes from a run.

    Raises:
      CheckpointError: there is nothing of the kind at ``path``.
    """
    if is_checkpoint(path):
        return *load_hf(path, dtype=dtype), None
    directory = Path(path).expanduser()
    step: int | None = None
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        step, directory = int(directory.name), directory.parent.parent
    if not (directory / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: expected a run directory with checkpoints, a Hugging Face checkpoint, or 'toy'")
    with Checkpoints(directory, read_only=True) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps)) or "none"
            raise CheckpointError(f"{path}: no complete checkpoint there; {directory} has {there}")
        config = checkpoints.config(step)
        dims = read_dims(config.model.path)
        policy = checkpoints.policy(step, abstract_policy(dims))
    return jax.tree.map(lambda x: x.astype(dtype), policy), dims, config
