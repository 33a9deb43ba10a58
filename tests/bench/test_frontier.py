"""The frontier: candidates and what they are called, who is best at a budget, sets, and a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import harmonica_rt as hrt
from bench import run_frontier
from bench.compare import candidates, frontier_page
from bench.compare.candidates import EAGER, FULL, LEARNED, OURS, PEER, PLAIN, UNLEARNED, WHOLE, Candidate
from bench.compare.frontier import COSTS, MEASURE, SCREEN, TIMES, Frontier, known
from bench.compare.frontier_best import AXES, best, verdict
from bench.compare.frontier_runs import Job, Runner
from bench.compare.sets import Sets
from bench.compare.store import Store
from bench.measure.judges import NearestGlyph
from bench.measure.precision_recall import inside, precision_recall
from bench.models import samplers
from bench.models.reference import load_pipeline, noise
from bench.models.sampling import Sampling
from bench.models.schedule_specs import parse_schedule
from bench.peers import PEERS
from harmonica_rt.measuring import Timing

JOB = Job("dit-fashion", steps=4, count=2, screen=2, batch=1, rounds=1)
OWN = Candidate("ddim", "leading", 4)
TIMED = dict(zip(TIMES, (0.5, 0.4, 0.6, 7.0)))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(JOB, torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(3)), 2)


def row(name: str, latency: float, family: str = PLAIN, **columns: Any) -> dict[str, Any]:
    return {"name": name, "family": family, "latency": latency, "stage": MEASURE, "error": None, **columns}


# ---- samplers


@pytest.mark.parametrize("sampler", [*samplers.NOISE, *samplers.FLOW])
def test_every_spacing_of_a_sampler_is_another_run(sampler: str) -> None:
    pipeline = load_pipeline("flux-emoji" if sampler in samplers.FLOW else "dit-fashion")
    config, found = pipeline.scheduler.config, {}
    for spacing in samplers.spacings(sampler):
        pipeline.scheduler = samplers.scheduler(sampler, spacing, config)
        found[spacing] = tuple(pipeline.timesteps(6))
        assert len(found[spacing]) == 6
        assert list(found[spacing]) == sorted(found[spacing], reverse=True)
    assert len(found) >= 3
    if sampler not in ("dpmsolver++", "unipc", "sa-solver"):  # theirs of linspace and of trailing are nearly the same
        assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("sampler", list(samplers.FLOW))
def test_fluxs_own_call_takes_samplers_of_flow_matching_at_the_shift_they_were_given(sampler: str) -> None:
    pipeline = load_pipeline("flux-emoji")
    start = noise(pipeline, 1, 5)
    for spacing, second in (("shift 1", 2 / 3), ("shift 3", 6 / 7)):  # of three steps; s -> 3 s / (1 + 2 s)
        pipeline.scheduler = samplers.scheduler(sampler, spacing, {})
        images = pipeline(pipeline.examples(1), 1.0, num_inference_steps=3, latents=start, output_type="latent").images
        called = pipeline.scheduler.timesteps.tolist()
        assert torch.isfinite(images).all()
        assert called == pipeline.timesteps(3)
        assert called[1] == pytest.approx(1000 * second, abs=2)  # rounded to integers


def test_the_peer_of_other_samplers_runs_on_flux() -> None:
    pipeline = load_pipeline("flux-emoji")
    own = PEERS["samplers"].prepare(pipeline.around(pipeline.transformer), "unipc 2", 4)
    start = noise(pipeline, 1, 5)
    images = own(own.examples(1), 1.0, num_inference_steps=own.steps, latents=start, output_type="latent").images
    assert own.scheduler.timesteps.tolist() == own.timesteps(2)
    assert torch.isfinite(images).all()


def test_what_a_sampler_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="leading, trailing, linspace for ddim, got 'karras'"):
        samplers.scheduler("ddim", "karras", {})
    with pytest.raises(ValueError, match=r"expected one of ddim,.*got 'heun'"):
        samplers.scheduler("heun", "leading", {})


@pytest.mark.parametrize("base", [("ddim", "trailing"), ("unipc", "karras"), ("euler", "leading")])
def test_the_spacing_of_a_schedule_is_found_by_its_timesteps_whatever_its_steps(base: tuple[str, str]) -> None:
    pipeline = load_pipeline("dit-fashion")
    config = pipeline.scheduler.config
    pipeline.scheduler = samplers.scheduler(*base, config)
    kind = type(pipeline.scheduler).__name__
    schedule = hrt.Schedule.uniform(pipeline.transformer, 60, 6, sampler=kind, timesteps=pipeline.timesteps(60))

    def timesteps(scheduler: object, steps: int) -> list[float]:
        pipeline.scheduler = scheduler
        return pipeline.timesteps(steps)

    assert samplers.of_schedule(schedule, config, "ddim", timesteps) == base
    other = schedule.replace(timesteps=tuple(np.linspace(990.0, 3.0, 60)))
    with pytest.raises(ValueError, match=r"expected the timesteps of one of ddim, .* in 60 steps, got"):
        samplers.of_schedule(other, config, "ddim", timesteps)


# ---- candidates


def test_candidates_are_known_by_what_they_are() -> None:
    shipped = Candidate("ddim", "leading", 20, OURS, "bench/schedules/dit-fashion-ddim20-2x.json", "1a2b")
    peer = Candidate("unipc", "karras", 20, "taylorseer", "order 1, interval 2")
    found = {c.name: (c.family, c.reuses) for c in (OWN, OWN.on(WHOLE), OWN.on(OURS, FULL), shipped, peer)}
    assert found == {
        "ddim leading 4": (PLAIN, False),
        "ddim leading 4, torch.compile": (PLAIN, False),
        "ddim leading 4, full": (UNLEARNED, False),
        "ddim leading 20, dit-fashion-ddim20-2x #1a2b": (LEARNED, True),
        "unipc karras 20, TaylorSeer (diffusers): order 1, interval 2": (PEER, True),
    }
    assert candidates.compiled(peer).by == "taylorseer-compiled"
    assert candidates.compiled(shipped) is None


def test_every_setting_that_tuning_looks_at_comes_once_and_each_peer_early() -> None:
    bases = [("ddim", "leading"), ("unipc", "karras")]
    found = list(candidates.tuned(bases))
    there = [name for name in candidates.TUNING if not PEERS[name].missing]
    assert len(found) == len(set(found)) == 2 * sum(len(candidates.TUNING[name]) for name in there)
    assert {each.by for each in found[: len(there)]} == set(there)


@pytest.mark.parametrize("steps", list(candidates.REUSED_STEPS))
def test_uniform_candidates_are_schedules_of_the_steps_they_say(steps: int) -> None:
    pipeline = load_pipeline("dit-fashion")
    found = list(candidates.unlearned([("ddim", "leading")], steps, candidates.FIRST_SPECS))
    assert len({each.name for each in found}) == len(found) >= 6
    for each in found:
        schedule = parse_schedule(each.setting, pipeline, each.steps)
        assert schedule.steps == steps
        assert 0.25 < schedule.cur < 1


def test_schedule_files_join_with_the_steps_they_have(tmp_path: Path) -> None:
    pipeline = load_pipeline("dit-fashion")
    long = hrt.Schedule.uniform(
        pipeline.transformer, 60, 6, level="blocks", sampler="DDIMScheduler", timesteps=pipeline.timesteps(60)
    )
    long.save(tmp_path / "long.json")
    (tmp_path / "broken.json").write_text("{}")
    found, refused = candidates.learned("dit-fashion", pipeline, [tmp_path / "long.json", tmp_path / "broken.json"])
    assert found[-1] == Candidate("ddim", "leading", 60, OURS, str(tmp_path / "long.json"), found[-1].digest)
    assert "bench/schedules/dit-fashion-ddim20-2x.json" in {each.setting for each in found}  # no machine's path
    assert all(hrt.Schedule.load(each.file).steps == each.steps for each in found)
    before = {each.name for each in found}
    long.replace(note="learned anew").save(tmp_path / "long.json")
    again, _ = candidates.learned("dit-fashion", pipeline, [tmp_path / "long.json"])
    assert again[-1].name not in before
    assert len(refused) == 1
    assert "broken.json" in refused[0]


def test_two_files_that_are_learned_together_are_one_candidate(tmp_path: Path) -> None:
    pipeline = load_pipeline("flux-emoji")
    own = {"cond": "output:2:1", "uncond": "output:3:1"}
    schedules = {context: parse_schedule(spec, pipeline, 6) for context, spec in own.items()}
    for context, schedule in schedules.items():
        schedule.save(tmp_path / f"both-{context}.json")
    (one,) = set(candidates.learned("flux-emoji", pipeline, tmp_path.iterdir())[0]) - set(
        candidates.learned("flux-emoji", pipeline)[0]
    )
    assert one.schedule(pipeline) == schedules and one.learned and one.name.endswith(f"both-cond #{one.digest}")
    schedules["cond"].save(tmp_path / "both-uncond.json")
    (other,) = candidates.learned("flux-emoji", pipeline, [tmp_path / "both-cond.json"])[0][-1:]
    assert other.digest != one.digest


def test_a_schedule_with_times_of_its_own_is_run_at_them_and_compared_with_the_reference(tmp_path: Path) -> None:
    runner = Runner(Job("flux-emoji", steps=4, count=1), noise(load_pipeline("flux-emoji"), 1, 3))
    own = parse_schedule("output:2:1", runner.pipeline, 4).replace(timesteps=(1000.0, 800.0, 500.0, 200.0))
    own.save(tmp_path / "times.json")
    (one,) = candidates.learned("flux-emoji", runner.pipeline, [tmp_path / "times.json"])[0][-1:]
    assert (one.sampler, one.spacing) == ("flow-euler", samplers.OWN_SIGMAS)
    assert one.plain == runner.reference == Candidate("flow-euler", "shift 1", 4)
    with runner.prepared(one) as prepared:
        images = runner.sample(prepared, runner.start, 4)
        assert np.allclose(prepared.pipeline.scheduler.timesteps, own.timesteps)
    assert torch.equal(runner.wanted(one), runner.plain(runner.reference))
    assert not torch.allclose(images, runner.wanted(one), atol=1e-3)


# ---- what images are compared with


def test_reuse_in_a_short_run_is_compared_with_the_reference_run(runner: Runner) -> None:
    reference = runner.plain(OWN)
    long = Candidate("unipc", "linspace", 5)
    assert torch.equal(runner.wanted(long), reference)
    assert torch.equal(runner.wanted(OWN.on(OURS, "branches:2:1")), reference)
    assert torch.equal(runner.wanted(long.on(OURS, "branches:2:1")), runner.plain(long))
    assert torch.equal(runner.wanted(Candidate("unipc", "linspace", 3, OURS, "branches:2:1")), reference)
    assert not torch.equal(runner.plain(long), reference)


def test_runs_without_reuse_are_the_samplers_own(runner: Runner) -> None:
    with runner.prepared(OWN) as own:
        expected = runner.sample(own, runner.start, 4)
    assert torch.allclose(runner.plain(OWN), expected, atol=1e-4)


def test_a_sampler_that_draws_noise_draws_the_same_each_time(runner: Runner) -> None:
    drawing = Candidate("sa-solver", "linspace", 5)
    before = torch.get_rng_state()
    first, again = (runner.images(drawing, runner.start) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


# ---- who is best


def test_the_best_is_at_least_so_fast_within_two_percent() -> None:
    rows = [row("fast", 0.4, psnr=30.0), row("just", 0.51, psnr=33.0), row("slow", 0.511, psnr=40.0)]
    rows += [row("other", 0.2, psnr=30.0), row("unjudged", 0.1)]
    assert [r["name"] for r in best(rows, "psnr", 2, 9)] == ["just", "other", "fast"]  # of equals the faster
    assert best(rows, "psnr", 6) == []


def test_a_lower_distance_is_better() -> None:
    rows = [row("near", 0.5, frechet=4.1), row("far", 0.5, frechet=4.2)]
    assert best(rows, "frechet", 2)[0]["name"] == "near"
    assert AXES["frechet"].better(4.1, 4.2) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ours", "other", "words"),
    [
        (31.0, 30.0, "ahead, +1.0"),
        (29.0, 30.0, "behind, -1.0"),
        (30.4, 30.0, "within spread, +0.4"),
        (29.6, 30.0, "within spread, -0.4"),
    ],
)
def test_verdicts_know_both_spreads(ours: float, other: float, words: str) -> None:
    rows = (row("ours", 0.5, psnr=ours, psnr_spread=0.4), row("other", 0.5, psnr=other, psnr_spread=0.3))
    assert verdict(*rows, "psnr") == words


def test_the_table_says_who_is_ahead_and_the_plot_is_drawn(tmp_path: Path) -> None:
    rows = [
        row("plain 10", 0.5, converged=31.0, converged_spread=0.1),
        row("peer", 0.5, PEER, converged=32.0, converged_spread=0.1),
        row("mine", 0.45, UNLEARNED, converged=33.0, converged_spread=0.1),
        row("mine, learned", 0.2, LEARNED, converged=30.0, converged_spread=0.1),
    ]
    lines = frontier_page.table(rows, "converged").splitlines()
    assert "**33.0 ± 0.1**, 2.22x: mine |" in lines[3]
    assert lines[3].endswith("| ahead, +1.0 |")
    assert lines[-1].endswith("| ours alone |")  # 5x
    frontier_page.plot(rows, "converged", "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_failures_are_counted_by_peer_and_reason(tmp_path: Path) -> None:
    store = Store(tmp_path / "frontier-dit-fashion.jsonl", JOB, "the command", key=("stage", "name"))
    for setting in ("0.1", "0.2"):
        failed = Candidate("ddim", "leading", 4, "smooth-cache", setting)
        store.add({"stage": SCREEN, **known(failed), "error": "ValueError: no", "seconds": 1.0})
    frontier_page.write([tmp_path / "frontier-dit-fashion.jsonl"], tmp_path / "FRONTIER.md")
    page = (tmp_path / "FRONTIER.md").read_text()
    assert "* SmoothCache on ddim leading 4, 2 of its runs: ValueError: no\n" in page


def test_sets_of_different_sizes_are_not_compared() -> None:
    measured = [row("a", 0.5), row("b", 0.4)]
    sets = [{**row("a", 0.5, frechet=5.0), "stage": "sets 100"}, {**row("b", 0.4, frechet=4.0), "stage": "sets 100"}]
    sets.append({**row("a", 0.5, frechet=3.0), "stage": "sets 1000"})
    found = frontier_page.merged([*measured, *sets])
    assert {r["name"]: r["frechet"] for r in found} == {"a": 3.0, "b": 4.0}
    assert [r["name"] for r in frontier_page.comparable(found, "frechet")] == ["a"]


# ---- sets


def test_precision_and_recall_are_what_their_definition_says() -> None:
    draw = torch.Generator().manual_seed(1)
    generated, real = torch.randn(40, 3, generator=draw), 1.3 * torch.randn(60, 3, generator=draw) + 0.4

    def share(points: np.ndarray, others: np.ndarray, k: int) -> float:
        count = 0
        for point in points:
            for other in others:
                radius = sorted(np.linalg.norm(others - other, axis=1))[k]
                if np.linalg.norm(point - other) <= radius:
                    count += 1
                    break
        return count / len(points)

    a, b = generated.double().numpy(), real.double().numpy()
    for k in (1, 3):
        expected = (share(a, b, k), share(b, a, k))
        assert precision_recall(generated, real, k) == pytest.approx(expected)
    assert 0.1 < expected[0] < 1
    assert 0.1 < expected[1] < 1


def test_equal_sets_cover_each_other_and_sets_apart_do_not() -> None:
    some = torch.randn(20, 5)
    assert precision_recall(some, some) == (1.0, 1.0)
    assert precision_recall(some, some + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"expected more than 3 features.*got 3"):
        inside(some, some[:3])
    with pytest.raises(ValueError, match=r"got \[20, 5\] and \[20, 4\]"):
        inside(some, some[:, :4])


@pytest.mark.parametrize("model", ["dit-fashion", "pixart-emoji"])
def test_real_looking_images_are_near_and_noise_is_far(model: str) -> None:
    sampling = Sampling.of(model)
    sets = Sets.prepare(sampling, 96)
    labels = sampling.labels(96)
    if model == "pixart-emoji":
        names = sampling.pipeline.prompts.names
        glyphs = NearestGlyph.prepare(sampling, 0, 1, 0).glyphs
        near = torch.stack([glyphs[names.index(label)] for label in labels]).unflatten(1, sampling.pipeline.shape)
    else:
        near = sampling(sets.start[:8], 6).repeat(12, 1, 1, 1)
        labels = sampling.labels(8) * 12
    far = torch.randn(96, *sampling.pipeline.shape)
    good, bad = sets.columns(near, labels), sets.columns(far, labels)
    assert set(good) == set(Sets.COLUMNS)
    assert good["frechet"] < bad["frechet"] / 2
    assert good["accuracy"] > bad["accuracy"] + 0.3
    assert good["precision"] > bad["precision"]
    assert good["frechet_spread"] > 0


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_frontier.main(["--sets", "64", "--out", str(tmp_path)]) == 2
    assert "more images than the 64 features, got 64" in capsys.readouterr().out


# ---- a run


def test_when_to_stop_is_no_part_of_the_command() -> None:
    argv = ["--model", "flux-emoji", "--minutes", "5", "--sets", "100", "--minutes=3"]
    assert run_frontier._lasting(argv) == ["--model", "flux-emoji", "--sets", "100"]


def test_a_run_goes_on_and_what_fails_says_why(tmp_path: Path) -> None:
    file, made = tmp_path / "frontier.jsonl", []

    def frontier() -> Frontier:
        return Frontier(JOB, Store(file, JOB, key=("stage", "name")), made.append)

    def measured(candidate: Candidate) -> dict[str, Any]:
        if candidate.steps == 3:
            raise RuntimeError("no such run\nand more")
        return {"latency": candidate.steps / 4, "psnr": 30.123456}

    some = [Candidate("ddim", "leading", n) for n in (2, 3, 4)]
    frontier().fill(SCREEN, some[:2], measured)
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [r["error"] for r in rows] == [None, "RuntimeError: no such run"]
    assert rows[0]["psnr"] == 30.1235
    made.clear()
    again = frontier()
    again.fill(SCREEN, some, measured)
    assert [words.rsplit(" ", 1)[1] for words in made] == ["3", "4"]  # what failed is tried again, once
    again.fill(SCREEN, some, measured)
    assert len(made) == 2
    again.expired = lambda: True
    again.fill(MEASURE, some, measured)
    assert len(made) == 2
    assert [r["candidate"]["steps"] for r in again.rows(SCREEN)] == [2, 4]


def test_the_reference_runs_time_is_taken_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(Frontier, "_costs", lambda self: taken.append(1) or {EAGER: 1.0, "seconds": 2.0})
    for _ in range(2):
        frontier = Frontier(JOB, Store(tmp_path / "f.jsonl", JOB, key=("stage", "name")))
        assert frontier.costs == frontier.costs == {EAGER: 1.0, "seconds": 2.0}
    assert taken == [1]
    assert len(frontier.rows(COSTS)) == 1


def test_the_best_of_the_screen_of_each_family_are_measured(tmp_path: Path) -> None:
    frontier = Frontier(JOB, Store(tmp_path / "f.jsonl", JOB, key=("stage", "name")))
    frontier.costs = {EAGER: 1.0, WHOLE: 0.8, OURS: 0.7, "seconds": 1.0}
    screened = {  # latency and quality
        OWN: (1.0, 200.0),
        Candidate("ddim", "leading", 2): (0.5, 30.0),
        Candidate("ddim", "trailing", 2): (0.5, 31.0),
        Candidate("ddim", "leading", 4, "taylorseer", "order 1, interval 2"): (0.6, 41.0),
        Candidate("ddim", "leading", 4, OURS, "branches:2:1"): (0.4, 40.0),
        Candidate("ddim", "leading", 4, OURS, "blocks:2:1"): (0.4, 39.0),
        Candidate("ddim", "leading", 4, OURS, "output:2:1"): (0.4, 38.0),
    }
    for candidate, (latency, value) in screened.items():
        quality = dict.fromkeys(("psnr", "psnr_worst", "converged", "converged_worst"), value)
        frontier.store.add({"stage": SCREEN, **known(candidate), "error": None, "latency": latency, **quality})
    names = {candidate.name for candidate in frontier.finalists()}
    assert names == {
        "ddim trailing 2",
        "ddim leading 4, TaylorSeer (diffusers): order 1, interval 2",
        "ddim leading 4, TaylorSeer (diffusers), torch.compile: order 1, interval 2",
        "ddim leading 4, branches:2:1",
        "ddim leading 4, blocks:2:1",
    }
    frontier.store.add({"stage": MEASURE, **known(Candidate("ddim", "trailing", 2)), "error": None, "latency": 0.5})
    rows = [*frontier.rows(SCREEN), {**row("x", 0.4), "candidate": {"by": WHOLE, "steps": 2}, "psnr": None}]
    missing = frontier_page._missing(rows, frontier.rows(MEASURE), 4)
    assert set(missing) == names - {"ddim trailing 2"}
    assert frontier.bases() == []  # of 7 to 14 steps there is none
    assert frontier.bases(reusing=True) == [("ddim", "leading")]  # branches, blocks, output every 2nd of all steps


def halved(runs: dict[str, Callable[[], Any]], *rest: Any) -> dict[str, Timing]:
    """Each candidate has run, and took half of the reference's time."""
    for run in runs.values():
        run()
    return {name: Timing((1.0 if name == "reference" else 0.5,) * 3) for name in runs}


def test_runs_of_which_as_many_steps_do_the_same_share_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frontier = Frontier(JOB, Store(tmp_path / "f.jsonl", JOB, key=("stage", "name")))
    pipeline, timed = frontier.sampling.pipeline, []
    monkeypatch.setattr(frontier, "_timed", lambda candidate: timed.append(candidate) or TIMED)
    first = parse_schedule("output:2:1", pipeline, 4)
    files = {
        "first": first,
        "weights": first.replace(output_weights=1.1 * first.output_weights),
        "blocks": parse_schedule("blocks:2:1", pipeline, 4),
        "carry": parse_schedule("blocks:2:1:carry=0.5", pipeline, 4),
        "steps": parse_schedule("output:1of4:1", pipeline, 4),
        "order": parse_schedule("output:2:0", pipeline, 4),
        "channels": first.replace(output_channels=0.1 * (first.output_weights != 0)[..., None]),
    }
    found = {}
    for name, schedule in files.items():
        schedule.save(file := tmp_path / f"{name}.safetensors")
        (found[name],) = candidates.learned("dit-fashion", pipeline, [file])[0][-1:]
    frontier.measure(found.values())
    assert timed == [found[name] for name in ("first", "blocks", "carry", "steps", "order", "channels")]
    rows = {row["name"]: row for row in frontier.rows(MEASURE)}
    own = rows[found["weights"].name]
    assert own["time_of"] == found["first"].name and {name: own[name] for name in TIMES} == TIMED
    assert "psnr" in own and "psnr" not in rows[found["first"].name]  # its quality is its own


def test_screened_measured_judged_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest run there is, of everything; then it is there."""
    job = Job("dit-fashion", steps=4, count=2, screen=2, batch=1, rounds=1)
    file = tmp_path / "frontier-dit-fashion.jsonl"
    frontier = Frontier(job, Store(file, job, "the command", key=("stage", "name")))
    frontier.costs = {EAGER: 1.0, WHOLE: 0.8, OURS: 0.7, "seconds": 1.0}
    monkeypatch.setattr("bench.compare.frontier.backend", lambda candidate: "eager")
    monkeypatch.setattr("bench.compare.frontier.interleave", halved)  # whatever else the machine does
    monkeypatch.setattr("bench.compare.frontier_page.SHOWN", ("converged_worst", "frechet"))
    monkeypatch.setattr(frontier, "judged", lambda: [OWN, OWN.on(WHOLE)])  # the same images
    some = [OWN, Candidate("unipc", "linspace", 2), OWN.on(OURS, "output:2:1")]
    frontier.screen(some)
    frontier.measure(some)
    frontier.judge(65)
    stages = [(r["stage"], r["error"]) for r in frontier.store.rows]
    assert stages[:6] == [(SCREEN, None)] * 3 + [(MEASURE, None)] * 3
    own, whole = frontier.rows("sets 65")
    assert all(own[name] == whole[name] for name in Sets.COLUMNS)
    assert own["seconds"] > 10 * whole["seconds"]
    assert 0 < own["precision"] <= 1
    reused = frontier.rows(MEASURE)[2]
    assert reused["latency"] == 0.5
    assert 20 < reused["psnr"] < 60
    frontier_page.write([file], tmp_path / "FRONTIER.md")
    page = (tmp_path / "FRONTIER.md").read_text()
    assert "`the command`: 3 candidates screened on 2 noises, 3 measured on 2 others" in page
    assert "ddim leading 4, output:2:1" in page
    short = [line for line in page.splitlines() if line.startswith("| dit-fashion | ")]
    assert [line.split(" | ")[1] for line in short] == ["2x", "3x", "4x"]
    assert f"**{reused['psnr']:.1f} ± {reused['psnr_spread']:.1f}** / " in short[0]
    assert (tmp_path / "frontier-dit-fashion-converged-worst.png").is_file()
