"""The comparison with peers: points come and go, a run goes on where it stopped, a peer's failure is a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import run_quality
from bench.compare import comparison, peers_page
from bench.compare.comparison import Bench, Job, Store, compare
from bench.models.pipelines import PixelPipeline
from bench.peers import PEERS, Peer
from bench.peers.base import branch_modules, with_denoiser
from harmonica_rt.measuring import ssim

from ..models.adapter_cases import Case
from ..models.test_adapters import CASES

JOB = Job("dit-fashion", steps=4, count=2, batch=1, rounds=2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(JOB)


def plain(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    return pipeline


class Broken(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.config, self.dtype, self.device = model, model.config, model.dtype, model.device

    def forward(self, *args: object, **kwargs: object) -> object:
        output = self.model(*args, **kwargs)
        output.sample.fill_(torch.nan)
        return output


def refuse(pipeline: PixelPipeline, setting: str, steps: int) -> PixelPipeline:
    raise AttributeError("DiT has no such thing\nand more")


@pytest.mark.parametrize(
    ("name", "cur", "faithful"),
    [
        ("eager", 0.0, True),
        ("fewer", None, False),
        ("taylorseer", 0.25, False),
        ("pyramid", 0.25, False),
        ("faster-cache", 0.375, False),  # every second step half the batch, and no attention
    ],
)
def test_a_peers_point(bench: Bench, name: str, cur: float | None, faithful: bool) -> None:
    peer = PEERS[name]
    setting = "2" if name == "fewer" else peer.settings[0]
    row = bench.row(peer, setting)
    assert row["error"] is None and row["drift"] < 1e-5
    assert row["cur"] == pytest.approx(0.5 if cur is None else cur, abs=1e-9)
    assert (row["psnr"] > 100) == faithful and (row["ssim"] > 0.999999) == faithful
    assert 0 < row["latency_p20"] <= row["latency"] <= row["latency_p80"]
    assert row["psnr_worst"] <= row["psnr"] and row["psnr_converged"] > 5


def test_failures_are_rows_in_the_peers_own_words(bench: Bench) -> None:
    assert bench.row(Peer("p", ("x",), refuse), "x")["error"] == "AttributeError: DiT has no such thing"
    broken = Peer("p", ("x",), lambda own, *_: with_denoiser(own, Broken(own.transformer)))
    assert bench.row(broken, "x")["error"] == "FloatingPointError: the images are not finite"
    absent = Peer("p", ("x",), plain, package="no_such_package_here")
    assert bench.row(absent, "x")["error"].startswith("package no_such_package_here is not installed: pip install")


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    class Counting:
        def __init__(self, job: Job, progress: object) -> None:
            pass

        def row(self, peer: Peer, setting: str) -> dict:
            measured.append(setting)
            if setting == "c":
                raise KeyboardInterrupt
            return {"peer": peer.name, "setting": setting, "error": None}

    monkeypatch.setattr(comparison, "Bench", Counting)
    peers, path = {"p": Peer("p", ("a", "b", "c"), plain)}, tmp_path / "r.jsonl"
    with pytest.raises(KeyboardInterrupt):
        compare(JOB, path, peers)
    with path.open("a") as file:
        file.write('{"peer": "p", "sett')  # a line cut short
    Counting.row = lambda self, peer, setting: (
        measured.append(setting) or {"peer": "p", "setting": setting, "error": None}
    )
    rows = compare(JOB, path, peers)
    assert measured == ["a", "b", "c", "c"] and [row["setting"] for row in rows] == ["a", "b", "c"]
    assert [json.loads(line).get("setting") for line in path.read_text().splitlines()] == [None, "a", "b", "c"]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2].replace("null", '"crashed"') + lines[3])
    rows = compare(JOB, path, peers)
    assert measured[4:] == ["b"] and [row["setting"] for row in rows] == ["a", "c", "b"], "what failed is tried again"
    with pytest.raises(ValueError, match=r"expected the results of \{.*'count': 3.*, got those of \{.*'count': 2"):
        Store(path, Job("dit-fashion", steps=4, count=3, batch=1, rounds=2))


@pytest.mark.parametrize(
    ("stop", "said", "code"),
    [
        (KeyboardInterrupt(), "stopped; every finished row is in", 130),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device", 2),
    ],
)
def test_a_stop_says_that_the_run_can_go_on(
    stop: BaseException, said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    def fail(self: Store, row: dict) -> None:
        raise stop

    monkeypatch.setattr(comparison, "Bench", lambda job, progress: type("B", (), {"row": lambda *_: {}})())
    monkeypatch.setattr(Store, "add", fail)
    assert run_quality.main(["--peers", "eager", "--judged", "0", "--out", str(tmp_path)]) == code
    assert said in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "peers-dit-fashion.jsonl").read_text().count("\n") == 1


def row(peer: str, setting: str, latency: float, psnr: float, **more: object) -> dict:
    known = {"drift": 0.0, "cur": 0.5, "ssim": 0.9, "max_error": 0.1, "psnr_worst": 20.0, "psnr_converged": 30.0}
    known |= {"latency_p20": latency - 0.01, "latency_p80": latency + 0.01, "error": None}
    return {"peer": peer, "setting": setting, "latency": latency, "psnr": psnr} | known | more


def test_the_page_shows_every_point_and_who_is_outside(tmp_path: Path) -> None:
    rows = [
        row("diffusers, eager", "full", 1.0, 206.0, images=torch.zeros(2, 1, 28, 28)),
        row("harmonica_rt, learned", "2x", 0.45, 50.0, images=torch.ones(2, 1, 28, 28)),
        row("fewer steps", "10", 0.5, 34.0, images=torch.full((2, 1, 28, 28), -1.5)),
        row("another", "fast", 0.3, 20.0, images=torch.rand(2, 1, 28, 28)),
        {"peer": "absent", "setting": "x", "error": "package absent is not installed"},
    ]
    assert [row["peer"] for row in peers_page.outside(rows)] == ["another"]
    best = peers_page.at_speedup(rows, 2.0)
    assert {name: row["setting"] for name, row in best.items()} == {
        "ours": "2x",
        "best peer": "fast",
        "fewer steps": "10",
    }
    assert peers_page.at_speedup(rows, 3.0)["ours"] is None
    store = Store(tmp_path / "peers-dit-fashion.jsonl", JOB, "a command")
    for each in rows:
        store.add(each)
    strip = Image.open(tmp_path / "peers-dit-fashion" / store.rows[2]["strip"])
    assert strip.size == (56, 28) and strip.getextrema() == (0, 0) and "images" not in store.rows[2]
    (tmp_path / "pages").mkdir()
    peers_page.write([store.path], tmp_path / "pages" / "RESULTS.md")
    page = (tmp_path / "pages" / "RESULTS.md").read_text()
    assert "| fewer steps | 10 | 0.50 |" in page and "* absent, x: package absent is not installed" in page
    assert "outside our curve by PSNR to the full run, dB: another: fast (0.30, 20.00)." in page
    assert f"commit {store.commit}." in page and all(row["commit"] == store.commit for row in store.rows)
    assert "`a command`: 4 steps, 2 noises" in page and "Fréchet distance to the full run's images" not in page
    assert "| 2x | 50.0 dB, 2.22x (harmonica_rt, learned: 2x) | 20.0 dB, 3.33x (another: fast) | 34.0 dB" in page
    for kind in ("psnr", "converged", "sheet"):
        assert f"](../peers-dit-fashion-{kind}.png)" in page
        assert (tmp_path / f"peers-dit-fashion-{kind}.png").stat().st_size > 10_000


def test_our_curve_is_drawn_between_our_points() -> None:
    ours = [row("harmonica_rt, learned", f"{x}", x, y) for x, y in ((0.2, 30.0), (0.4, 50.0), (0.7, 45.0))]
    theirs = [row("p", name, x, y) for name, x, y in (("in", 0.3, 39.0), ("out", 0.3, 41.0), ("slow", 0.9, 49.0))]
    theirs += [row("p", "fast", 0.19, 10.0), row("diffusers, eager", "full", 0.97, 206.0), row("p", "1", 0.99, 60.0)]
    assert [r["setting"] for r in peers_page.outside(ours + theirs)] == ["out", "fast"]
    assert len(peers_page.outside(theirs)) == 4, "all, where there is nothing of ours"


def test_lower_is_better_for_a_distance() -> None:
    ours = row("harmonica_rt, learned", "2x", 0.4, 50.0, frechet_full=0.11)
    near, far = row("p", "a", 0.5, 40.0, frechet_full=0.10), row("p", "b", 0.5, 40.0, frechet_full=0.2)
    assert [r["setting"] for r in peers_page.outside([ours, near, far], "frechet_full")] == ["a"]


def test_compiled_twins_of_peers() -> None:
    for name, peer in PEERS.items():
        if name.endswith("-compiled"):
            plain = PEERS[name.removesuffix("-compiled")]
            assert peer.name == f"{plain.name}, torch.compile" and peer.compile is not None
            assert set(peer.settings) <= set(plain.settings) and plain.compile is None


def test_unknown_names_list_the_known(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_quality.main(["--peers", "eager,best", "--out", str(tmp_path)]) == 2
    assert "expected all or some of eager, learned," in (said := " ".join(capsys.readouterr().out.split()))
    assert "got best" in said
    with pytest.raises(ValueError, match="expected one of dit-fashion, pixart-emoji, flux-emoji, got 'dit-xl-2'"):
        Job("dit-xl-2")
    with pytest.raises(ValueError, match=r"--judged: expected 0, or more images than the 64 features .*, got 64"):
        Job("pixart-emoji", judged=64)


def test_ssim() -> None:
    torch.manual_seed(0)
    images = torch.rand(3, 2, 16, 16) * 2 - 1
    noisy = images + 0.3 * torch.randn_like(images)
    assert torch.allclose(ssim(images, images), torch.ones(3, dtype=torch.float64))
    assert (ssim(noisy, images) < 0.98).all() and torch.allclose(ssim(noisy, images), ssim(images, noisy))
    flat, other = torch.zeros(1, 1, 16, 16), torch.ones(1, 1, 16, 16)  # no structure: luminance alone
    c1 = (0.01 * 2) ** 2
    assert ssim(flat, other).item() == pytest.approx(c1 / (1 + c1), rel=1e-6)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_peers_find_the_branch_modules_of_every_adapter(case: Case) -> None:
    model = case.make()
    modules = branch_modules(model)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    blocks = sum(layers for _, layers, _ in case.layout)
    assert len({name.rsplit(".", 1)[0] for name in modules}) == blocks
