"""``python -m segzero_jax.preflight``: checks for everything that would break a run, before training starts.

It takes the options of ``train`` and runs the checks on all hosts of the job at once: equal versions, devices and mesh,
the model, all questions, checkpoint storage, disk space, the reward servers. It leaves behind only what a start would
create anyway: the toy set, counts stored beside a data set, a model's tokenizer in the hub's cache.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from segzero_jax import config as configs
from segzero_jax.agreement import check_alike
from segzero_jax.asking import load_processor
from segzero_jax.checkpoint_paths import checkpoint_directory
from segzero_jax.code_version import this_code
from segzero_jax.config import Config, ConfigError, check_local_model
from segzero_jax.data.checks import check_same
from segzero_jax.data.pipeline import DataError, open_splits, questions
from segzero_jax.grpo import initial_state, make_optimizer
from segzero_jax.hub import as_hub_id
from segzero_jax.jsonl import JsonLinesError
from segzero_jax.local_path import is_url
from segzero_jax.local_server import missing_package
from segzero_jax.mesh import AXES, MeshError, make_mesh, prepare_cpu
from segzero_jax.model.dims import Dims
from segzero_jax.model.lora import abstract_params
from segzero_jax.model.tensor_files import find_tensors
from segzero_jax.model.weights import CheckpointError, check_fits, read_dims, resolve
from segzero_jax.own_rewards import check_same_files, load_functions, sources
from segzero_jax.pods import HOST_LOST, HostLost, Pod, PodError, join
from segzero_jax.processor import PromptTooLong
from segzero_jax.recipe_check import check_splits
from segzero_jax.reward_channel import RewardServerError, addresses, read_access
from segzero_jax.reward_client import RewardClient
from segzero_jax.rewards import component_names
from segzero_jax.run_dir import check_keep_best, check_same_run, refuse_moved, run_directory
from segzero_jax.shared_storage import probe
from segzero_jax.types import Frame, ObjectPrompt

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy", "grpcio", "tokenizers")
_GIB = 2**30
# For the run's files, and the same for the data set's.
_SPARE_BYTES = _GIB
# Side of a patch in pixels, and bytes of its float32 values, twice in time.
_PATCH = 14
_PATCH_BYTES = 2 * 3 * _PATCH**2 * 4


class CheckFailed(Exception):
    """A failed check; the message states the problem in one line."""


# Returns what it found, in a few words. Raises CheckFailed.
Check = Callable[[Config, Pod], str]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="segzero_jax.preflight",
        description="Checks what a training run would trip over; takes the options of segzero_jax.train.",
        epilog="Exit codes: 0 nothing is wrong; 2 a mistake to be corrected; 4 another host was lost; 130 Ctrl-C.",
    )
    args, config = configs.parse_command_line(parser, argv)
    pod = Pod(prog=parser.prog)
    try:
        if "run.dir" not in args:
            refuse_moved(config, args.config)
        pod = join(parser.prog, "start the preflight again")
        prepare_cpu(config.mesh, pod.count)
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        wrong = run(config, pod)
    except HostLost as error:
        return pod.leave(HOST_LOST, str(error))
    except (PodError, MeshError, ConfigError) as error:
        return pod.leave(2, str(error))
    except KeyboardInterrupt:
        return pod.leave(130, "stopped before all was checked")
    pod.leave(0)
    return 2 if wrong else 0


def run(config: Config, pod: Pod) -> int:
    """Runs all checks on all hosts; host 0 prints what they found. Returns how many failed."""
    wrong = 0
    for name, check in CHECKS.items():
        try:
            found = ["ok", check(config, pod)]
        except CheckFailed as error:
            found = ["FAILED", str(error)]
        said = [json.loads(line) for line in pod.exchange(f"preflight: {name}", json.dumps(found))]
        # Successful hosts may report different things, such as free bytes: host 0's report stands for all.
        bad = [f"{pod.host(i)}: {line}" for i, (verdict, line) in enumerate(said) if verdict != "ok"]
        if len(bad) == pod.count and len({line for _, line in said}) == 1:
            bad = [said[0][1]]
        wrong += bool(bad)
        if pod.first:
            print(f"{'FAILED' if bad else 'ok':<7} {name:<16} {'; '.join(bad) or said[0][1]}", flush=True)
    if pod.first:
        print(f"{wrong} of {len(CHECKS)} checks failed" if wrong else "all is well", flush=True)
    return wrong


def check_versions(config: Config, pod: Pod) -> str:
    """Checks that hosts run the same code and libraries: otherwise programs differ, and their collectives hang."""
    own = _versions()
    everyone = [json.loads(said) for said in pod.exchange("versions", json.dumps(own))]
    for i, other in enumerate(everyone):
        for name, version in everyone[0].items():
            if other[name] != version:
                raise CheckFailed(f"{name} is {version} on {pod.host(0)}, {other[name]} on {pod.host(i)}: tpu/setup.sh")
    shown = [f"{name} {own[name]}" for name in ("python", "jax", "libtpu", "code")]
    return f"{', '.join(shown)} on {pod.count} host{'s' * (pod.count > 1)}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"code": this_code().source}


def check_options(config: Config, pod: Pod) -> str:
    """Checks that hosts have the same options: otherwise they silently train differently."""
    try:
        check_alike(config, pod)
    except ConfigError as error:
        raise CheckFailed(str(error)) from None
    return f"the same on {pod.count} host{'s' * (pod.count > 1)}"


def check_devices(config: Config, pod: Pod) -> str:
    """Checks that the mesh matches the devices, and that they reach each other."""
    try:
        mesh = make_mesh(config.mesh)
    except MeshError as error:
        raise CheckFailed(str(error)) from None
    with jax.set_mesh(mesh):
        # One number per device, created on it: the sum crosses every link that training uses.
        shape = tuple(mesh.shape[axis] for axis in AXES)
        sharding = NamedSharding(mesh, PartitionSpec(*AXES))
        ones = jax.make_array_from_callback(shape, sharding, lambda index: np.ones((1, 1, 1), np.float32))
        total = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    if total != mesh.size:
        raise CheckFailed(f"{mesh.size} devices, each with a one, sum up to {total:g}: this hardware is broken")
    return f"{mesh.size} x {mesh.devices.flat[0].device_kind} as {config.mesh}, and they sum up to {total:g}"


def check_model(config: Config, pod: Pod) -> str:
    """Checks that the model is here or can be downloaded, with its tokenizer, and divides over the mesh."""
    path = config.model.path
    missing = _missing_bytes(path)
    try:
        dims = read_dims(path)
        if as_hub_id(path) is None:
            find_tensors(resolve(path))
        load_processor(config, f"model.path={path}")
        _fitting_mesh(config, dims)
    except (CheckpointError, MeshError) as error:
        raise CheckFailed(str(error)) from None
    return f"{path} divides over {config.mesh}{f', {missing / _GIB:.1f} GiB to be downloaded' if missing else ''}"


def _fitting_mesh(config: Config, dims: Dims) -> jax.sharding.Mesh:
    mesh = make_mesh(config.mesh)
    check_fits(mesh, dims, config.train.batch_size, config.train.micro_batch_size)
    return mesh


def _missing_bytes(path: str) -> int:
    """Bytes of a hub model that the local cache lacks; 0 for a local model. Raises CheckFailed."""
    match = as_hub_id(path)
    if match is None:
        return 0
    repo, revision = match["repo"], match["revision"]
    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
    except (OSError, ValueError, HTTPError) as error:
        cached = try_to_load_from_cache(repo, "config.json", revision=revision)
        with contextlib.suppress(CheckpointError):  # Without weights, only a part is cached.
            if isinstance(cached, str) and find_tensors(Path(cached).parent):
                return 0
        reason = " ".join(str(error).split())[:200]
        raise CheckFailed(f"model.path={path}: not in the cache, and the hub does not answer: {reason}") from None
    wanted = [file for file in files if file.rfilename.endswith((".safetensors", ".json"))]
    have = [try_to_load_from_cache(repo, file.rfilename, revision=revision) for file in wanted]
    return sum(file.size or 0 for file, there in zip(wanted, have, strict=True) if not isinstance(there, str))


def check_data(config: Config, pod: Pod) -> str:
    """Checks that splits are built here, from the same source on all hosts, and that training takes their questions."""
    problem, found = "", {}
    try:
        splits = open_splits(config.data.names, config.data.eval_splits, config.data.dir)
        found = splits.checksums()
        check_splits(splits, config, load_processor(config, f"model.path={config.model.path}"))
    except (DataError, PromptTooLong, ConfigError, OSError) as error:
        problem = str(error)
    except CheckpointError as error:
        problem = f"prompts cannot be counted without the tokenizer: {error}"
    try:
        check_same(found, pod)
    except DataError as error:
        problem = problem or str(error)
    if problem:
        raise CheckFailed(problem)
    told = f"{len(questions(splits))} questions to train on, {len(splits.held_out)} splits to evaluate"
    return f"{config.data.name}: {told}"


def check_checkpoints(config: Config, pod: Pod) -> str:
    """Checks that every host can write, list and delete where checkpoints go, and sees what host 0 writes.

    Also that the run will measure ``train.keep_best``, and that no other run's checkpoints are there.
    """
    directory = checkpoint_directory(config)
    try:
        run_directory(config)
        check_keep_best(config)
        probe(directory, pod)
        check_same_run(config)
    except (ConfigError, CheckpointError, JsonLinesError) as error:
        raise CheckFailed(str(error)) from None
    return f"{directory}: written, read and deleted"


def check_disks(config: Config, pod: Pod) -> str:
    """Checks for room for what this host keeps: the run's files, the model's, checkpoints that stay on it."""
    run_dir = Path(config.run.dir).expanduser()
    try:
        tempfile.TemporaryFile(dir=_existing(run_dir)).close()  # Leaves nothing behind, and creates no run.
    except OSError as error:
        raise CheckFailed(f"run.dir={run_dir}: cannot be written to: {error.strerror or error}") from None
    try:
        return _compare_room(config)
    except OSError as error:
        raise CheckFailed(f"{error.filename}: cannot be looked at: {error.strerror or error}") from None


def _compare_room(config: Config) -> str:
    """Free and needed space, disk by disk. Raises CheckFailed, and OSError for a path that cannot be inspected."""
    by_disk: dict[int, list[_Need]] = {}
    for need in _needs(config):
        by_disk.setdefault(_existing(need.path).stat().st_dev, []).append(need)
    told = []
    for needs in by_disk.values():
        path = needs[0].path
        free, wanted = shutil.disk_usage(_existing(path)).free, sum(need.size for need in needs)
        if free < wanted:
            parts = ", ".join(f"{need.size / _GIB:.1f} for {need.what}" for need in needs)
            raise CheckFailed(f"{path}: {free / _GIB:.1f} GiB free, {wanted / _GIB:.1f} GiB are needed: {parts}")
        told.append(f"{path}: {free / _GIB:.0f} GiB free, {wanted / _GIB:.0f} are needed")
    return ", ".join(told)


class _Need(NamedTuple):
    """Bytes that are still to be written below a directory."""

    path: Path
    size: int
    what: str


def _needs(config: Config) -> Iterator[_Need]:
    yield _Need(Path(config.run.dir).expanduser(), _SPARE_BYTES, "the run's files")
    yield _Need(Path(config.data.dir).expanduser(), _SPARE_BYTES, "data")
    if config.data.workers:
        # Each worker has a batch ready and one in progress, of the rows that this host's devices hold.
        rows = -(-config.train.batch_size // jax.process_count())
        patches = (config.data.image_size // _PATCH) ** 2 * _PATCH_BYTES
        size = 2 * config.data.workers * rows * patches
        yield _Need(Path("/dev/shm"), size, "batches between processes (data.workers)")
    # If the model is unavailable or does not fit, its own check has reported that.
    with contextlib.suppress(CheckFailed):
        if as_hub_id(config.model.path) is not None:
            yield _Need(Path(constants.HF_HUB_CACHE), _missing_bytes(config.model.path), "the model")
    directory = checkpoint_directory(config)
    if not is_url(directory):
        with contextlib.suppress(CheckpointError, MeshError):
            # One more is written before the oldest is deleted, and the best one may not be among the newest.
            count = config.train.keep_checkpoints + 1 + bool(config.train.keep_best)
            there = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
            size = max(0, count * _state_bytes(config) - there)
            yield _Need(Path(directory), size, f"{count} checkpoints (train.keep_checkpoints, run.checkpoint_dir)")


def _state_bytes(config: Config) -> int:
    """Bytes of the trainable parameters and the optimizer state in a checkpoint."""
    dims = read_dims(config.model.path)
    optimizer = make_optimizer(config.train, config.model.freeze_vision)
    with jax.set_mesh(_fitting_mesh(config, dims)):
        params = abstract_params(dims, config.model.lora_rank)
        state = jax.eval_shape(partial(initial_state, optimizer=optimizer), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_functions(config: Config, pod: Pod) -> str:
    """Checks that custom reward functions can be called, and are the same on all hosts."""
    names, problem, found = config.reward.functions, "", {}
    try:
        found = sources(load_functions(names, component_names(config.reward.recipe, True)))
    except ConfigError as error:
        problem = str(error)
    try:
        check_same_files(found, pod)
    except ConfigError as error:
        problem = problem or str(error)
    if problem:
        raise CheckFailed(problem)
    return ", ".join(names) or "none"


def check_rewards(config: Config, pod: Pod) -> str:
    """Checks that all reward servers serve one model, and return a mask to this host."""
    try:
        access = read_access(config.reward)
        if config.reward.server == "none":
            return "none: text alone"
        if config.reward.server == "local":
            if missing := missing_package():
                raise CheckFailed(f"reward.server=local: {missing}; or reward.server=none or host:port")
            check_local_model(config)
            return f"local: starts with the run and loads {config.reward.local_model}"
        with RewardClient(config.reward.server, config.reward.timeout_s, access=access) as client:
            said: list[str] = []
            infos = client.wait_until_serving(config.reward.timeout_s, said.append)
            if {info.address for info in infos} != set(addresses(config.reward.server)):
                # A run would start without the others, but now is the time to find out.
                raise CheckFailed(said[-1])
            picture, box = io.BytesIO(), ObjectPrompt((8.0, 8.0, 40.0, 40.0), ((20.0, 20.0),))
            Image.new("RGB", (64, 48)).save(picture, "PNG")
            start = time.monotonic()
            (mask,) = client.segment(picture.getvalue(), Frame(64, 48), [(box,)], id="preflight")
            seconds = time.monotonic() - start
    except (RewardServerError, ConfigError) as error:
        raise CheckFailed(str(error)) from None
    if mask.error:
        raise CheckFailed(f"reward server {config.reward.server}: {mask.error}")
    first = infos[0]
    kinds = ", ".join(f"{info.address} ({info.device})" for info in infos)
    return (
        f"{first.model}, checkpoint {first.checkpoint_sha256[:12]}, {first.dtype} at {kinds}: a mask in {seconds:.2f} s"
    )


# In this order, each on all hosts before the next begins.
CHECKS: dict[str, Check] = {
    "versions": check_versions,
    "options": check_options,
    "devices": check_devices,
    "model": check_model,
    "data": check_data,
    "checkpoints": check_checkpoints,
    "disks": check_disks,
    "reward functions": check_functions,
    "reward servers": check_rewards,
}


if __name__ == "__main__":
    sys.exit(main())
