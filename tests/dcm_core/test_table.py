"""The expert table: where rows are active, what works at a noise level, and the plan that follows."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import DCMError, ScheduleError
from dcm_core.routing import is_detail
from dcm_core.table import (
    EVERYWHERE,
    Interval,
    Row,
    Span,
    Use,
    active_experts,
    check_rows,
    letters_of,
    parse_strengths,
    plan_rows,
    step_in,
    two_rows,
)

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.2, 0.0])


def linear(percent):
    return 1 - percent


def covered(span, sigmas=SIGMAS):
    return span.interval(sigmas, linear).covers(sigmas[:-1]).tolist()


@pytest.mark.parametrize(
    ("span", "steps"),
    [
        (Span(), [1, 2, 3, 4, 5]),
        (Span("sigma", 1, 0.7), [1, 2, 3]),  # the end belongs to the row
        (Span("sigma", 0.7, 0), [4, 5]),  # and the start to the row above
        (Span("sigma", 0.95, 0.3), [2, 3, 4]),
        (Span("steps", 1, 1), [1]),
        (Span("steps", 2, 4), [2, 3, 4]),
        (Span("steps", 4, 9), [4, 5]),  # the run has fewer steps
        (Span("steps", 6, 9), []),
        (Span("percent", 0, 0.3), [1, 2]),  # from sigma 1 down to 0.7, which is the next row's
        (Span("percent", 0.3, 1), [3, 4, 5]),
        (Span("percent", 0.05, 0.5), [2, 3]),
    ],
)
def test_steps_of_a_span(span, steps):
    assert [step + 1 for step, inside in enumerate(covered(span)) if inside] == steps


def test_levels_between_two_steps_belong_to_the_earlier_one():
    """Samplers of a higher order call the model there."""
    first, second = (Span("steps", step, step).interval(SIGMAS, linear) for step in (2, 3))
    between = torch.tensor([0.8999, 0.8, 0.7001])
    assert first.covers(between).all() and not second.covers(between).any()
    assert second.covers(torch.tensor(0.7)) and not first.covers(torch.tensor(0.7))


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=6, unique=True), st.floats(0, 1, width=32))
def test_rows_that_meet_share_no_level_and_leave_none_out(bounds, sigma):
    edges = [1.0, *sorted(bounds, reverse=True), 0.0]
    rows = [Span("sigma", high, low).interval(None, linear) for high, low in pairwise(edges)]
    assert sum(bool(row.covers(torch.tensor(sigma))) for row in rows) == 1


@given(st.integers(1, 12), st.data())
def test_every_step_of_a_run_is_in_exactly_one_of_its_stretches(count, data):
    sigmas = torch.linspace(1, 0, count + 1)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, max(count - 1, 1)), max_size=3))), count]
    spans = [Span("steps", first + 1, last) for first, last in pairwise(cuts) if first < last]
    assert [sum(inside) for inside in zip(*(covered(span, sigmas) for span in spans), strict=True)] == [1] * count


@given(st.floats(0.001, 0.999), st.floats(0, 1, width=32))
def test_a_pair_changes_where_its_boundary_says(boundary, sigma):
    rows = two_rows(boundary, [Use("s", (1.0,))], [Use("s", (1.0,)), Use("d", (0.5,))])
    sigma = torch.tensor([sigma])
    low = bool(is_detail(sigma, boundary))
    assert active_experts(rows, sigma, None, linear) == [(("s", 1.0), ("d", 0.5)) if low else (("s", 1.0),)]


def test_experts_stack_in_the_order_of_the_rows_and_strength_0_leaves_one_out():
    rows = [
        Row("a", Span("sigma", 1, 0.5), (Use("x", (1.0,)), Use("y", (0.0,)))),
        Row("b", Span(), (Use("z", (-0.5,)),)),
        Row("c", Span("sigma", 0.8, 0)),
    ]
    found = active_experts(rows, torch.tensor([0.9, 0.5, 0.4]), None, linear)
    assert found == [(("x", 1.0), ("z", -0.5))] * 2 + [(("z", -0.5),)]


def test_a_strength_for_each_step_begins_with_the_row():
    rows = [Row("a", Span("steps", 2, 5), (Use("x", (1.0, 0.5, 0.25)),))]
    at = [active_experts(rows, sigma[None], SIGMAS, linear)[0] for sigma in SIGMAS[:-1]]
    assert at == [(), *((("x", strength),) for strength in (1.0, 0.5, 0.25, 0.25))]
    # and a level inside a step has the strength of the step
    assert active_experts(rows, torch.tensor([0.75, 0.5]), SIGMAS, linear) == [(("x", 1.0),), (("x", 0.5),)]


@pytest.mark.parametrize("sigma, step", [(1.2, 0), (1.0, 0), (0.95, 0), (0.9, 1), (0.2, 4), (0.1, 4)])
def test_the_step_of_a_level(sigma, step):
    assert step_in(EVERYWHERE, torch.tensor(sigma), SIGMAS) == step


def test_steps_need_a_run():
    for row in (Row("a", Span("steps", 1, 2), (Use("x", (1.0,)),)), Row("a", Span(), (Use("x", (1.0, 0.5)),))):
        assert row.is_stepwise
        with pytest.raises(ScheduleError, match="does not tell the model its noise levels"):
            active_experts([row], torch.tensor([0.5]), None, linear)
    assert not Row("a", Span("percent", 0, 1), (Use("x", (1.0,)),)).is_stepwise


def test_the_plan_names_rows_gaps_overlaps_and_rows_without_steps():
    one = (Use("x", (1.0,)),)
    rows = [
        Row("high", Span("steps", 1, 2), one),
        Row("style", Span("steps", 2, 4), (Use("x", (1.0, 1.0, 0.0)),)),
        Row("low", Span("sigma", 0.3, 0), changes_more=True),
        Row("late", Span("steps", 8, 9), one),
        Row("nothing", Span(), (Use("x", (0.0,)),)),
    ]
    plan = plan_rows(rows, SIGMAS, linear)
    assert plan.by_step == ["high", "high + style", "style", "base", "low"] and plan.idle == ["late"]
    assert str(plan) == "step 1 high, 2 high + style, 3 style, 4 base, 5 low" and plan.steps == 5
    with pytest.raises(ScheduleError, match="expected values that fall"):
        plan_rows(rows, torch.tensor([0.5, 0.9]), linear)


@pytest.mark.parametrize(
    ("owners", "letters"),
    [
        (["semantic", "detail", "detail", "base"], "SDB"),
        (["high", "hard", "huge", "h"], "HAU1"),
        (["高", "低"], "高低"),
        (["++", "-"], "12"),
        (["mid", "mid + style", "base + mid"], ["M", "M+S", "B+M"]),
    ],
)
def test_every_owner_has_a_letter_of_its_own(owners, letters):
    assert list(letters_of(owners).values()) == list(letters)


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("1", (1.0,)),
        (" 0.5 ", (0.5,)),
        ("1, 1,0.5", (1, 1, 0.5)),
        ("1 0.5;-2", (1, 0.5, -2)),
        ("1,", (1,)),
        ("0", (0,)),
    ],
)
def test_strengths_are_read(text, strengths):
    assert parse_strengths(text) == strengths


@pytest.mark.parametrize("text", ["", ",", "one", "1, x", "11", "-10.5", "nan", "inf", "1e999", None, 1.0, "1 " * 1001])
def test_other_strengths_are_refused(text):
    with pytest.raises(ScheduleError, match=r"strength is .*; expected a number from -10 to 10"):
        parse_strengths(text)


@pytest.mark.parametrize(
    "values",
    [
        ("steps", 0, 2),
        ("steps", 3, 2),
        ("steps", 1.5, 2),
        ("steps", 1, math.inf),
        ("steps", 1, 1e9),
        ("sigma", 0.5, 0.5),
        ("sigma", 0.2, 0.8),
        ("sigma", 1.5, 0),
        ("sigma", math.nan, 0),
        ("sigma", 1, -0.1),
        ("percent", 0.5, 0.2),
        ("percent", 0, 1.5),
        ("percent", math.nan, 1),
        ("hours", 0, 1),
    ],
)
def test_spans_that_no_run_has_are_refused(values):
    with pytest.raises(DCMError, match=r"start and end are|unit is 'hours'; choose one of"):
        Span(*values)


@pytest.mark.parametrize(
    ("span", "words"),
    [
        (Span(), "all steps"),
        (Span("sigma", 0.9, 0.5), "sigma 0.9 to 0.5"),
        (Span("steps", 2, 2), "step 2"),
        (Span("steps", 2, 4), "step 2 to 4"),
        (Span("percent", 0.25, 1), "25 to 100 % of the run"),
    ],
)
def test_a_span_in_words(span, words):
    assert str(span) == words


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (Span("steps", 1, 2), Span("steps", 2, 3), True),
        (Span("steps", 1, 2), Span("steps", 3, 4), False),
        (Span("sigma", 1, 0.5), Span("sigma", 0.5, 0), False),
        (Span("sigma", 1, 0.5), Span("sigma", 0.6, 0), True),
        (Span("percent", 0, 0.5), Span("percent", 0.4, 1), True),
        (Span("percent", 0, 0.5), Span("percent", 0.5, 1), False),
        (Span("steps", 1, 2), Span(), True),
        (Span("steps", 1, 2), Span("sigma", 1, 0.5), False),  # known only in the run
    ],
)
def test_two_full_models_in_one_interval_are_refused(first, second, clash):
    rows = [(Row("high", first), True), (Row("low", second), True), (Row("style", Span()), False)]
    if not clash:
        check_rows(rows)
        return
    with pytest.raises(ScheduleError, match=r"Rows 'high' and 'low' both have a full model"):
        check_rows(rows)


def test_an_interval_is_half_open():
    interval = Interval(0.9, 0.5)
    assert interval.covers(torch.tensor([0.9, 0.89, 0.5, 0.49])).tolist() == [False, True, True, False]
