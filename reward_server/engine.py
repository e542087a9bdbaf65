"""What a device does with a batch: encodes each picture once, decodes each call's prompts together, counts pixels."""

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

# Of masks that are being brought to the picture's size, float32 and bool side by side: 320 MiB.
_PIXELS_AT_ONCE = 2**26
# Versions of the compiled encoder: at most ten a device, which is one for each size of batch and one more.
_COMPILED_AT_MOST = 1024

_log = logging.getLogger(__name__)


class DeviceMemoryError(Exception):
    """The device has no memory for this even in half a batch."""


@dataclass(frozen=True, eq=False)
class Job:
    """One image and its candidates.

    Attributes:
      key: SHA-256 of the encoded picture.
      image: uint8 RGB [height, width, 3], or None where ``embedding`` is given.
      embedding: what an earlier request left for the same picture, on any device.
      candidates: each a sequence of prompts in pixels of the image.
      target: candidates' masks are compared with this bool mask [height, width]; or with the mask of these prompts;
        or with nothing.
      want_masks: return masks too, whole.
      ignore: pixels that count in no mask, bool [height, width]; None for none.
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
        """Prompts by the mask that they make together: each candidate's, and last the target's where it has some."""
        made = self.target is not None and not isinstance(self.target, np.ndarray)
        return [*self.candidates, self.target] if made else list(self.candidates)  # type: ignore[list-item]


@dataclass(frozen=True)
class Outcome:
    """What a job gave, one entry per candidate; counts are empty where there was no target.

    Attributes:
      intersections, unions, target_area: in pixels that count.
      has_target: whether the target is a mask with pixels, ignored ones included, or objects.
      scores: SAM 2's own estimate of the IoU, the mean over the objects; 0 without objects.
      masks: of each candidate where asked for, see ``codec.pack_mask``: bytes a pixel would be gigabytes.
      width: of the picture.
    """

    intersections: list[int]
    unions: list[int]
    target_area: int
    has_target: bool
    scores: list[float]
    masks: list[np.ndarray] | None
    width: int

    def mask(self, candidate: int) -> np.ndarray:
        """A candidate's mask, uint8 [height, width] of 0 and 1; only where masks were asked for."""
        assert self.masks is not None
        return unpack_mask(self.masks[candidate], self.width)


class Embeddings:
    """Embeddings by picture, the least recently used forgotten first. Thread-safe."""

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
    """Runs batches on one device. Only one thread may call ``run``; embeddings may be read from others."""

    def __init__(self, segmenter: Segmenter, cache_bytes: int, metrics: Metrics) -> None:
        self.segmenter = segmenter
        self.embeddings = Embeddings(cache_bytes)
        self._metrics = metrics
        # Pictures that were encoded for calls which wait for their answer: those calls did not find them encoded.
        self._fresh: set[bytes] = set()

    def warm_up(self, max_batch: int) -> None:
        """Runs the model on every batch size that it is compiled for, else on the smallest and the largest."""
        sizes = [1, max_batch]
        if self.segmenter.compiled:
            # Past eight versions of a function, which all devices share, torch goes on without compiling and says so
            # in a warning alone. In newer versions of torch the limits are a thread's own: here the model runs. The
            # names are those that every version knows.
            torch._dynamo.config.cache_size_limit = _COMPILED_AT_MOST
            torch._dynamo.config.accumulated_cache_size_limit = _COMPILED_AT_MOST
            # Twice each: the first call fills SAM 2's own cache of position encodings, for which torch compiles anew.
            sizes = [2**n for n in range((max_batch - 1).bit_length() + 1) for _ in range(2)]
        box = Prompt((8.0, 8.0, 40.0, 40.0), ((20.0, 20.0),))
        blank = np.zeros((48, 64, 3), np.uint8)
        for size in sizes:
            for embedding in self.segmenter.embed([blank] * size):
                logits = self.segmenter.decode(embedding, [box, box]).logits
                self.segmenter.masks(logits, *blank.shape[:2])

    def run(self, batch: Sequence[Ticket[Job, Outcome]]) -> None:
        """Gives every ticket its outcome, or the error that it alone has met.

        A batch that does not fit the device's memory is run once more in two halves. What else goes wrong is tried
        again one ticket at a time, so that it stays with its cause.

        Raises:
          RuntimeError: the device no longer computes; tickets may be left without an outcome.
        """
        self._fresh.clear()
        if self._fits(batch, PROMPTS_PER_CALL):
            return
        # Past the handler, since a caught error keeps its frames alive, and these the memory that was too much.
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
        """The whole batch together; after an error each of its tickets alone. Raises torch.OutOfMemoryError."""
        try:
            self._together(batch, prompts_per_call)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Whatever it is, the callers must get an answer.
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
            # Apart from others about the same picture: beside more prompts, those of a small call come out otherwise in
            # their last bits, and who meets in a batch is chance.
            decoded = self.segmenter.decode(embedding, [p for group in job.groups for p in group], prompts_per_call)
            outcome = self._outcome(job, embedding, decoded.logits, decoded.scores)
            # Here, once for each answer: after an error calls are run again.
            if job.key in self._fresh:
                self._fresh.remove(job.key)
            else:
                self._metrics.hits.inc()
            ticket.future.set_result(outcome)

    def _embed(self, by_picture: dict[bytes, list[Job]]) -> dict[bytes, Embedding]:
        """The embedding of every picture; those that are nowhere yet are encoded together, each once."""
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
          logits, scores: of the job's prompts, in the order of its groups: [prompts, 1, size, size] and [prompts].
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
        """Masks of consecutive candidates, bool [some, height, width], no more at a time than fit a bounded memory.

        Args:
          logits: of all candidates' prompts in order.
          counts: prompts per candidate; its mask is the union of theirs, empty without any.
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
    """Pixels of each mask, bool [n, height, width]."""
    if masks.device.type == "cpu":
        # Ten times as fast as torch's sum, which makes integers of them first.
        return [int(np.count_nonzero(mask)) for mask in masks.numpy()]
    areas: list[int] = masks.sum((1, 2)).tolist()
    return areas
