"""Requests that may share a call wait for one another; one batch runs at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .image_maker import Asked, Bucket

PATIENCE = 3  # batches that fail in a row, for no fault of the requests', before the whole counts as broken


class Refused(ValueError):
    """What was asked for cannot be made: whoever asked can mend it."""


@dataclass
class _Waiting:
    asked: Asked
    since: float
    image: asyncio.Future[Any]


class Batcher:
    """Gathers requests by bucket; the bucket whose first request has waited longest goes first.

    A batch starts once it is full or its first request has waited `wait`. Serve's own ``@serve.batch`` knows no
    buckets: it would mix requests that cannot share a call.

    Args:
        make: images of at most `largest` requests of one bucket; called in `thread`.
        thread: of one worker, since a compiled model serves one call at a time.
        wait: seconds.
        told: called after each batch with its bucket, how many took part and the seconds.

    Attributes:
        cancelled: requests whose callers went away before their batch: they took no place in one.
        failures: batches in a row that failed for no fault of the requests.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Asked]], Sequence[Any]],
        thread: ThreadPoolExecutor,
        largest: int,
        wait: float,
        told: Callable[[Bucket, int, float], object] = lambda bucket, count, seconds: None,
    ) -> None:
        self.make, self.thread, self.largest, self.wait, self.told = make, thread, largest, wait, told
        self.cancelled = self.failures = 0
        self._queues: dict[Bucket, deque[_Waiting]] = {}
        self._came = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def image(self, asked: Asked) -> asyncio.Future[Any]:
        """What `make` returns for it; in a running event loop. Cancelled, it takes no place in a batch.

        Raises (when awaited):
            Refused: the call does not take it.
        """
        if self._loop is None:
            self._loop = asyncio.create_task(self._serve())
        loop = asyncio.get_running_loop()
        waiting = _Waiting(asked, loop.time(), loop.create_future())
        self._queues.setdefault(asked.bucket, deque()).append(waiting)
        self._came.set()
        return waiting.image

    def waiting(self, schedule: str) -> int:
        """Requests for `schedule` that no batch has taken yet."""
        return sum(len(queue) for bucket, queue in self._queues.items() if bucket.schedule == schedule)

    def check_health(self) -> None:
        """Raises RuntimeError: batches fail, or none is made any more."""
        if self._loop is not None and self._loop.done():
            raise RuntimeError(f"expected batches to be made, got an end of it: {self._loop}")
        if self.failures >= PATIENCE:
            raise RuntimeError(f"expected images, got {self.failures} batches in a row that failed")

    async def _serve(self) -> None:
        while True:
            bucket, left = self._next()
            if bucket is None or left > 0:
                self._came.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._came.wait(), None if bucket is None else left)
                continue
            queue = self._queues[bucket]
            taken = [queue.popleft() for _ in range(min(self.largest, len(queue)))]
            if not queue:
                del self._queues[bucket]
            await self._run(taken)

    def _next(self) -> tuple[Bucket | None, float]:
        """The bucket to go next, and the seconds until it may."""
        now, best, soonest = asyncio.get_running_loop().time(), None, 0.0
        for bucket, queue in [*self._queues.items()]:
            kept = [waiting for waiting in queue if not waiting.image.cancelled()]
            self.cancelled += len(queue) - len(kept)
            if not kept:
                del self._queues[bucket]
                continue
            self._queues[bucket] = deque(kept)
            full = len(kept) >= self.largest
            left = min(0.0, kept[0].since - now) if full else kept[0].since + self.wait - now
            if best is None or left < soonest:
                best, soonest = bucket, left
        return best, soonest

    async def _run(self, taken: list[_Waiting]) -> None:
        loop, bucket = asyncio.get_running_loop(), taken[0].asked.bucket
        began = loop.time()
        try:
            images = await loop.run_in_executor(self.thread, self.make, [each.asked for each in taken])
        except Exception as error:
            if len(taken) > 1:  # each alone: what one of them has caused is not the others'
                for each in taken:
                    await self._run([each])
                return
            theirs = isinstance(error, (TypeError, ValueError))
            self.failures += not theirs
            if not taken[0].image.done():
                taken[0].image.set_exception(Refused(str(error)) if theirs else error)
            return
        self.failures = 0
        self.told(bucket, len(taken), loop.time() - began)
        for each, image in zip(taken, images):
            if not each.image.done():
                each.image.set_result(image)
