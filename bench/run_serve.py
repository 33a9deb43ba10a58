"""Serving a reference model by Ray Serve on this machine: what is lost or made twice, and how fast it is.

    python bench/run_serve.py --requests 500 --at-once 32 --out out/serve.json

Requests go over HTTP, so many at a time, to two replicas, of which one fails at its first start and one is killed in
the middle; every 25th asks for a size that is not served. Each answer must be the image that a plain process makes of
the request, bit for bit: all batches have one size. Then again to two replicas, and to one, with nothing amiss. Beside
them stand one and two plain processes that make the same images from full batches, without anybody asking. Loading and
warming up are not timed.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import hashlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: find the package beside this folder

import numpy as np
from PIL import Image

from bench.arguments import positive
from bench.models.reference import REFERENCES, TRAINED, load_pipeline
from harmonica_rt.image_maker import ImageMaker
from harmonica_rt.serve import application

ROOT = Path(__file__).resolve().parent.parent
PORT, METRICS = 18470, 18471
WRONG = 25  # every so many requests ask for a size that is not served


def request(number: int, known: Sequence[Any]) -> dict[str, Any]:
    return {"prompt": known[number % len(known)], "seed": number, "schedule": ("fast", "good")[number // 8 % 2]}


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


class Load:
    """Loads a reference model; the first of all that try to fails where there is a `flag`."""

    def __init__(self, model: str, flag: Path | None = None) -> None:
        self.model, self.flag = model, flag

    def __call__(self) -> Any:
        if self.flag is not None:
            try:
                self.flag.touch(exist_ok=False)
                raise OSError("a replica that fails to start")
            except FileExistsError:
                pass
        return load_pipeline(self.model)


# ---- plain processes


def plainly(load: Load, schedules: dict[str, str], made: dict[str, Any], numbers: list[int], start: Any) -> Any:
    """Images' digests by number, and when the first was begun and the last was done."""
    maker = ImageMaker(load, schedules, **made)
    maker.warm_up()
    known = load_pipeline(load.model).known
    start.wait()
    began, images = time.time(), {}
    by_bucket = collections.defaultdict(list)
    for number in numbers:
        by_bucket[(asked := maker.read(**request(number, known))).bucket].append((number, asked))
    for some in by_bucket.values():
        for first in range(0, len(some), maker.largest):
            batch = some[first : first + maker.largest]
            results = maker.make([asked for _, asked in batch])
            images |= {number: digest(image) for (number, _), image in zip(batch, results)}
    return images, began, time.time()


def _process(queue: Any, *work: Any) -> None:
    queue.put(plainly(*work))


def processes(count: int, requests: int, *work: Any) -> tuple[dict[int, str], float]:
    """The images of all requests by so many processes, and images/s."""
    spawn = multiprocessing.get_context("spawn")
    queue, start = spawn.Queue(), spawn.Barrier(count)
    shares = [list(range(requests))[rank::count] for rank in range(count)]
    workers = [spawn.Process(target=_process, args=(queue, *work, share, start)) for share in shares]
    for worker in workers:
        worker.start()
    results = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    images = {number: image for result in results for number, image in result[0].items()}
    return images, requests / (max(r[2] for r in results) - min(r[1] for r in results))


# ---- serving


def ask(asked: dict[str, Any]) -> tuple[int, Any]:
    """Status, and the image's digest or the error."""
    post = urllib.request.Request(f"http://127.0.0.1:{PORT}/", json.dumps(asked).encode())
    try:
        with urllib.request.urlopen(post, timeout=300) as answer:
            return answer.status, digest(np.asarray(Image.open(io.BytesIO(answer.read()))))
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def kill_a_replica() -> None:
    import ray

    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if "Denoiser" in a["name"]]
    ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]))


def served(requests: int, at_once: int, known: Sequence[Any], images: dict[int, str], kill: bool) -> dict[str, Any]:
    """Ask for all images, and judge the answers."""
    done, lock, latencies, turned_away = 0, threading.Lock(), [], 0

    def one(number: int) -> tuple[int, int, Any]:
        nonlocal done, turned_away
        asked = request(number, known)
        wrong = kill and number % WRONG == WRONG - 1
        began = time.perf_counter()
        while (answer := ask({**asked, "height": 17} if wrong else asked))[0] == 503:
            with lock:
                turned_away += 1
            time.sleep(1)
        with lock:
            done += 1
            latencies.append(time.perf_counter() - began)
            middle = done == requests // 2
        if kill and middle:
            kill_a_replica()
        return (number, *answer)

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(one, range(requests)))
    seconds = time.perf_counter() - began
    wrong = [answer for answer in answers if kill and answer[0] % WRONG == WRONG - 1]
    right = [answer for answer in answers if answer not in wrong]
    return {
        "requests": requests,
        "right image": sum(status == 200 and images[number] == image for number, status, image in right),
        "other image": sum(status == 200 and images[number] != image for number, status, image in right),
        "failed": [answer for answer in right if answer[1] != 200],
        "refused, as it must be": sum(s == 400 and "height, width: expected none" in text for _, s, text in wrong),
        "wrongly served": sum(status != 400 for _, status, _ in wrong),
        "turned away and come again": turned_away,
        "images/s": len(right) / seconds,
        "seconds, median and most": [float(np.median(latencies)), max(latencies)],
    }


def wait_for(replicas: int) -> None:
    """Until so many run, and no other."""
    from ray import serve

    while serve.status().applications["default"].deployments["Denoiser"].replica_states != {"RUNNING": replicas}:
        time.sleep(0.5)


def counts(replicas: int) -> dict[str, float]:
    """Of all replicas together, by asking until each has answered."""
    from ray import serve

    handle, found = serve.get_deployment_handle("Denoiser", "default"), {}
    for _ in range(200):
        one = handle.counts.remote().result()
        found[one["process"]] = one
        if len(found) == replicas:
            break
    return {key: sum(one[key] for one in found.values()) for key in next(iter(found.values())) if key != "process"}


def metrics() -> list[str]:
    """Names of ours that Ray exports for Prometheus."""
    for _ in range(15):
        with urllib.request.urlopen(f"http://127.0.0.1:{METRICS}/", timeout=10) as page:
            lines = page.read().decode().splitlines()
        if found := sorted({line.split("{")[0] for line in lines if "harmonica_" in line and line[0] != "#"}):
            return found
        time.sleep(1)
    return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=TRAINED, default="dit-fashion")
    parser.add_argument("--requests", type=positive, default=500)
    parser.add_argument("--at-once", type=positive, default=32)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--batch", type=positive, default=4, help="images a call")
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the plain processes have; Ray gives its workers 15
    import ray
    from ray import serve

    requests, batch = arguments.requests, arguments.batch
    schedules = {"fast": "uniform:3", "good": "uniform:2"}
    call = {"num_inference_steps": arguments.steps, "guidance_scale": REFERENCES[arguments.model].guidance}
    made = {"batches": [batch], "call": call, "backend": arguments.backend}
    known, result = load_pipeline(arguments.model).known, {"model": arguments.model, **made, "schedules": schedules}
    result["at once"], result["cores"] = arguments.at_once, len(os.sched_getaffinity(0))

    def told(name: str, what: Any) -> None:
        result[name] = what
        print(name, json.dumps(what), flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    plain = (Load(arguments.model), schedules, made)
    images, rate = processes(1, requests, *plain)
    told("1 process, images/s", rate)
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    memory = {"object_store_memory": 200 * 2**20, "_metrics_export_port": METRICS}
    ray.init(num_cpus=2, **memory, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        with tempfile.TemporaryDirectory() as folder:
            load, began = Load(arguments.model, Path(folder) / "failed"), time.perf_counter()
            serve.run(application(load, schedules, **made, num_replicas=2))
            told("start", {"seconds": time.perf_counter() - began, "one failed first": load.flag.exists()})
            told("2 replicas, one killed", served(requests, arguments.at_once, known, images, kill=True))
            for replicas in (2, 1):
                if replicas == 1:  # two are there again without our doing
                    serve.run(application(load, schedules, **made, num_replicas=replicas))
                wait_for(replicas)
                before = counts(replicas)
                told(f"{replicas} replicas", served(requests, arguments.at_once, known, images, kill=False))
                after = counts(replicas)
                told(f"{replicas} replicas, counts", {name: count - before[name] for name, count in after.items()})
            told("metrics", metrics())
    finally:
        serve.shutdown()
        ray.shutdown()
    again, rate = processes(2, requests, *plain)
    told("2 processes, images/s", rate)
    told("alike in both", again == images and len(images) == requests)
    killed = result["2 replicas, one killed"]
    refused = requests // WRONG
    whole = killed["right image"] == requests - refused and killed["refused, as it must be"] == refused
    return 0 if whole and all(result[f"{n} replicas"]["right image"] == requests for n in (1, 2)) else 1


if __name__ == "__main__":
    sys.exit(main())
