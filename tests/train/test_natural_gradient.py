"""Natural gradients: quicker than plain ones where gradients are noisy and correlated; lengths; what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harmonica_rt.train.natural_gradient import NaturalGradient

N = 20
NAMES = ("natural", "plain")


def valleys(seed: int) -> tuple[Tensor, Tensor]:
    """Rows of a least-squares problem [400, N] whose columns are all but the same direction, and its solution."""
    generator = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(N, N, generator=generator))[0]
    rows = torch.randn(400, N, generator=generator) @ (turned * torch.logspace(0, -2.5, N)) @ turned.T
    return rows, torch.randn(N, generator=generator)


def error_after(seed: int, name: str, steps: int = 60) -> float:
    """What is left of the mean squared residual, one iteration seeing 8 noisy rows."""
    rows, solution = valleys(seed)
    generator, natural = torch.Generator().manual_seed(seed), NaturalGradient()
    x = torch.zeros(N)
    for step in range(steps):
        chosen = rows[torch.randint(len(rows), (8,), generator=generator)]
        noise = 0.01 * torch.randn(8, generator=generator)
        gradients = chosen * (chosen @ (x - solution) + noise)[:, None]
        mean = gradients.mean(0)
        direction = natural.direction(gradients) if name == "natural" else mean / mean.square().mean().sqrt()
        x = x - 0.2 * (1 - step / steps) * direction
    return ((rows @ (x - solution)).square().mean() / (rows @ solution).square().mean()).item()


@pytest.mark.parametrize("seed", range(3))
def test_it_gets_closer_than_the_plain_gradient(seed: int) -> None:
    natural, plain = (error_after(seed, name) for name in NAMES)
    assert natural < plain / 5


@pytest.mark.parametrize("images", [1, 4, 50])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_directions_have_a_root_mean_square_of_1(images: int, scale: float) -> None:
    gradient = NaturalGradient()
    for seed in range(3):
        gradients = scale * torch.randn(images, 7, generator=torch.Generator().manual_seed(seed))
        direction = gradient.direction(gradients)
        assert direction.dtype == torch.float32 and direction.shape == (7,)
        assert direction.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)


def test_the_first_direction_is_its_formula() -> None:
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    fisher = gradients.T @ gradients / 5
    damping = 0.05 * fisher.diagonal().mean() * torch.eye(3)
    expected = torch.linalg.solve(fisher + damping, gradients.mean(0))
    got = NaturalGradient().direction(gradients)
    torch.testing.assert_close(got, expected / expected.square().mean().sqrt())


def test_one_gradient_is_its_own_direction() -> None:
    """Its length is that of what it moves: numbers without a gradient do not lengthen the others' steps."""
    gradient = torch.tensor([[3.0, -4.0, 0.0]])
    expected = gradient[0] / (gradient.square().sum() / 2).sqrt()
    torch.testing.assert_close(NaturalGradient().direction(gradient), expected)


def test_no_gradient_gives_no_direction() -> None:
    assert NaturalGradient().direction(torch.zeros(4, 3)).tolist() == [0.0, 0.0, 0.0]


def test_a_parameter_without_gradients_stays() -> None:
    gradients = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    gradients[:, 2] = 0
    direction = NaturalGradient().direction(gradients)
    assert abs(direction[2]) < 1e-6 and (direction[[0, 1, 3]].abs() > 1e-3).all()


def test_the_window_forgets() -> None:
    old, recent = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    short, fresh, long = (NaturalGradient(window=w, momentum=0.0) for w in (1, 1, 9))
    for gradient in (short, long):
        gradient.direction(old)
    directions = [gradient.direction(recent) for gradient in (short, fresh, long)]
    torch.testing.assert_close(directions[0], directions[1])
    assert (directions[2] - directions[1]).abs().max() > 1e-2


@pytest.mark.parametrize("done", [0, 1, 3, 7])
def test_it_goes_on_from_its_state_to_the_bit(done: int) -> None:
    """Window of 4; products of an iteration with itself are not symmetric to the last bit."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 101, generator=generator) for _ in range(done + 3)]
    before, after = NaturalGradient(window=4), NaturalGradient(window=4)
    for each in rows[:done]:
        before.direction(each)
    for own in before.products:  # as some library would have made it
        own[-1][0, 1] += 1e-9
    after.load({name: tensor.clone() for name, tensor in before.state().items()})
    assert all(torch.equal(a, b) for p, q in zip(before.products, after.products, strict=True) for a, b in zip(p, q))
    assert len(after.recent) == min(done, 4)
    for each in rows[done:]:
        assert torch.equal(before.direction(each), after.direction(each))


def test_shares_weigh_the_average_alone() -> None:
    gradients = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    plain = NaturalGradient().direction(gradients)
    torch.testing.assert_close(NaturalGradient().direction(gradients, torch.full((3,), 1 / 3)), plain)
    natural = NaturalGradient()
    natural.direction(gradients, torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(natural.mean, gradients[1])
    torch.testing.assert_close(natural.recent[0], gradients)
