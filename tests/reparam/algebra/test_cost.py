"""When one kernel is worth having: by counting, and by timing what counting leaves in doubt."""

from __future__ import annotations

import pytest
import torch

from reparam.algebra import Conv, Linear, compose, concatenate, parallel
from reparam.algebra.cost import Choice, Cost
from reparam.timing import Duel
from reparam.tuning.decisions import Decisions
from reparam.tuning.latency import Judge, Measured
from reparam.tuning.variants import Variant


def conv(out: int, size: int, channels: int = 8, groups: int = 1) -> Conv:
    pad = ((size // 2, size // 2),) * 2
    return Conv(torch.ones(out, channels // groups, size, size, dtype=torch.float64), padding=pad, groups=groups)


def row(outer: Conv, inner: Conv) -> Choice:
    return Choice(compose(outer, inner, outline=True), ((outer, inner),), 2, shape=(1, 8, 6, 6))


def side_by_side(*convs: Conv) -> Choice:
    merged = concatenate(convs, outline=True)
    return Choice(merged, tuple((c,) for c in convs), len(convs), "several", (1, 8, 6, 6))


def total(*convs: Conv) -> Choice:
    merged = parallel(convs, outline=True)
    return Choice(merged, tuple((c,) for c in convs), 2 * len(convs) - 1, shape=(1, 8, 6, 6))


def measured(winner: int | None) -> Measured:
    """A cost whose duels end as told."""

    def decide(first: object, second: object) -> Duel:
        first()  # type: ignore[operator]
        second()  # type: ignore[operator]
        return Duel(1e-3, 2e-3, 10, winner)  # medians may say otherwise than pairs

    judge = Judge(Decisions(), decide)
    return Measured(judge, Variant(), torch.float32, torch.device("cpu"))


def test_counting():
    cost = Cost()
    assert cost.too_costly(row(conv(8, 3), conv(8, 1))) is None
    assert cost.too_costly(total(conv(8, 7), conv(8, 1))) is None
    assert (
        cost.too_costly(side_by_side(conv(8, 1), conv(8, 1))) == "a kernel for several readers saves no multiply-adds"
    )
    growth = cost.too_costly(row(conv(64, 1, 64), conv(64, 3, 64, 64)))
    assert growth == "one kernel would take 7.9 times the multiply-adds"
    alone = Choice(conv(8, 1), ((conv(8, 1),),), 1)
    assert cost.too_costly(alone) == "one operator would launch as many kernels"


@pytest.mark.parametrize("choice", [row(conv(8, 3), conv(8, 1)), total(conv(8, 5), conv(8, 3, groups=8))])
@pytest.mark.parametrize("winner", [0, 1, None])
def test_a_tie_is_what_counting_says(choice, winner):
    """The first contestant is always what counting would do."""
    cost = measured(winner)
    counted = Cost().too_costly(choice)
    reason = cost.too_costly(choice, "block")
    if not cost.judge.decisions:
        assert reason == counted  # beyond doubt
    elif winner == 1:
        assert (reason is None) != (counted is None)
    else:
        assert (reason is None) == (counted is None)


def test_siblings_are_timed():
    cost = measured(1)
    assert cost.too_costly(side_by_side(conv(8, 1), conv(4, 1)), "block") is None
    assert [remark.message for remark in cost.remarks] == [
        "merged into 1 kernel: 2.00 ms against 1.00 ms, about as fast"
    ]
    assert [remark.where for remark in cost.remarks] == ["block"]
    (key,) = cost.judge.decisions
    assert key == (
        "several of conv2d[8 -> 8, 1x1], conv2d[8 -> 4, 1x1] as conv2d[8 -> 12, 1x1]; "
        f"1x8x6x6 float32 cpu {torch.get_num_threads()} threads; contiguous"
    )


def test_what_needs_no_clock_is_not_timed():
    cost = measured(1)
    assert cost.too_costly(total(conv(8, 3), conv(8, 1))) is None  # no more multiply-adds than apart
    assert cost.too_costly(row(conv(64, 1, 64), conv(64, 3, 64, 64))) is not None  # eight times as many
    unknown = Choice(side_by_side(conv(8, 1), conv(8, 1)).merged, ((conv(8, 1),),) * 2, 2, "several")
    assert cost.too_costly(unknown) is not None  # of unknown size
    assert len(cost.judge.decisions) == 0


@pytest.mark.parametrize("variant", [Variant(a, b) for a in (False, True) for b in (False, True)], ids=str)
@pytest.mark.parametrize("join", ["sum", "concatenation", "several"])
def test_both_sides_of_every_kind_of_choice_can_be_run(variant, join):
    convs = (conv(8, 3), conv(8, 1))
    merged = parallel(convs, outline=True) if join == "sum" else concatenate(convs, outline=True)
    branches = ((convs[0],), (convs[1], conv(8, 1)))
    cost = measured(0)
    cost.variant = variant
    choice = Choice(merged, branches, 4, join, (2, 8, 5, 5))
    cost.too_costly(choice)
    assert len(cost.judge.decisions) == 1


def test_matrix_products_are_timed_too():
    first, second = (Linear(torch.ones(4, 4, dtype=torch.float64)) for _ in range(2))
    cost = measured(1)
    merged = compose(first, second, outline=True)
    assert cost.too_costly(Choice(merged, ((first, second),), 2, shape=(3, 5, 4))) is not None
    (key,) = cost.judge.decisions
    assert key.startswith("linear[4 -> 4] after linear[4 -> 4] as linear[4 -> 4]; 3x5x4 float32")
