"""The warm-up: up in a line, down along half a cosine, each group by its own peak."""

import math

import pytest
import torch
from torch import nn

from siamese.schedules import warmup_cosine


def rates(steps: int, warmup: float, peaks: tuple[float, ...] = (1.0,)) -> list[tuple[float, ...]]:
    """The learning rate of each group at each step of a run."""
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks], lr=7.0)
    schedule, seen = warmup_cosine(optimizer, steps, warmup), []
    for _ in range(steps):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return seen


def test_the_rate_rises_in_a_line_and_falls_along_half_a_cosine():
    seen = [rate for (rate,) in rates(50, 0.2)]
    assert seen[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert seen[10:] == pytest.approx([(1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)])


def test_the_first_step_learns_something_and_the_last_almost_nothing():
    seen = [rate for (rate,) in rates(200, 0.1)]
    assert 0 < seen[0] < 0.1
    assert max(seen) == 1 == seen[20]
    assert 0 < seen[-1] < 1e-3


def test_each_group_has_its_own_peak():
    seen = rates(40, 0.1, (0.5, 0.05, 2.0))
    assert max(first for first, _, _ in seen) == pytest.approx(0.5)
    assert all(second == pytest.approx(first / 10) and third == pytest.approx(4 * first) for first, second, third in seen)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), (1, 1.0), (2, 0.5), (5, 0.0), (5, 1.0), (3, 0.9)])
def test_the_shortest_runs_have_a_rate_too(steps, warmup):
    seen = [rate for (rate,) in rates(steps, warmup)]
    assert all(0 < rate <= 1 for rate in seen)


def test_without_a_warm_up_it_starts_at_the_peak():
    assert rates(10, 0.0)[0] == (1.0,)


@pytest.mark.parametrize("warmup", [-0.1, 1.5, 500])
def test_a_warm_up_that_is_no_share_is_refused(warmup):
    with pytest.raises(ValueError, match=f"warmup={warmup} is a share of the run's steps: say a number from 0 to 1"):
        rates(10, warmup)


def test_it_goes_on_from_its_state():
    def schedule() -> torch.optim.lr_scheduler.LRScheduler:
        return warmup_cosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5), 20)

    one, other = schedule(), schedule()
    for _ in range(7):
        one.optimizer.step()
        one.step()
    other.load_state_dict(one.state_dict())
    one.step()
    other.step()
    assert other.get_last_lr() == one.get_last_lr()
    assert other.get_last_lr() != schedule().get_last_lr()
