"""The emulator must catch what real capture would, or what passes on it means nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .emulator import Emulator, Refused


def capture(launch: object) -> tuple:
    return Emulator().capture(launch)


def test_a_replay_sees_new_inputs_at_old_addresses() -> None:
    x, total = torch.zeros(3), torch.zeros(3)

    def launch() -> Tensor:
        y = (x * 2).view(3, 1).expand(3, 2)
        total.add_(x)
        torch.mul(y, 3.0, out=scratch)
        return scratch.sum(1)

    scratch = torch.empty(3, 2)
    graph, output = capture(launch)
    total.zero_()
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert torch.equal(output, torch.full((3,), 12 * value))
    assert torch.equal(total, torch.full((3,), 6.0)), "in-place work happens at each replay"


def test_stale_host_values_show() -> None:
    factor, x = [2.0], torch.ones(2)
    graph, output = capture(lambda: x * factor[0])
    factor[0] = 3.0
    graph.replay()
    assert torch.equal(output, torch.full((2,), 2.0)), "as on a GPU: the number was baked in"


def test_a_rebound_tensor_is_not_followed() -> None:
    box = [torch.ones(2)]
    graph, output = capture(lambda: box[0] + 0)
    box[0] = torch.full((2,), 9.0)
    graph.replay()
    assert torch.equal(output, torch.ones(2))


def test_multiple_outputs_and_attention() -> None:
    x = torch.randn(1, 2, 4, 8)

    def launch() -> Tensor:
        values, indices = x.max(-1)
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return attended.sum(-1) + values + indices

    graph, output = capture(launch)
    x.copy_(torch.randn(1, 2, 4, 8))
    graph.replay()
    torch.testing.assert_close(output, launch())


def test_what_is_squeezed_in_place_after_it_was_made() -> None:
    """A matrix times a vector, say: what the product made loses a dimension."""
    x, matrix = torch.randn(4), torch.randn(4, 3)
    graph, output = capture(lambda: torch.mm(x[None], matrix).squeeze_(0) * 2)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(output, 2 * x @ matrix)


def test_memory_the_graph_has_not_written_is_poison() -> None:
    graph, output = capture(lambda: torch.empty(3) + 0)
    graph.replay()
    assert output.isnan().all()


@pytest.mark.parametrize(
    ("launch", "match"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense reads a device value"),
        (lambda x: float(x[0]), "reads a device value"),
        (lambda x: x if x.sum() > 0 else -x, "reads a device value|is_nonzero"),
        (lambda x: x[x > 0], "nonzero|index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: torch.rand(3) + x, "rand draws random numbers"),
        (lambda x: torch.nn.functional.dropout(x), "draws random numbers"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "lift_fresh brings fresh host data"),
    ],
)
def test_what_capture_refuses(launch: object, match: str) -> None:
    x = torch.ones(3)
    with pytest.raises(Refused, match=match):
        capture(lambda: launch(x))
    capture(lambda: x + 1)  # a refused capture leaves nothing behind


def test_captures_do_not_nest() -> None:
    emulator = Emulator()
    with pytest.raises(Refused, match="already under way"):
        emulator.capture(lambda: emulator.capture(lambda: torch.ones(1) + 1)[1])
