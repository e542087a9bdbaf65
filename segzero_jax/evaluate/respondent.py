"""A policy that answers questions in batches on the mesh, in the rollout layout, with the training prompt.

On several hosts, host 0 decides what is asked next, and the others answer along.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils

from segzero_jax.asking import Loaded
from segzero_jax.mesh import ROLLOUT
from segzero_jax.model.forward import forward_config
from segzero_jax.model.weights import check_fits
from segzero_jax.patches import ImageError
from segzero_jax.pods import ALONE, WHATEVER_IT_TAKES_S, Pod
from segzero_jax.processor import EncodedPrompt, PromptTooLong
from segzero_jax.random_streams import EVALUATE_COMMAND, stream_key
from segzero_jax.rollout import padding_multiple, rollout_layout, sample
from segzero_jax.types import Example, PromptBatch

# Evaluation draws from a different random stream than training.


class Reply(NamedTuple):
    """The answers to one question, and whether each ended by itself; or why it could not be asked."""

    texts: list[str]
    finished: list[bool]
    problem: str = ""


class Respondent:
    """Answers batches of questions: greedily, or with ``samples`` drawn answers each."""

    def __init__(self, loaded: Loaded, batch: int, samples: int, seed: int, pod: Pod = ALONE) -> None:
        """Lays the weights out for rollout.

        Args:
          loaded: the policy, on the ambient mesh.
          batch: questions at once; a shorter batch is padded, so that every batch has one shape.
          samples: 0 for one greedy answer.
          seed: random seed of drawn answers.
          pod: the hosts that the mesh is on; each reads and encodes all questions, which is cheap beside answering.

        Raises:
          MeshError: the policy or the batch does not divide over the mesh.
        """
        mesh = jax.sharding.get_mesh()
        check_fits(mesh, loaded.dims, batch, batch)
        self._fwd = forward_config(loaded.dims, ROLLOUT, loaded.config.model)
        self._batch, self._pod = batch, pod
        self._processor = loaded.processor
        self._mesh = mesh
        self._weights = rollout_layout(loaded.dims, self._fwd.dtype, loaded.config.model.lora_rank)(loaded.policy)
        self._sampling = loaded.sampling._replace(greedy=samples == 0, group=max(1, samples))
        self._multiple = padding_multiple(loaded.config.rollout.max_prompt_tokens)
        self._key = stream_key(seed, EVALUATE_COMMAND)

    def __call__(self, examples: Sequence[Example], start: int) -> list[Reply]:
        """Answers at most ``batch`` questions; ``start`` is the index of the first one in its split.

        Called on host 0; the others ``follow``.
        """
        self._next(start)
        return self._answer(examples, start)

    def follow(self, questions: Sequence[Example]) -> None:
        """Answers along with host 0, which has the same questions, until it has ``finished``."""
        while (start := self._next(None)) is not None:
            self._answer([questions[i] for i in range(start, min(start + self._batch, len(questions)))], start)

    def finished(self) -> None:
        """Tells the hosts that follow that there are no more questions."""
        self._next(None)

    def _next(self, start: int | None) -> int | None:
        # Between batches host 0 may wait for SAM 2, or find all answers there already.
        return self._pod.from_first("the next questions", lambda: start, WHATEVER_IT_TAKES_S)

    def _answer(self, examples: Sequence[Example], start: int) -> list[Reply]:
        answers = self._sampling.group
        encoded = [self._encode(example) for example in examples]
        asked = [prompt for prompt in encoded if isinstance(prompt, EncodedPrompt)]
        rows = iter(self._sample(asked, start) if asked else [])
        return [
            next(rows) if isinstance(prompt, EncodedPrompt) else Reply([""] * answers, [True] * answers, prompt)
            for prompt in encoded
        ]

    def _encode(self, example: Example) -> EncodedPrompt | str:
        try:
            return self._processor.encode(example)
        except (ImageError, PromptTooLong) as error:
            return str(error)

    def _sample(self, prompts: list[EncodedPrompt], start: int) -> list[Reply]:
        filled = prompts + prompts[:1] * (self._batch - len(prompts))
        batch = self._place(self._processor.batch(filled, multiple=self._multiple))
        key = jax.random.fold_in(self._key, start)
        drawn = sample(self._weights, batch, key, fwd=self._fwd, sampling=self._sampling)
        drawn = multihost_utils.process_allgather(drawn, tiled=True)
        lengths = drawn.length_bg
        return [
            Reply(
                [self._processor.decode(drawn.tokens_bgr[b, a, : lengths[b, a]]) for a in range(lengths.shape[1])],
                [bool(ended) for ended in drawn.finished_bg[b]],
            )
            for b in range(len(prompts))
        ]

    def _place(self, batch: PromptBatch) -> PromptBatch:
        def put(x: jax.Array) -> jax.Array:
            spec = ROLLOUT.spec("batch", *(None,) * (x.ndim - 1))
            sharding = jax.sharding.NamedSharding(self._mesh, spec)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

        return jax.tree.map(put, batch)
