"""What a device does with a batch: pictures encoded once, calls decoded one by one, errors kept with their cause."""

import functools
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from sam_calls import prompts_of, scene, scene_with

from reward_server import engine as engine_module
from reward_server.batcher import Batcher, ClosedError, QueueFullError, Ticket
from reward_server.engine import DeviceMemoryError, Embeddings, Engine, Job, Outcome
from reward_server.segmenter import Embedding, Prompt, Segmenter
from reward_server.telemetry import Metrics
from reward_server.worker import Workers


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.set_num_threads(1)
    return Segmenter.load("toy", "cpu")


@pytest.fixture
def engine(segmenter: Segmenter) -> Engine:
    return Engine(segmenter, 2**28, Metrics())


def job(index: int, points: int = 1, shifts: Sequence[float] = (0.0, 5.0), want_masks: bool = False) -> Job:
    """Asks about every object of a scene, with the first object's mask as the target."""
    picture = scene(index)
    candidates = [[prompt] for shift in shifts for prompt in prompts_of(picture, points, shift)]
    target = np.ascontiguousarray(picture.objects[0].mask)
    return Job(bytes([index]) * 32, picture.image, None, candidates, target, want_masks)


def tickets(*jobs: Job) -> list[Ticket[Job, Outcome]]:
    made: list[Ticket[Job, Outcome]] = [Ticket(item, time.monotonic() + 60) for item in jobs]
    for ticket in made:
        ticket.future.set_running_or_notify_cancel()
    return made


def outcomes(engine: Engine, *jobs: Job) -> list[Outcome]:
    batch = tickets(*jobs)
    engine.run(batch)
    return [ticket.future.result(timeout=0) for ticket in batch]


def count_encoded(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of pictures of each encoder call."""
    sizes: list[int] = []
    embed = segmenter.embed
    monkeypatch.setattr(segmenter, "embed", lambda images: sizes.append(len(images)) or embed(images))
    return sizes


def count_decoded(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    decode = segmenter.decode

    def recorded(embedding: Embedding, prompts: Sequence[Prompt], prompts_per_call: int) -> object:
        sizes.append(len(prompts))
        return decode(embedding, prompts, prompts_per_call)

    monkeypatch.setattr(segmenter, "decode", recorded)
    return sizes


def unpacked(found: Outcome) -> np.ndarray:
    """A job's masks, bool [candidates, height, width]."""
    return np.stack([found.mask(candidate) for candidate in range(len(found.masks))]).astype(bool)


class TestBatches:
    def test_answer_each_job_as_if_it_were_alone(self, segmenter: Segmenter, engine: Engine) -> None:
        """To the bit, above all calls of few prompts about one picture."""
        few = [[prompt] for shift in range(8) for prompt in prompts_of(scene(4), 0, shift)]
        starts = (0, 1, 2, 3, 4, 6, 9, 12)
        small = [replace(job(4), candidates=few[i:j]) for i, j in itertools.pairwise(starts)]
        against_prompts = replace(small[0], target=few[12])
        jobs = [job(0), *small, job(1, 2), job(0, 0, (3.0,)), against_prompts, job(1, 1, (-4.0,))]
        jobs = [replace(item, want_masks=True) for item in jobs]
        for item, ours in zip(jobs, outcomes(engine, *jobs), strict=True):
            (alone,) = outcomes(Engine(segmenter, 2**28, Metrics()), item)
            assert ours.scores == alone.scores
            np.testing.assert_array_equal(ours.masks, alone.masks)
            assert (ours.intersections, ours.unions) == (alone.intersections, alone.unions)
            assert ours.target_area == alone.target_area

    def test_a_picture_is_encoded_as_if_it_were_alone(self, segmenter: Segmenter) -> None:
        pictures = [scene(index).image for index in range(8)]
        alone = [embedding for picture in pictures for embedding in segmenter.embed([picture])]
        for count in (2, 3, 8):
            for ours, theirs in zip(segmenter.embed(pictures[:count]), alone, strict=False):
                assert all(map(torch.equal, ours.levels, theirs.levels))

    def test_encode_a_picture_once_whoever_asks_and_decode_each_call_in_one(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        encoded, decoded = count_encoded(segmenter, monkeypatch), count_decoded(segmenter, monkeypatch)
        jobs = [job(0), job(1), job(0, 2), job(0, 1, (9.0,)), job(1, 0)]
        objects = [len(item.candidates) for item in jobs]
        outcomes(engine, *jobs)
        assert encoded == [2]
        assert decoded == objects
        outcomes(engine, job(1), job(2))
        assert encoded == [2, 1]
        registry = engine._metrics.registry
        assert registry.get_sample_value("segzero_reward_images_encoded_total") == 3
        assert registry.get_sample_value("segzero_reward_cache_hits_total") == 4

    def test_take_a_picture_from_where_it_was_encoded(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As from another device: by hash alone, and beside the same picture with its bytes."""
        whole = job(3)
        (embedding,) = segmenter.embed([whole.image])
        encoded = count_encoded(segmenter, monkeypatch)
        by_hash = Job(whole.key, None, embedding, whole.candidates, whole.target, False)
        first, second = outcomes(engine, whole, by_hash)
        assert encoded == []
        assert first.intersections == second.intersections

    def test_masks_are_unions_counted_against_the_target(self, segmenter: Segmenter, engine: Engine) -> None:
        picture = scene_with(3)
        prompts, target = prompts_of(picture), np.ascontiguousarray(picture.objects[1].mask)
        candidates = [prompts, [], prompts[:1], prompts[1:2]]
        (found,) = outcomes(engine, Job(b"k", picture.image, None, candidates, target, True))
        masks = unpacked(found)
        assert masks.shape == (4, *target.shape)
        assert (masks[0] != (masks[2] | masks[3] | masks[0])).sum() == 0
        assert not masks[1].any()
        assert found.scores[1] == 0
        for mask, intersection, union in zip(masks, found.intersections, found.unions, strict=True):
            assert intersection == (mask & target).sum()
            assert union == (mask | target).sum()
        decoded = segmenter.decode(segmenter.embed([picture.image])[0], prompts)
        single = segmenter.masks(decoded.logits, *target.shape).numpy()
        assert (masks[0] == single.any(0)).all()
        assert found.scores[0] == pytest.approx(decoded.scores.mean())

    @pytest.mark.parametrize("at_once", [1, 60_000, 200_000])
    def test_large_masks_are_made_a_few_at_a_time(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, at_once: int
    ) -> None:
        picture = scene_with(3)
        prompts = prompts_of(picture)
        several = Job(b"k", picture.image, None, [prompts, [], prompts[:2], *[[p] for p in prompts]], prompts[:2], True)
        (whole,) = outcomes(engine, several)
        monkeypatch.setattr(engine_module, "_PIXELS_AT_ONCE", at_once)
        largest = []
        masks = engine.segmenter.masks
        monkeypatch.setattr(
            engine.segmenter, "masks", lambda logits, *size: largest.append(len(logits)) or masks(logits, *size)
        )
        (parts,) = outcomes(engine, several)
        assert max(largest) == max(1, at_once // (256 * 224))
        np.testing.assert_array_equal(parts.masks, whole.masks)
        assert parts.intersections == whole.intersections
        assert parts.unions == whole.unions

    def test_without_candidates_or_target_there_is_nothing_to_count(self, engine: Engine) -> None:
        picture = scene()
        nothing, bare = outcomes(
            engine,
            Job(b"k", picture.image, None, [], np.zeros(picture.image.shape[:2], bool), True),
            Job(b"k", picture.image, None, [prompts_of(picture)[:1]], None, True),
        )
        assert (nothing.intersections, nothing.unions, nothing.target_area) == ([], [], 0)
        assert nothing.masks == []
        assert (bare.intersections, bare.unions) == ([], [])
        assert bare.masks[0].any()


def failing(work: Callable[..., object], fails: Callable[..., bool], error: Exception) -> Callable[..., object]:
    def wrapped(*arguments: object, **named: object) -> object:
        if fails(*arguments, **named):
            raise error
        return work(*arguments, **named)

    return wrapped


class TestFaults:
    def test_an_error_stays_with_the_picture_that_causes_it(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = scene(1).image
        monkeypatch.setattr(
            segmenter,
            "embed",
            failing(segmenter.embed, lambda images: any(image is bad_job.image for image in images), ValueError("bad")),
        )
        bad_job = Job(b"bad", bad, None, job(1).candidates, None, False)
        batch = tickets(job(0), bad_job, job(2))
        engine.run(batch)
        assert isinstance(batch[1].future.exception(timeout=0), ValueError)
        for ticket in (batch[0], batch[2]):
            (alone,) = outcomes(Engine(Segmenter.load("toy", "cpu"), 2**28, Metrics()), ticket.item)
            assert ticket.future.result(timeout=0).intersections == pytest.approx(alone.intersections, abs=5)

    def test_a_score_that_is_no_number_stays_with_its_candidate(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode = segmenter.decode

        def spoiled(*arguments: object) -> object:
            decoded = decode(*arguments)
            decoded.scores[0] = np.nan
            return decoded

        monkeypatch.setattr(segmenter, "decode", spoiled)
        (found,) = outcomes(engine, job(0))
        assert np.isnan(found.scores[0])
        assert np.isfinite(found.scores[1:]).all()
        against_it = Job(b"k", scene().image, None, [], prompts_of(scene())[:1], False)
        (ticket,) = batch = tickets(against_it)
        engine.run(batch)
        assert "no finite score for the target" in str(ticket.future.exception(timeout=0))

    def test_out_of_memory_halves_the_batch_once(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = count_encoded(segmenter, monkeypatch)
        too_much = torch.OutOfMemoryError("CUDA out of memory")
        monkeypatch.setattr(segmenter, "embed", failing(segmenter.embed, lambda images: len(images) > 2, too_much))
        found = outcomes(engine, *map(job, range(4)))
        assert sizes == [2, 2]
        assert all(outcome.intersections[0] > 0 for outcome in found)
        assert engine._metrics.registry.get_sample_value("segzero_reward_out_of_memory_total") == 1
        # Half of eight is too much again: no third try.
        batch = tickets(*map(job, range(10, 18)))
        engine.run(batch)
        assert sizes == [2, 2]
        assert all(isinstance(ticket.future.exception(timeout=0), DeviceMemoryError) for ticket in batch)

    def test_out_of_memory_keeps_what_is_done_and_decodes_the_rest_in_smaller_calls(
        self, segmenter: Segmenter, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []
        decode = segmenter.decode

        def recorded(embedding: Embedding, prompts: Sequence[Prompt], prompts_per_call: int) -> object:
            asked.append(prompts_per_call)
            if len(asked) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return decode(embedding, prompts, prompts_per_call)

        monkeypatch.setattr(segmenter, "decode", recorded)
        found = outcomes(engine, job(0), job(1), job(1, 2))
        assert asked == [128, 128, 64, 64]
        assert len(found) == 3
        # Each call is counted once, however often it was run: the third alone found its picture encoded.
        registry = engine._metrics.registry
        assert registry.get_sample_value("segzero_reward_images_encoded_total") == 2
        assert registry.get_sample_value("segzero_reward_cache_hits_total") == 1

    def test_a_dead_device_ends_the_worker_and_everybody_is_told(
        self, segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        queue: Batcher[Job, Outcome] = Batcher(2, 0, 10)
        deaths: list[int] = []
        engine = Engine(segmenter, 2**28, Metrics())
        workers = Workers([engine], queue, Metrics(), lambda: deaths.append(len(queue)))
        workers.start()

        all_wait = threading.Event()

        def dead(*_: object) -> None:
            all_wait.wait()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(segmenter, "embed", dead)
        monkeypatch.setattr(segmenter, "check_alive", dead)
        waiting = [queue.submit(job(0), time.monotonic() + 60) for _ in range(5)]
        all_wait.set()
        for ticket in waiting:
            with pytest.raises(ClosedError, match="the worker of cpu is dead"):
                ticket.future.result(timeout=60)
        assert len(deaths) == 1
        with pytest.raises(ClosedError, match="dead"):
            queue.submit(job(0), time.monotonic() + 60)
        workers.stop(patience_s=10)


class TestCompiled:
    @pytest.mark.slow
    def test_encoders_are_compiled_for_every_size_of_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Past a limit torch goes on without compiling: here one version, in place of eight.

        A backend that makes no code stands in for the one that takes a minute.
        """
        sizes: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
            sizes.append(next(len(value) for value in inputs if value.shape[1:] == (3, 256, 256)))
            return graph.forward

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        engine = Engine(Segmenter.load("toy", "cpu", compiled=True), 0, Metrics())
        torch.compiler.reset()
        with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
            engine.warm_up(2)
            assert set(sizes) == {1, 2}
            compiled = len(sizes)
            engine.segmenter.embed([scene().image] * 2)
        assert len(sizes) == compiled, "what is compiled before it serves is all that is asked for"


class TestDevices:
    def test_that_have_nothing_to_do_hold_no_batch(self, segmenter: Segmenter) -> None:
        """Its pictures and masks may be gigabytes; the watch has looked at it meanwhile."""
        queue: Batcher[Job, Outcome] = Batcher(1, 0, 100)
        engine = Engine(segmenter, 2**28, Metrics())
        workers = Workers([engine], queue, Metrics(), lambda: pytest.fail("a worker died"), max_batch_s=2.0)
        run = engine.run
        engine.run = lambda batch: (time.sleep(0.5), run(batch))  # type: ignore[method-assign]
        workers.start()
        try:
            ticket = queue.submit(job(0), time.monotonic() + 60)
            ticket.future.result(timeout=60)
            held = weakref.ref(ticket)
            del ticket
            deadline = time.monotonic() + 20
            while held() is not None and time.monotonic() < deadline:
                gc.collect()
                time.sleep(0.05)
            assert held() is None
        finally:
            workers.stop(patience_s=10)

    def test_share_the_work_and_find_each_others_pictures(self, segmenter: Segmenter) -> None:
        queue: Batcher[Job, Outcome] = Batcher(1, 0, 100)
        engines = [Engine(Segmenter.load("toy", "cpu"), 2**28, Metrics()) for _ in range(2)]
        workers = Workers(engines, queue, Metrics(), lambda: pytest.fail("a worker died"))
        workers.start()
        try:
            jobs = [job(index) for index in range(12)]
            waiting = [queue.submit(item, time.monotonic() + 60) for item in jobs]
            found = [ticket.future.result(timeout=60) for ticket in waiting]
            expected = outcomes(Engine(segmenter, 2**28, Metrics()), *jobs)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_allclose(ours.intersections, theirs.intersections, atol=5)
            assert all(engine.embeddings.nbytes > 0 for engine in engines)
            assert all(workers.find(item.key) is not None for item in jobs)
            assert workers.find(b"another") is None
        finally:
            workers.stop(patience_s=10)

    def test_tell_the_queue_how_long_they_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Callers who find it full are told to wait longer."""
        segmenter = Segmenter.load("toy", "cpu")
        queue: Batcher[Job, Outcome] = Batcher(1, 0, 1)
        workers = Workers([Engine(segmenter, 0, Metrics())], queue, Metrics(), lambda: pytest.fail("a worker died"))
        workers.start()
        embed = segmenter.embed
        monkeypatch.setattr(segmenter, "embed", lambda images: time.sleep(0.2) or embed(images))

        def hint() -> float:
            until = time.monotonic() + 60
            with queue.reserve(until), pytest.raises(QueueFullError) as full:
                queue.submit(job(0), until)
            return full.value.retry_after_s

        try:
            before = hint()
            # Once the second has been answered, the first has been learnt from.
            for _ in range(2):
                queue.submit(job(0), time.monotonic() + 60).future.result(timeout=60)
            assert hint() > before
        finally:
            workers.stop(patience_s=10)

    def test_warm_up_errors_reach_the_starter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        segmenter = Segmenter.load("toy", "cpu")
        monkeypatch.setattr(segmenter, "embed", failing(segmenter.embed, lambda images: True, ValueError("cold")))
        workers = Workers([Engine(segmenter, 0, Metrics())], Batcher(1, 0, 1), Metrics(), lambda: None)
        with pytest.raises(ValueError, match="cold"):
            workers.start()


def test_embeddings_are_forgotten_by_bytes(segmenter: Segmenter) -> None:
    (embedding,) = segmenter.embed([scene().image])
    kept = Embeddings(max_bytes=2 * embedding.nbytes)
    for _ in range(3):
        kept.put(b"a", embedding)
        assert kept.nbytes == embedding.nbytes
    kept.put(b"b", embedding)
    assert kept.get(b"a") is embedding
    kept.put(b"c", embedding)
    assert kept.get(b"b") is None
    assert kept.get(b"a") is embedding
    assert kept.get(b"c") is embedding
    assert kept.nbytes == 2 * embedding.nbytes
    small = Embeddings(max_bytes=embedding.nbytes - 1)
    small.put(b"a", embedding)
    assert small.get(b"a") is None
