"""The search finds what is known, within its budget, and resumes where it stopped."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.errors import DCMError
from dcm_core.evaluation.figure import plot_trials, trials_figure
from dcm_core.evaluation.search import OutOfBudgetError, Setting, Trials, search
from dcm_core.inspection.plot import THEMES

from ..inspection.test_plot import cut_off, legend

STRENGTH, FIRST = Setting("strength", 0, 3, 0.2, 0.025), Setting("first", 1, 6, 1, 1)
START = {"strength": 0.6, "first": 5.0}


def bowl(settings):
    """Lowest at strength 1 and 3 first steps; one depends on the other."""
    strength, first = settings["strength"] - 1, settings["first"] - 3
    return 1 + strength**2 + 0.1 * first**2 + 0.1 * strength * first


def run(trials, start=START, distance=bowl, calls=6, settings=(FIRST, STRENGTH)):
    search(settings, start, lambda tried: trials.measure(tried, calls, distance))
    return trials


def test_it_finds_the_lowest():
    trials = run(Trials(None, {}, 10_000))
    assert trials.best.settings == {"strength": pytest.approx(1), "first": 3}
    assert trials.best.distance == pytest.approx(1)
    assert len(trials.done) < 40


@given(st.floats(0.05, 2.95), st.integers(1, 6), st.floats(0.05, 2.95), st.integers(1, 6))
def test_it_finds_any_lowest_from_anywhere(best, first, start, start_first):
    found = run(
        Trials(None, {}, 100_000),
        {"strength": round(start, 2), "first": float(start_first)},
        lambda s: (s["strength"] - best) ** 2 + 0.3 * (s["first"] - first) ** 2,
    ).best.settings
    assert found["first"] == first and abs(found["strength"] - best) <= 0.025


def test_settings_stay_within_their_limits():
    trials = run(Trials(None, {}, 10_000), distance=lambda s: -s["strength"] - s["first"])
    assert trials.best.settings == {"strength": 3, "first": 6}
    assert all(0 <= trial.settings["strength"] <= 3 and 1 <= trial.settings["first"] <= 6 for trial in trials.done)


def test_nothing_is_measured_twice():
    trials = run(Trials(None, {}, 10_000))
    seen = [tuple(trial.settings.values()) for trial in trials.done]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("budget", [6, 17, 60])
def test_the_budget_is_kept_and_used(budget):
    trials = run(Trials(None, {}, budget))
    assert trials.calls == budget // 6 * 6 and len(trials.done) == budget // 6
    with pytest.raises(OutOfBudgetError):
        trials.measure({"strength": 9.0, "first": 9.0}, 6, bowl)


def test_the_first_calls_count():
    assert run(Trials(None, {}, 60, first_calls=40)).calls == 58


def test_a_search_that_is_interrupted_resumes_as_if_it_was_not(tmp_path):
    path = tmp_path / "trials.json"
    wanted = run(Trials(None, {"seed": 3}, 10_000)).done
    measured = []

    def distance(settings):
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(settings)
        return bowl(settings)

    with pytest.raises(KeyboardInterrupt):
        run(Trials(path, {"seed": 3}, 10_000), distance=distance)
    trials = Trials(path, {"seed": 3}, 10_000)
    assert trials.resumed == 9 and [trial.settings for trial in trials.done] == measured
    again = []
    run(trials, distance=lambda settings: again.append(settings) or bowl(settings))
    assert trials.done == wanted and len(again) == len(wanted) - 9
    assert Trials(path, {"seed": 3}, 10_000).done == wanted


def test_a_larger_budget_goes_further(tmp_path):
    path = tmp_path / "trials.json"
    run(Trials(path, {}, 30))
    assert len(run(Trials(path, {}, 10_000)).done) > 5


def test_settings_that_cannot_run_cost_nothing_and_are_remembered(tmp_path):
    trials = Trials(tmp_path / "trials.json", {}, 6)
    assert trials.measure({"a": 1.0}, 0, lambda _: math.inf) == math.inf
    trials.measure({"a": 2.0}, 6, lambda _: 1.0)
    assert Trials(trials.path, {}, 6).done[0].distance == math.inf and trials.best.settings == {"a": 2.0}


def test_trials_of_another_task_are_refused(tmp_path):
    path = tmp_path / "trials.json"
    run(Trials(path, {"seed": 3, "size": (1, 2)}, 60))
    Trials(path, {"seed": 3, "size": (1, 2)}, 60)
    with pytest.raises(DCMError, match=r"has the trials of another search: seed was 3 and is 4\. Choose another name"):
        Trials(path, {"seed": 4, "size": (1, 2)}, 60)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"format": "other"}',
        '{"format": "dcm-trials", "version": 1, "task": {}, "trials": [[1]]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "trials.json"
    path.write_text(content)
    with pytest.raises(DCMError, match="cannot be read as trials"):
        Trials(path, {}, 60)
    assert path.read_text() == content


def test_the_file_is_complete_after_every_trial(tmp_path):
    path = tmp_path / "trials.json"
    counts = []

    def distance(settings):
        if path.exists():
            counts.append(len(json.loads(path.read_text())["trials"]))
        return bowl(settings)

    run(Trials(path, {}, 60), distance=distance)
    assert counts == list(range(1, 10)) and [file.name for file in tmp_path.iterdir()] == ["trials.json"]


@pytest.mark.parametrize("theme", THEMES)
def test_the_curve_is_that_of_the_trials(theme):
    trials = run(Trials(None, {}, 10_000)).done
    axes = trials_figure(trials, theme=theme).axes[0]
    points, lowest, best = (line.get_xydata().tolist() for line in axes.get_lines())
    assert points == [[trial.calls, trial.distance] for trial in trials]
    assert [value for _, value in lowest] == [min(t.distance for t in trials[: n + 1]) for n in range(len(trials))]
    assert best[0][1] == pytest.approx(1)
    assert {"trials", "lowest so far", "best, 1"} <= set(legend(trials_figure(trials)))
    assert not cut_off(plot_trials(trials, theme=theme), THEMES[theme].background)
    assert not cut_off(plot_trials(trials[:1], theme=theme), THEMES[theme].background)
