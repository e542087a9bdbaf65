"""Runs a batch on a device: encodes each image once, decodes each call's prompts together, counts pixels."""

import itertools
import logging
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from reward_server.batcher import Ticket
from reward_server.codec import pack_mask, unpack_mask
from reward_server.segmenter import PROMPTS_PER_CALL, Embedding, Prompt, Segmenter
from reward_server.telemetry import Metrics

# Pixels of the masks resized to image size at once, held as float32 and bool: 320 MiB.
_PIXELS_AT_ONCE = 2**26
# Limit on compiled versions of the encoder. A device needs at most ten: one per batch size plus one.
_COMPILED_AT_MOST = 1024

_log = logging.getLogger(__name__)


class DeviceMemoryError(Exception):
    """The device is out of memory even with half a batch."""


@dataclass(frozen=True, eq=False)
class Job:
    """One image and its candidates.

    Attributes:
      key: SHA-256 of the encoded image file.
      image: uint8 RGB [height, width, 3], or None if ``embedding`` is given.
      embedding: the cached embedding of the same image from an earlier request, on any device.
      candidates: each a sequence of prompts, in pixels of the image.
      target: a bool mask [height, width], or prompts whose mask is used, to compare the candidates' masks with; None
        for no comparison.
      want_masks: also return the candidates' masks, without ``ignore`` applied.
      ignore: pixels excluded from all counts, bool [height, width]; None if there are none.
    """

    key: bytes
    image: np.ndarray | None
    embedding: Embedding | None
    candidates: Sequence[Sequence[Prompt]]
    target: np.ndarray | Sequence[Prompt] | None
    want_masks: bool
    ignore: np.ndarray | None = None

    @property
    def groups(self) -> list[Sequence[Prompt]]:
        """The prompts of each mask: those of each candidate, then those of the target if it is given by prompts."""
        made = self.target is not None and not isinstance(self.target, np.ndarray)
        return [*self.candidates, self.target] if made else list(self.candidates)  # type: ignore[list-item]


@dataclass(frozen=True)
class Outcome:
    """The result of a job, one entry per candidate; counts are empty if there was no target.

    Attributes:
      intersections, unions, target_area: in pixels that are not ignored.
      has_target: whether the target is a mask with at least one pixel (ignored pixels included) or has prompts.
      scores: SAM 2's own IoU estimate, averaged over the objects; 0 without objects.
      masks: the mask of each candidate, if requested, packed by ``codec.pack_mask``: a byte per pixel would take
        gigabytes.
      width: width of the image.
    """

    intersections: list[int]
    unions: list[int]
    target_area: int
    has_target: bool
    scores: list[float]
    masks: list[np.ndarray] | None
    width: int

    def mask(self, candidate: int) -> np.ndarray:
        """A candidate's mask, uint8 [height, width] of 0 and 1; only if masks were requested."""
        assert self.masks is not None
        return unpack_mask(self.masks[candidate], self.width)


class Embeddings:
    """A thread-safe LRU cache of embeddings by image."""

    def __init__(self, max_bytes: int) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Embedding | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: bytes, embedding: Embedding) -> None:
        with self._lock:
            if key in self._entries or embedding.nbytes > self._max_bytes:
                return
            self._entries[key] = embedding
            self.nbytes += embedding.nbytes
            while self.nbytes > self._max_bytes:
                _, forgotten = self._entries.popitem(last=False)
                self.nbytes -= forgotten.nbytes


class Engine:
    """Runs batches on one device. Only one thread may call ``run``; other threads may read ``embeddings``."""

    def __init__(self, segmenter: Segmenter, cache_bytes: int, metrics: Metrics) -> None:
        self.segmenter = segmenter
        self.embeddings = Embeddings(cache_bytes)
        self._metrics = metrics
        # Images encoded in this batch whose first call is not answered yet: that call is not counted as a cache hit.
        self._fresh: set[bytes] = set()

    def warm_up(self, max_batch: int) -> None:
        """Runs the model on every batch size it is compiled for; if not compiled, on the smallest and the largest."""
        sizes = [1, max_batch]
        if self.segmenter.compiled:
            # After eight versions of a function, counted over all devices, torch stops compiling it and only warns. In
            # newer versions of torch the limits are per thread; this is the thread that runs the model. These names
            # exist in every version.
            torch._dynamo.config.cache_size_limit = _COMPILED_AT_MOST
            torch._dynamo.config.accumulated_cache_size_limit = _COMPILED_AT_MOST
            # Twice each: the first call fills SAM 2's own cache of position encodings, which makes torch recompile.
            sizes = [2**n for n in range((max_batch - 1).bit_length() + 1) for _ in range(2)]
        box = Prompt((8.0, 8.0, 40.0, 40.0), ((20.0, 20.0),))
        blank = np.zeros((48, 64, 3), np.uint8)
        for size in sizes:
            for embedding in self.segmenter.embed([blank] * size):
                logits = self.segmenter.decode(embedding, [box, box]).logits
                self.segmenter.masks(logits, *blank.shape[:2])

    def run(self, batch: Sequence[Ticket[Job, Outcome]]) -> None:
        """Sets every ticket's outcome, or its own error.

        A batch that does not fit the device's memory is retried in two halves. After any other error the tickets are
        retried one at a time, so that only the ticket that causes the error fails.

        Raises:
          RuntimeError: the device no longer computes; some tickets may have no outcome.
        """
        self._fresh.clear()
        if self._fits(batch, PROMPTS_PER_CALL):
            return
        # Outside the except block, since a caught exception keeps its frames alive, and these hold the tensors.
        self._metrics.out_of_memory.inc()
        _log.warning("out of memory with %d requests on %s: halving", len(batch), self.segmenter.device)
        torch.cuda.empty_cache()
        left = [ticket for ticket in batch if not ticket.future.done()]
        middle = (len(left) + 1) // 2
        for half in (left[:middle], left[middle:]):
            if not self._fits(half, PROMPTS_PER_CALL // 2):
                for ticket in half:
                    if not ticket.future.done():
                        ticket.future.set_exception(DeviceMemoryError("out of memory on the device"))
                torch.cuda.empty_cache()

    def _fits(self, batch: Sequence[Ticket[Job, Outcome]], prompts_per_call: int) -> bool:
        try:
            self._run(batch, prompts_per_call)
        except torch.OutOfMemoryError:
            return False
        return True

    def _run(self, batch: Sequence[Ticket[Job, Outcome]], prompts_per_call: int) -> None:
        """Runs the whole batch together; after an error, each ticket alone. Raises torch.OutOfMemoryError."""
        try:
            self._together(batch, prompts_per_call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # The callers must get an answer for any error.
            self.segmenter.check_alive()
            left = [ticket for ticket in batch if not ticket.future.done()]
            if len(batch) == 1:
                _log.exception("a request failed")
                left[0].future.set_exception(error)
                return
            for ticket in left:
                self._run([ticket], prompts_per_call)

    def _together(self, batch: Sequence[Ticket[Job, Outcome]], prompts_per_call: int) -> None:
        by_picture: dict[bytes, list[Job]] = defaultdict(list)
        for ticket in batch:
            by_picture[ticket.item.key].append(ticket.item)
        embeddings = self._embed(by_picture)
        for ticket in batch:
            job, embedding = ticket.item, embeddings[ticket.item.key]
            # Calls about the same image are decoded separately: the last bits of a small call's results depend on how
            # many prompts are decoded together, and which calls share a batch is chance.
            decoded = self.segmenter.decode(embedding, [p for group in job.groups for p in group], prompts_per_call)
            outcome = self._outcome(job, embedding, decoded.logits, decoded.scores)
            # Counted here, once per answer, since calls are run again after an error.
            if job.key in self._fresh:
                self._fresh.remove(job.key)
            else:
                self._metrics.hits.inc()
            ticket.future.set_result(outcome)

    def _embed(self, by_picture: dict[bytes, list[Job]]) -> dict[bytes, Embedding]:
        """The embedding of every image; images without a cached embedding are encoded together, each once."""
        found: dict[bytes, Embedding] = {}
        missing: dict[bytes, np.ndarray] = {}
        for key, jobs in by_picture.items():
            known = self.embeddings.get(key) or next((job.embedding for job in jobs if job.embedding), None)
            if known is not None:
                found[key] = known.to(self.segmenter.device)
            else:
                missing[key] = next(job.image for job in jobs if job.image is not None)
        if missing:
            found.update(zip(missing, self.segmenter.embed(list(missing.values())), strict=True))
        for key, embedding in found.items():
            self.embeddings.put(key, embedding)
        self._fresh.update(missing)
        self._metrics.encoded.inc(len(missing))
        return found

    def _outcome(self, job: Job, embedding: Embedding, logits: torch.Tensor, scores: np.ndarray) -> Outcome:
        """Compares a job's masks with its target.

        Args:
          logits: [prompts, 1, size, size], of the job's prompts in the order of its groups.
          scores: [prompts], in the same order.
        """
        size = (embedding.height, embedding.width)
        counts = [len(candidate) for candidate in job.candidates]
        ends = np.cumsum([0, *counts])
        means = [float(scores[a:b].mean(dtype=np.float64)) if b > a else 0.0 for a, b in itertools.pairwise(ends)]
        target = None
        if isinstance(job.target, np.ndarray):
            target = torch.from_numpy(job.target).to(self.segmenter.device)
        elif job.target is not None:
            if not np.isfinite(scores[ends[-1] :]).all():
                raise ArithmeticError("SAM 2 gave no finite score for the target")
            target = next(self._masks(logits[ends[-1] :], [len(job.target)], size))[0]
        counted = None if job.ignore is None else torch.from_numpy(~job.ignore).to(self.segmenter.device)
        if target is not None and counted is not None:
            target = target & counted
        target_area = _areas(target[None])[0] if target is not None else 0
        intersections: list[int] = []
        unions: list[int] = []
        masks: list[np.ndarray] = []
        for some in self._masks(logits, counts, size):
            if target is not None:
                shared = _areas(some & target)
                areas = _areas(some if counted is None else some & counted)
                intersections += shared
                unions += [area + target_area - both for area, both in zip(areas, shared, strict=True)]
            if job.want_masks:
                masks += [pack_mask(mask) for mask in some.cpu().numpy()]
        return Outcome(
            intersections=intersections,
            unions=unions,
            target_area=target_area,
            has_target=bool(job.target.any() if isinstance(job.target, np.ndarray) else job.target),
            scores=means,
            masks=masks if job.want_masks else None,
            width=size[1],
        )

    def _masks(self, logits: torch.Tensor, counts: Sequence[int], size: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Yields masks of consecutive candidates, bool [some, height, width], in pieces that bound the memory.

        Args:
          logits: logits of all candidates' prompts, in order.
          counts: prompts per candidate; a candidate's mask is the union of their masks, empty without prompts.
        """
        at_once = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
        first = start = 0
        while first < len(counts):
            last, end = first + 1, start + counts[first]
            while last < len(counts) and last - first < at_once and end - start + counts[last] <= at_once:
                end += counts[last]
                last += 1
            if counts[first:last] == [1] * (last - first):
                yield self.segmenter.masks(logits[start:end], *size)
                first, start = last, end
                continue
            joined = torch.zeros(last - first, *size, dtype=torch.bool, device=logits.device)
            owners = np.repeat(np.arange(last - first), counts[first:last])
            for place in range(start, end, at_once):
                part = slice(place, min(place + at_once, end))
                masks = self.segmenter.masks(logits[part], *size)
                for owner, mask in zip(owners[place - start :], masks, strict=False):
                    joined[owner] |= mask
            yield joined
            first, start = last, end


def _areas(masks: torch.Tensor) -> list[int]:
    """The pixel count of each mask, bool [n, height, width]."""
    if masks.device.type == "cpu":
        # Ten times as fast as torch's sum, which converts to integers first.
        return [int(np.count_nonzero(mask)) for mask in masks.numpy()]
    areas: list[int] = masks.sum((1, 2)).tolist()
    return areas
