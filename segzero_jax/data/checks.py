"""Checks of a data set before the first step: prompts that are too long, held-out images, hosts with different data."""

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from segzero_jax import jsonl
from segzero_jax.data.leaks import find_leaks
from segzero_jax.data.pipeline import DataError, Source
from segzero_jax.pods import Pod
from segzero_jax.processor import Processor, PromptTooLong

_NAMED = 5
_BLOCK = 4096


def check_prompts(source: Source, processor: Processor, data_dir: str | Path) -> int:
    """Counts the prompt tokens of every question, once per data set and tokenizer, and returns the maximum.

    Raises:
      PromptTooLong: some prompts exceed ``max_prompt_tokens``; names the longest ones.
    """
    counts = _counts(source, processor, Path(data_dir).expanduser() / "prompt_tokens")
    limit, most = processor.max_prompt_tokens, int(counts.max(initial=0))
    over = int((counts > limit).sum())
    if over:
        texts = source.texts()
        longest = np.argsort(-counts, kind="stable")[: min(over, _NAMED)]
        named = ", ".join(f"{texts[row][0]} with {counts[row]}" for row in longest)
        raise PromptTooLong(
            f"{source.name}: {over} of {len(counts)} prompts do not fit, expected at most max_prompt_tokens={limit}: "
            f"{named}{', …' if over > _NAMED else ''}; rollout.max_prompt_tokens={most} takes all of them"
        )
    return most


def check_held_out(train: Source, held_out: Iterable[Source]) -> None:
    """Raises DataError if a training image is also in an evaluation split; checks built sets only."""
    index = train.contents()
    for other in held_out:
        theirs = other.contents()
        if index is None or theirs is None:
            continue
        one_set = train.data_set == other.data_set
        if found := find_leaks(index, theirs, one_set):
            first = found[0]
            raise DataError(
                f"{len(found)} of {len(train)} questions of {train.name} are about pictures of {other.name}, the first "
                f"is {first.id}: {first.held_out} ({first.why}); build the set again with --rebuild --against "
                f"{other.name} --drop-leaks, or leave {other.name} out of data.eval_splits"
            )


def check_same(found: Mapping[str, str], pod: Pod) -> None:
    """Raises DataError on all hosts if a host's data differs from host 0's, since batches combine data of all hosts.

    Args:
      found: name and checksum of each split; empty if this host has none, which it must report itself.
    """
    if other := pod.difference("data", found):
        name, host, first, theirs = other
        raise DataError(
            f"{name}: checksum {first[:12]} on {pod.host(0)}, {theirs[:12]} on {pod.host(host)}; build it on all hosts "
            "from the same source, in the same way"
        )


def _counts(source: Source, processor: Processor, cache: Path) -> np.ndarray:
    def count() -> np.ndarray:
        questions = [question for _, question in source.texts()]
        blocks = [processor.count_tokens(questions[n : n + _BLOCK]) for n in range(0, len(questions), _BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    key = hashlib.sha256(f"{source.checksum} {processor.text_identity}".encode()).hexdigest()
    return counted_once(cache / f"{key}.npy", count)


def counted_once(path: Path, count: Callable[[], np.ndarray]) -> np.ndarray:
    """The result of ``count``, cached in the file ``path``, whose name identifies the data counted."""
    if path.is_file():
        # A damaged file is replaced.
        with contextlib.suppress(ValueError, EOFError):
            return np.load(path)
    counts = count()
    content = io.BytesIO()
    np.save(content, counts)
    with contextlib.suppress(OSError):  # The directory may be read-only; then prompts are counted each time.
        path.parent.mkdir(exist_ok=True)
        # Several processes may count the same data at once, so each writes its own file.
        mine = path.with_suffix(f".{secrets.token_hex(4)}.npy")
        jsonl.replace(mine, content.getvalue())
        os.replace(mine, path)
    return counts
