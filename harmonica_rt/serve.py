"""A compiled pipeline behind Ray Serve: prompts in, images out, over HTTP or a handle. Needs the extra ``serve``.

    from harmonica_rt.serve import application
    from ray import serve

    app = application("black-forest-labs/FLUX.1-dev", {"fast": "uniform:3", "good": "mine.safetensors"},
                      sizes=[(1024, 1024)], num_replicas=2, ray_actor_options={"num_gpus": 1})
    serve.run(app)

``curl localhost:8000 -d '{"prompt": "a lighthouse at dusk", "seed": 7, "schedule": "fast"}' -o a.png``. Answers are
200 and a PNG, with its seed in the header ``seed``; 400 and what was expected for a request that cannot be made; 503
and ``Retry-After`` where too many wait; 500 else. All but the first are ``{"error": ...}``.

A request whose caller goes away before its batch takes no place there. One whose worker dies is made by another: the
same image, since a request's seed decides it (`ImageMaker` says how exactly).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .batcher import Batcher, Refused
from .image_maker import LARGEST_SEED, Bucket, ImageMaker

ATTEMPTS = 5  # workers that may die under a request
MANY = 10_000  # requests that the front holds: it only waits, and the replicas' queue is what is limited
RETRY_AFTER = 2  # seconds, told to those who are turned away


class Busy(RuntimeError):
    """More wait than may: try again later."""


def application(
    load: str | Callable[[], Any],
    schedules: Mapping[str, Any],
    *,
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (4,),
    call: Mapping[str, Any] | None = None,
    backend: str = "auto",
    wait: float = 0.05,
    max_queued_requests: int = 128,
    **options: Any,
) -> Any:
    """What ``serve.run`` takes: replicas of the pipeline, and before them what answers requests.

    A replica is there once its plans are, those for `schedules`, `sizes` and `batches` at the settings of `call`.
    Guidance that is switched on or off by a request makes another at its first.

    Args:
        load, schedules, sizes, batches, call, backend: as `ImageMaker` takes them.
        wait: seconds that a request waits for others to share its call. For calls to be full, at least as many requests
            must be under way as replicas times kinds (schedule, size, settings) times the largest of `batches`.
        max_queued_requests: that wait for a replica, beyond four of its batches; others are turned away with 503.
        options: of the replicas, as ``serve.deployment`` takes them: ``num_replicas``, ``ray_actor_options``, ...

    Raises:
        ImportError: Ray is not installed.
    """
    serve = _ray_serve()
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait < float("inf"):
        raise ValueError(f"wait: expected seconds, got {wait!r}")
    options = {"max_ongoing_requests": 4 * max(batches), "max_queued_requests": max_queued_requests, **options}
    replicas = serve.deployment(Denoiser, name="Denoiser", **options)
    made = {"sizes": list(sizes), "batches": list(batches), "call": dict(call or {}), "backend": backend}
    denoiser = replicas.bind(load, dict(schedules), wait, made)
    waits = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": MANY}
    return serve.deployment(Front, name="Front", **waits).bind(denoiser, max_queued_requests)


class Denoiser:
    """A replica: the pipeline, its queues and its counts.

    Metrics, by schedule: gauge ``harmonica_queue`` (requests waiting here), histograms ``harmonica_batch_fill`` (share
    of a batch that was asked for) and ``harmonica_batch_seconds``, counters ``harmonica_images`` (its rate is
    images/s), ``harmonica_plan_hits`` and ``harmonica_plan_misses`` (calls that had to make a plan).
    """

    def __init__(
        self, load: str | Callable[[], Any], schedules: Mapping[str, Any], wait: float, options: Mapping[str, Any]
    ) -> None:
        self.thread = ThreadPoolExecutor(1, "denoiser")  # all calls come from one thread, as the first
        self.maker: ImageMaker = self.thread.submit(_warm, load, schedules, options).result()
        self.batcher = Batcher(self.maker.make, self.thread, self.maker.largest, wait, self._told)
        self.images, self.batches, self.seconds = 0, 0, 0.0
        self._hits = 0
        self._metrics = _Metrics()

    async def generate(self, asked: Mapping[str, Any]) -> np.ndarray:
        """An image, uint8 [height, width, 3], of keyword arguments of `ImageMaker.read`. Raises Refused."""
        try:
            read = self.maker.read(**asked)
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from None
        name = read.bucket.schedule
        image = self.batcher.image(read)
        self._metrics.queue.set(self.batcher.waiting(name), {"schedule": name})
        return await image

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica that raises."""
        self.batcher.check_health()

    def counts(self) -> dict[str, float]:
        """Process, and since its start: images, batches, their seconds, calls by plans, requests cancelled."""
        hits, calls = self.maker.hits, self.maker.calls
        own = {"process": os.getpid(), "images": self.images, "batches": self.batches, "seconds": self.seconds}
        return {**own, "plan_hits": hits, "plan_misses": calls - hits, "cancelled": self.batcher.cancelled}

    def _told(self, bucket: Bucket, count: int, seconds: float) -> None:
        tags, metrics, maker = {"schedule": bucket.schedule}, self._metrics, self.maker
        self.images, self.batches, self.seconds = self.images + count, self.batches + 1, self.seconds + seconds
        hit, self._hits = maker.hits > self._hits, maker.hits
        metrics.queue.set(self.batcher.waiting(bucket.schedule), tags)
        metrics.fill.observe(count / maker.size_for(count), tags)
        metrics.seconds.observe(seconds, tags)
        metrics.images.inc(count, tags)
        (metrics.hits if hit else metrics.misses).inc(1, tags)


class Front:
    """What answers: it reads requests, hands them to the replicas, and again where one dies, and words the errors."""

    def __init__(self, denoiser: Any, queued: int) -> None:
        self.denoiser, self.queued = denoiser, queued

    async def generate(self, **asked: Any) -> np.ndarray:
        """An image, uint8 [height, width, 3], of keyword arguments of `ImageMaker.read`.

        Raises:
            Refused: naming what was expected and what came.
            Busy: too many wait.
        """
        return await self._made(asked)

    async def _made(self, asked: Mapping[str, Any]) -> np.ndarray:
        from ray.exceptions import ObjectLostError, RayActorError
        from ray.serve.exceptions import BackPressureError

        for _ in range(ATTEMPTS):
            response = self.denoiser.generate.remote(asked)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                some = "1 request" if self.queued == 1 else f"{self.queued} requests"
                raise Busy(f"expected at most {some} waiting, got another one: try again in {RETRY_AFTER} s") from None
            except (RayActorError, ObjectLostError) as error:
                died = error
        raise Busy(f"{ATTEMPTS} replicas died under this request: expected one that lives") from died

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse, Response

        def refused(status: int, error: BaseException | str, **headers: str) -> Any:
            text = str(getattr(error, "cause", None) or error)  # Ray's own text of it is a traceback
            return JSONResponse({"error": text}, status, headers)

        if request.method != "POST":
            return refused(405, f"expected POST, got {request.method}", Allow="POST")
        try:
            asked = json.loads(await request.body())
        except (ValueError, RecursionError) as error:  # the last of JSON nested too deeply
            return refused(400, f"expected a JSON object with a prompt: {error}")
        if not isinstance(asked, dict) or "prompt" not in asked:
            return refused(400, f"expected a JSON object with a prompt, got {json.dumps(asked)[:80]}")
        if asked.get("seed") is None:
            asked["seed"] = random.randint(0, LARGEST_SEED)
        try:
            image = await self._made(asked)
        except Busy as error:
            return refused(503, error, **{"Retry-After": str(RETRY_AFTER)})
        except Refused as error:
            return refused(400, error)
        except Exception as error:
            return refused(500, error)
        return Response(await asyncio.to_thread(_png, image), media_type="image/png", headers=_seed(asked))


class _Metrics:
    def __init__(self) -> None:
        from ray.serve import metrics  # ray.util.metrics', with deployment and replica among the tags

        def make(kind: Any, name: str, what: str, **more: Any) -> Any:
            return kind(f"harmonica_{name}", description=what, tag_keys=("schedule",), **more)

        shares, times = [0.25, 0.5, 0.75, 1.0], [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
        self.queue = make(metrics.Gauge, "queue", "Requests that no batch has taken yet")
        self.fill = make(metrics.Histogram, "batch_fill", "Share of a batch that was asked for", boundaries=shares)
        self.seconds = make(metrics.Histogram, "batch_seconds", "Of a batch", boundaries=times)
        self.images = make(metrics.Counter, "images", "Images made")
        self.hits = make(metrics.Counter, "plan_hits", "Calls whose plans were there")
        self.misses = make(metrics.Counter, "plan_misses", "Calls that made a plan")


def _warm(load: str | Callable[[], Any], schedules: Mapping[str, Any], options: Mapping[str, Any]) -> ImageMaker:
    maker = ImageMaker(load, schedules, **options)
    maker.warm_up()
    return maker


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _seed(asked: Mapping[str, Any]) -> dict[str, str]:
    return {"seed": str(asked["seed"])}


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f'expected Ray: pip install "harmonica_rt[serve]"; got {error}') from error
    return serve
