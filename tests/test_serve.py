"""A deployment on a local Ray: what it answers, to whom, and what becomes of requests when replicas die."""

from __future__ import annotations

import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harmonica_rt.image_maker import ImageMaker
from harmonica_rt.serve import application

from .pipelines.folders import text_flux

ray = pytest.importorskip("ray", reason="the extra `serve` is not installed")
serve = pytest.importorskip("ray.serve", reason="the extra `serve` is not installed")

CALL = {"num_inference_steps": 4, "max_sequence_length": 16}
MADE: dict[str, Any] = {"sizes": [(16, 16), (16, 32)], "batches": (2,), "call": CALL, "backend": "eager"}
SCHEDULES = {"fast": "output:2", "good": "full"}
PORT = 18477


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pipeline")
    text_flux().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def deployed(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two replicas, of which one fails at its first start."""
    flag = tmp_path_factory.mktemp("flags") / "failed"

    def load() -> Any:
        from harmonica_rt.generating import load_pipeline

        try:
            flag.touch(exist_ok=False)
        except FileExistsError:
            return load_pipeline(folder)
        raise OSError("the disk is not there yet")

    app = application(load, SCHEDULES, **MADE, wait=0.2, num_replicas=2, ray_actor_options={"num_cpus": 1})
    handle = serve.run(app)
    assert flag.exists()
    return handle


@pytest.fixture(scope="module")
def wanted(folder: str) -> Callable[..., np.ndarray]:
    """The image of a request, made without Ray."""
    from harmonica_rt.generating import load_pipeline

    maker = ImageMaker(lambda: load_pipeline(folder), SCHEDULES, **MADE)
    return lambda **asked: maker.make([maker.read(**asked)])[0]


def post(asked: Any, method: str = "POST", path: str = "") -> tuple[int, dict[str, str], bytes]:
    data = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/{path}", data if method == "POST" else None, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.usefixtures("deployed")
def test_an_image_by_http(wanted: Callable[..., np.ndarray]) -> None:
    asked = {"prompt": "a cat", "seed": 7, "schedule": "good", "width": 32}
    status, headers, body = post(asked)
    assert (status, headers["content-type"], headers["seed"]) == (200, "image/png", "7")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), wanted(**asked))
    status, headers, body = post({"prompt": "a cat"})
    again = wanted(prompt="a cat", seed=int(headers["seed"]))
    assert status == 200 and np.array_equal(np.asarray(Image.open(io.BytesIO(body))), again)


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize(
    ("asked", "status", "error"),
    [
        ({"prompt": "a", "width": 33}, 400, "height, width: expected one of 16x16, 16x32, got 16x33"),
        ({"prompt": "a", "schedule": "x"}, 400, "schedule: expected one of fast, good, got 'x'"),
        ({"prompt": "a", "self": 1}, 400, "multiple values for argument 'self'"),
        ({"seed": 3}, 400, "expected a JSON object with a prompt, got {"),
        (b"prompt=a", 400, "expected a JSON object with a prompt: Expecting value"),
        pytest.param(b"[" * 100_000, 400, "with a prompt: maximum recursion depth exceeded", id="nested"),
    ],
    ids=str,
)
def test_refusals_say_what_was_expected(asked: Any, status: int, error: str) -> None:
    got, _, body = post(asked)
    assert got == status and error in json.loads(body)["error"]
    assert "Traceback" not in json.loads(body)["error"]


@pytest.mark.usefixtures("deployed")
def test_other_methods() -> None:
    assert post({}, method="GET")[0] == 405


def test_nothing_lost_nothing_twice_when_a_replica_dies(deployed: Any, wanted: Callable[..., np.ndarray]) -> None:
    asked = [{"prompt": "a cat", "seed": seed, "schedule": "fast" if seed % 2 else "good"} for seed in range(24)]
    answers = [deployed.generate.remote(**each) for each in asked]
    answers[3].result()
    actors = ray.util.list_named_actors(all_namespaces=True)
    victim = next(a for a in actors if "Denoiser" in a["name"])
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    images = [answer.result(timeout_s=120) for answer in answers]
    assert all(np.array_equal(image, wanted(**each)) for image, each in zip(images, asked))


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """While this file is away, calls of `alone` wait."""
    path = tmp_path_factory.mktemp("gates") / "open"
    path.touch()
    return path


@pytest.fixture(scope="module")
def alone(folder: str, gate: Path) -> Any:
    """One replica that holds four requests, and two others that wait for it."""

    def load() -> Any:
        from harmonica_rt.generating import load_pipeline

        pipeline = load_pipeline(folder)
        encode = pipeline.encode_prompt

        def when_open(*args: Any, **kwargs: Any) -> Any:
            while not gate.exists():
                time.sleep(0.01)
            return encode(*args, **kwargs)

        pipeline.encode_prompt = when_open
        return pipeline

    options = {**MADE, "wait": 0.0, "max_ongoing_requests": 4, "max_queued_requests": 2}
    app = application(load, SCHEDULES, **options, ray_actor_options={"num_cpus": 0})
    handle = serve.run(app, name="alone", route_prefix="/alone")
    handle.generate.remote(prompt="a").result(timeout_s=60)  # the handles of both know their replicas now
    yield handle
    serve.delete("alone")


def test_counts_and_cancellation(alone: Any, gate: Path) -> None:
    """One request's batch runs; of three that wait one is cancelled."""
    replica = serve.get_deployment_handle("Denoiser", "alone")
    before = replica.counts.remote().result()
    gate.unlink()
    answers = []
    for asked in ({"seed": 0}, {"seed": 1}, {"seed": 2}, {"width": 32}):
        answers.append(alone.generate.remote(prompt="a", **asked))
        time.sleep(0.5)  # until the replica has it: the queue has few places
    answers[1].cancel()
    time.sleep(1)
    gate.touch()
    for answer in (answers[0], *answers[2:]):
        assert answer.result(timeout_s=60).dtype == np.uint8
    after = replica.counts.remote().result()
    assert after.pop("seconds") > before["seconds"] and after.pop("process") != os.getpid()
    made = {name: count - before[name] for name, count in after.items()}
    assert made == {"images": 3, "batches": 3, "plan_hits": 3, "plan_misses": 0, "cancelled": 1}


@pytest.mark.usefixtures("alone")
def test_too_many_are_turned_away_in_words(gate: Path) -> None:
    gate.unlink()
    with futures.ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(post, {"prompt": "a", "seed": seed}, path="alone") for seed in range(12)]
        first = next(futures.as_completed(sent)).result()
        gate.touch()
    assert first[0] == 503 and first[1]["retry-after"] == "2"
    wanted = "expected at most 2 requests waiting, got another one: try again in 2 s"
    assert json.loads(first[2])["error"] == wanted
    assert {answer.result()[0] for answer in sent} == {200, 503}


def test_a_pipeline_that_never_loads_says_why(tmp_path: Path) -> None:
    app = application(str(tmp_path), SCHEDULES, max_constructor_retry_count=1, ray_actor_options={"num_cpus": 0})
    with pytest.raises(RuntimeError):
        serve.run(app, name="never", route_prefix="/never")
    told = serve.status().applications["never"].deployments["Denoiser"].message
    assert "expected a folder with model_index.json" in told
    serve.delete("never")


@pytest.mark.parametrize("wait", [-1, True, float("nan")])
def test_what_is_no_wait(wait: Any) -> None:
    with pytest.raises(ValueError, match="wait: expected seconds, got"):
        application("x", SCHEDULES, wait=wait)
