"""The queue: bounded, in order, in batches; nobody is served who no longer waits."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.batcher import Batcher, ClosedError, QueueFullError, Ticket, TooLateError


def later(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def items(batch: list[Ticket[int, int]]) -> list[int]:
    return [ticket.item for ticket in batch]


def test_batches_are_full_and_in_order() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=3, max_delay_s=0, max_waiting=10)
    for item in range(7):
        queue.submit(item, later())
    assert len(queue) == 7
    assert [items(queue.take()) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(queue) == 0


def test_the_first_waits_for_others_but_not_for_long() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=30, max_waiting=10)
    queue.submit(1, later())
    second = threading.Timer(0.2, lambda: queue.submit(2, later()))
    second.start()
    assert items(queue.take()) == [1, 2]
    second.join()
    impatient: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=0.1, max_waiting=10)
    ticket = impatient.submit(1, later())
    assert items(impatient.take()) == [1]
    # What the wait lasted at least is the promise; how long at most is the machine's business.
    assert ticket.taken - ticket.enqueued >= 0.1
    assert ticket.batch == 1


def test_a_full_queue_refuses_and_says_how_long() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=0, max_waiting=4)
    for item in range(4):
        queue.submit(item, later())
    with pytest.raises(QueueFullError, match="4 requests are waiting") as first:
        queue.submit(4, later())
    queue.finished(queue.take(), seconds=20.0)
    for item in range(2):
        queue.submit(item, later())
    with pytest.raises(QueueFullError) as second:
        queue.submit(4, later())
    # Batches that take long make those who wait, wait longer.
    assert 0 < first.value.retry_after_s < second.value.retry_after_s


def test_how_long_to_wait_is_by_the_item() -> None:
    """Two that took twice as long as one say the same."""
    hints = []
    for size in (1, 2):
        queue: Batcher[int, int] = Batcher(max_batch=size, max_delay_s=0, max_waiting=2)
        for item in range(size):
            queue.submit(item, later())
        queue.finished(queue.take(), seconds=float(size))
        for item in range(2):
            queue.submit(item, later())
        with pytest.raises(QueueFullError) as full:
            queue.submit(2, later())
        hints.append(full.value.retry_after_s)
    assert hints[0] == hints[1]


def test_an_item_that_is_being_prepared_has_a_place() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=0, max_waiting=2)
    queue.submit(0, later())
    with queue.reserve(later()):
        assert len(queue) == 2
        with pytest.raises(QueueFullError, match="2 requests are waiting"), queue.reserve(later()):
            pytest.fail("there is no room to prepare for")
        with pytest.raises(QueueFullError):
            queue.submit(2, later())
        queue.submit(1, later(), reserved=True)
    assert len(queue) == 2
    assert items(queue.take()) == [0, 1]
    with pytest.raises(ZeroDivisionError), queue.reserve(later()):
        raise ZeroDivisionError
    assert len(queue) == 0, "who cannot prepare gives the place back"
    with pytest.raises(TooLateError), queue.reserve(later(-1)):
        pytest.fail("it is too late")
    queue.close("stopping")
    with pytest.raises(ClosedError), queue.reserve(later()):
        pytest.fail("the queue is closed")


def test_room_is_made_by_who_has_gone() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=8, max_delay_s=0, max_waiting=3)
    gone, late, stays = queue.submit(0, later()), queue.submit(1, later(0.01)), queue.submit(2, later())
    gone.future.cancel()
    time.sleep(0.02)
    for item in (3, 4):
        queue.submit(item, later())
    with pytest.raises(QueueFullError):
        queue.submit(5, later())
    assert items(queue.take()) == [2, 3, 4]
    assert not stays.future.done()
    assert isinstance(late.future.exception(timeout=0), TooLateError)


def test_who_no_longer_waits_is_not_served() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=8, max_delay_s=0, max_waiting=8)
    tickets = [queue.submit(item, later(0.01 if item == 1 else 60)) for item in range(4)]
    assert tickets[2].future.cancel()
    time.sleep(0.02)
    assert items(queue.take()) == [0, 3]
    assert isinstance(tickets[1].future.exception(timeout=0), TooLateError)
    with pytest.raises(CancelledError):
        tickets[2].future.result(timeout=0)
    # Once a device has it, it is too late to cancel.
    assert not tickets[0].future.cancel()
    with pytest.raises(TooLateError):
        queue.submit(9, later(-1))


def test_closing_hands_out_the_rest_or_drops_it() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=60, max_waiting=8)
    queue.submit(0, later())
    queue.close("the end")
    assert items(queue.take()) == [0]
    assert queue.take() == []
    with pytest.raises(ClosedError, match="the end"):
        queue.submit(1, later())
    dropping: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=60, max_waiting=8)
    ticket = dropping.submit(0, later())
    dropping.close("dead", drop=True)
    assert dropping.take() == []
    with pytest.raises(ClosedError, match="dead"):
        ticket.future.result(timeout=0)


def test_closing_wakes_every_waiting_thread() -> None:
    queue: Batcher[int, int] = Batcher(max_batch=2, max_delay_s=60, max_waiting=8)
    taken: list[list[Ticket[int, int]]] = []
    threads = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(3)]
    for thread in threads:
        thread.start()
    queue.close("the end")
    for thread in threads:
        thread.join(timeout=30)
    assert taken == [[], [], []]


@settings(max_examples=30)
@given(
    max_batch=st.integers(1, 5),
    devices=st.integers(1, 3),
    callers=st.integers(1, 4),
    each=st.integers(1, 30),
    delay_ms=st.sampled_from([0, 1]),
)
def test_threads_lose_double_and_cross_nothing(
    max_batch: int, devices: int, callers: int, each: int, delay_ms: int
) -> None:
    queue: Batcher[int, int] = Batcher(max_batch, delay_ms / 1000, max_waiting=callers * each)
    seen: list[int] = []
    sizes: list[int] = []

    def device() -> None:
        while batch := queue.take():
            sizes.append(len(batch))
            for ticket in batch:
                seen.append(ticket.item)
                ticket.future.set_result(-ticket.item)

    def caller(first: int) -> None:
        tickets = [queue.submit(first + i, later()) for i in range(each)]
        answers.extend((ticket.item, ticket.future.result(timeout=60)) for ticket in tickets)

    answers: list[tuple[int, int]] = []
    workers = [threading.Thread(target=device) for _ in range(devices)]
    clients = [threading.Thread(target=caller, args=(1000 * n,)) for n in range(callers)]
    for thread in (*workers, *clients):
        thread.start()
    for thread in clients:
        thread.join(timeout=60)
    queue.close("the end")
    for thread in workers:
        thread.join(timeout=60)
    expected = sorted(1000 * n + i for n in range(callers) for i in range(each))
    assert sorted(seen) == expected
    assert sorted(answers) == [(item, -item) for item in expected]
    assert max(sizes) <= max_batch
