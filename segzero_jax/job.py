"""The constants of a run: configuration, mesh, processor, and how each phase runs the policy."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from pydantic import ConfigDict, TypeAdapter

from segzero_jax.asking import load_processor, make_sampling
from segzero_jax.compiled import keep_compiled
from segzero_jax.config import Config
from segzero_jax.grpo import LossConfig, TrainState, full_policy, initial_state, make_loss_config, make_optimizer
from segzero_jax.mesh import ROLLOUT, TRAIN, Rows, batch_rows
from segzero_jax.model.forward import forward_config, training_layout
from segzero_jax.model.lora import Adapters, adapt
from segzero_jax.model.policy import ForwardConfig, Policy
from segzero_jax.model.precision import use_compute_dtype
from segzero_jax.model.weights import check_fits, load_hf, read_dims
from segzero_jax.pods import Pod
from segzero_jax.processor import Processor
from segzero_jax.random_streams import EVALUATION, LORA_START, stream_key
from segzero_jax.record import PICTURED_PROMPTS
from segzero_jax.rollout import Sampling, padding_multiple, rollout_layout, sample
from segzero_jax.types import Example, Frame, Lengths, PromptBatch, Rollout

_EXAMPLES = TypeAdapter(dict[int, Example], config=ConfigDict(ser_json_bytes="base64", val_json_bytes="base64"))


@dataclass(frozen=True)
class Job:
    """The constants of a run; with LoRA also ``base``, the policy that it starts from."""

    config: Config
    mesh: jax.sharding.Mesh
    processor: Processor
    frame: Frame
    train_fwd: ForwardConfig
    rollout_fwd: ForwardConfig
    sampling: Sampling
    loss_config: LossConfig
    optimizer: optax.GradientTransformation
    to_rollout: Callable[[Policy], Policy]
    pod: Pod
    rows: Rows
    base: Policy | None = None

    def policy(self, state: TrainState) -> Policy:
        """The current policy."""
        return full_policy(state.params, self.base, self.loss_config)

    def place(self, tree: Any, rows: Sequence[int]) -> Any:
        """Places host arrays with a leading batch axis onto the mesh.

        Args:
          tree: arrays of some rows of a batch, at least those that this process's devices hold.
          rows: the numbers of these rows, in ascending order.
        """
        size, place_of = self.config.train.batch_size, {row: place for place, row in enumerate(rows)}

        def put(x: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                wanted = range(size)[index[0]]
                return x[place_of[wanted[0]] : place_of[wanted[-1]] + 1]

            sharding = jax.sharding.NamedSharding(self.mesh, TRAIN.spec("batch", *(None,) * (x.ndim - 1)))
            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, shard)

        return jax.tree.map(put, tree)

    @property
    def collate(self) -> Callable[[Sequence[Example]], tuple[list[Example], PromptBatch]]:
        """A function from examples to the examples and their prompts on the host; it can run in another process."""
        multiple = padding_multiple(self.config.rollout.max_prompt_tokens)
        return functools.partial(_encoded, processor=self.processor, multiple=multiple)

    def encode(self, examples: Sequence[Example]) -> PromptBatch:
        """Encodes this process's rows of a batch as prompts on the mesh, where other processes add theirs."""
        return self.join(self.collate(examples)[1])

    def join(self, prompts: PromptBatch) -> PromptBatch:
        """The prompts of the whole batch on the mesh, from this process's rows on the host."""
        # All prompts of a batch are padded to one length.
        length = max(map(int, self.pod.exchange("prompt lengths", str(prompts.tokens_bp.shape[1]))))
        return self.place(self.processor.widen(prompts, length), self.rows.held)

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """The whole batch, of which this process has read its own rows; images of other rows are left out.

        The first images, which a run keeps for its report, are included.
        """
        held = dict(zip(self.rows.held, examples, strict=True))
        mine = {row: held[row] if row < PICTURED_PROMPTS else replace(held[row], image=b"") for row in self.rows.own}
        parts = self.pod.exchange("the batch", _EXAMPLES.dump_json(mine).decode())
        others = {row: example for part in parts for row, example in _EXAMPLES.validate_json(part).items()}
        return [held.get(row, others[row]) for row in range(len(others))]

    def fetch(self, tree: Any) -> Any:
        """Arrays on the mesh as complete numpy arrays, on every host."""
        return multihost_utils.process_allgather(tree, tiled=True)

    def texts(self, rollout: Rollout) -> list[list[str]]:
        """Responses on the host as text, ``[b][g]``."""
        return [
            [self.processor.decode(row[:length]) for row, length in zip(group, counts, strict=True)]
            for group, counts in zip(rollout.tokens_bgr, rollout.length_bg, strict=True)
        ]


def _encoded(examples: Sequence[Example], processor: Processor, multiple: int) -> tuple[list[Example], PromptBatch]:
    return list(examples), processor.batch([processor.encode(example) for example in examples], multiple)


def prepare(
    config: Config, mesh: jax.sharding.Mesh, pod: Pod, check: Callable[[Processor], None] = lambda processor: None
) -> tuple[Job, TrainState, Policy | None]:
    """Loads the processor, the policy and its frozen reference onto the ambient mesh, and checks that all fits.

    Without ``grpo.kl_coef`` there is no reference.

    Args:
      check: raises if the run cannot continue; called before weights are read, which takes minutes.
    """
    keep_compiled()
    dims = read_dims(config.model.path)
    processor = load_processor(config, f"model.path={config.model.path}")
    check_fits(mesh, dims, config.train.batch_size, config.train.micro_batch_size)
    check(processor)
    dtype = use_compute_dtype(config.model.compute_dtype)
    rank = config.model.lora_rank
    layout = training_layout(dims, mesh, config.train.micro_batch_size)
    params: Policy | Adapters
    if rank:
        base = load_hf(config.model.path, layout, dtype)[0]
        key = stream_key(config.seed, LORA_START)
        params = jax.jit(lambda key: Adapters(dims, layout, rank, key))(key)
        # With zero adapters, so that sums are rounded in the same places as the policy's and the first KL is almost 0.
        nothing = jax.tree.map(lambda x: jnp.zeros_like(x, dtype), params)
        reference = adapt(base, nothing) if config.grpo.kl_coef else None
    else:
        base, (params, _) = None, load_hf(config.model.path, layout)
        # Read again rather than copied: the state's buffers are donated to the update.
        reference = load_hf(config.model.path, layout, dtype)[0] if config.grpo.kl_coef else None
    job = Job(
        config=config,
        mesh=mesh,
        processor=processor,
        frame=Frame(config.data.image_size, config.data.image_size),
        train_fwd=forward_config(dims, layout, config.model),
        rollout_fwd=forward_config(dims, ROLLOUT, config.model),
        sampling=make_sampling(config.rollout, processor),
        loss_config=make_loss_config(config, processor.visual_ids),
        optimizer=make_optimizer(config.train, config.model.freeze_vision),
        to_rollout=rollout_layout(dims, dtype, rank),
        pod=pod,
        rows=batch_rows(mesh, config.train.batch_size, pod.index),
        base=base,
    )
    return job, initial_state(params, job.optimizer), reference


def answer(
    job: Job, weights: Policy, examples: Sequence[Example], greedy: bool, before_batch: Callable[[], None]
) -> tuple[list[list[str]], Lengths]:
    """The policy's answers to questions, ``[q][a]``: one greedy answer, or ``eval.samples`` sampled ones.

    ``before_batch`` may raise to stop between two batches.
    """
    size = job.config.train.batch_size
    sampling = job.sampling._replace(greedy=greedy, group=1 if greedy else job.config.eval.samples)
    base = stream_key(job.config.seed, EVALUATION)
    texts: list[list[str]] = []
    lengths: list[Lengths] = []
    for start in range(0, len(examples), size):
        before_batch()
        rows = list(examples[start : start + size])
        # A short last batch is padded with its first row, so that all batches have the same shape.
        filled = rows + rows[:1] * (size - len(rows))
        key = jax.random.fold_in(base, start)
        prompts = job.encode([filled[row] for row in job.rows.held])
        said = job.fetch(sample(weights, prompts, key, fwd=job.rollout_fwd, sampling=sampling))
        texts += job.texts(said)[: len(rows)]
        lengths.append(Lengths(said.length_bg[: len(rows)], said.finished_bg[: len(rows)]))
    return texts, Lengths(*map(np.concatenate, zip(*lengths, strict=True)))
