"""Who shares a batch with whom, when it starts, and what becomes of those who went away or cannot be served."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from harmonica_rt.batcher import PATIENCE, Batcher, Refused
from harmonica_rt.image_maker import Asked, Bucket

FAST, GOOD = Bucket("fast", (("height", 16),), False), Bucket("good", (), False)


class Maker:
    """Takes note of its batches; may be held up, so that requests gather."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.free = threading.Event()
        self.free.set()

    def make(self, asked: Sequence[Asked]) -> list[str]:
        self.free.wait(10)
        self.batches.append([each.subject for each in asked])
        for each in asked:
            if each.subject == "unknown":
                raise ValueError("expected a known prompt, got 'unknown'")
            if each.subject == "cursed":
                raise RuntimeError("the device is gone")
        return [f"{each.subject} {each.seed}" for each in asked]


def asked(subject: str, bucket: Bucket = FAST) -> Asked:
    return Asked(bucket, subject, 0)


def run(body: Callable[[Maker, Batcher], Awaitable[None]], wait: float = 0.05) -> Maker:
    maker = Maker()

    async def all_of_it() -> None:
        with ThreadPoolExecutor(1) as thread:
            await asyncio.wait_for(body(maker, Batcher(maker.make, thread, 3, wait)), 20)

    asyncio.run(all_of_it())
    return maker


def test_requests_of_a_bucket_share_batches_of_at_most_the_largest_size() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        subjects = [(name, FAST if name in "abcd" else GOOD) for name in "aebfcgd"]
        images = await asyncio.gather(*(batcher.image(asked(*each)) for each in subjects))
        assert images == [f"{name} 0" for name, _ in subjects], "to each its own"
        assert batcher.waiting("fast") == batcher.waiting("good") == 0

    assert run(body).batches == [["a", "b", "c"], ["e", "f", "g"], ["d"]]


def test_a_batch_that_is_not_full_waits_for_others() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        first = batcher.image(asked("a"))
        await asyncio.sleep(0.1)
        assert maker.batches == [] and batcher.waiting("fast") == 1
        second = batcher.image(asked("b"))
        await asyncio.gather(first, second)

    assert run(body, wait=0.5).batches == [["a", "b"]]


def test_the_one_that_waits_longest_goes_before_a_full_batch() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        maker.free.clear()
        busy = [batcher.image(asked(name)) for name in "abc"]
        await asyncio.sleep(0.02)
        rare = batcher.image(asked("r", GOOD))
        await asyncio.sleep(0.2)
        others = [batcher.image(asked(name)) for name in "def"]
        maker.free.set()
        await asyncio.gather(*busy, rare, *others)

    assert run(body).batches == [["a", "b", "c"], ["r"], ["d", "e", "f"]]


def test_the_cancelled_take_no_place() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        maker.free.clear()
        busy = [batcher.image(asked(name)) for name in "abc"]
        await asyncio.sleep(0.02)
        others = [batcher.image(asked(name)) for name in "dxyef"]
        alone = batcher.image(asked("z", GOOD))
        for cancelled in (*others[1:3], alone, busy[0]):  # the last one's batch runs already
            cancelled.cancel()
        maker.free.set()
        await asyncio.gather(*busy[1:], others[0], *others[3:])
        assert batcher.cancelled == 3

    assert run(body).batches == [["a", "b", "c"], ["d", "e", "f"]]


def test_what_one_request_causes_is_not_the_others() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        made = [batcher.image(asked(name)) for name in ("a", "unknown", "b")]
        results = await asyncio.gather(*made, return_exceptions=True)
        assert results[::2] == ["a 0", "b 0"]
        assert isinstance(results[1], Refused) and "expected a known prompt" in str(results[1])
        batcher.check_health()

    assert run(body).batches == [["a", "unknown", "b"], ["a"], ["unknown"], ["b"]]


def test_a_replica_that_only_fails_is_not_well() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        for _ in range(PATIENCE):
            batcher.check_health()
            with pytest.raises(RuntimeError, match="the device is gone"):
                await batcher.image(asked("cursed"))
        with pytest.raises(RuntimeError, match=f"expected images, got {PATIENCE} batches in a row that failed"):
            batcher.check_health()
        await batcher.image(asked("a"))
        batcher.check_health()

    run(body, wait=0.0)


def test_the_loop_that_makes_batches_must_live() -> None:
    async def body(maker: Maker, batcher: Batcher) -> None:
        batcher.told = lambda *told: 1 / 0
        batcher.image(asked("a"))
        while not batcher._loop.done():
            await asyncio.sleep(0.01)
        with pytest.raises(RuntimeError, match=r"expected batches to be made, got an end of it: .*ZeroDivisionError"):
            batcher.check_health()

    run(body, wait=0.0)
