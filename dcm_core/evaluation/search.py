"""Search for the settings with the lowest distance, within a budget of model calls.

A coordinate search whose steps are halved (compass search: Kolda, Lewis, Torczon 2003). It changes one setting at a time and
walks on while the distance falls. Where no change helps, it tries half as large ones. It has no random part: with the same
trials it takes the same way, so a search resumes from the trials that are finished.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DCMError
from ..files.unfinished import write_bytes
from ..text import given

FORMAT, VERSION = "dcm-trials", 1
# Distances closer than this share are equal.
EQUAL = 1e-6
# Decimals of a setting: text and widgets have no more.
DECIMALS = 4

# Settings by name, and by their text in the order of the names.
Settings = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """A number to search.

    Attributes:
        low, high: its limits.
        step: the first change.
        finest: the last change; 1 for an integer.
    """

    name: str
    low: float
    high: float
    step: float
    finest: float

    def changed(self, value: float, by: float) -> float:
        return min(max(round(value + by, DECIMALS), self.low), self.high)


@dataclass(frozen=True)
class Trial:
    """One measured combination of settings.

    Attributes:
        distance: infinite if the settings cannot be run.
        calls: model calls of this and all trials before it.
    """

    settings: Settings
    distance: float
    calls: int


class OutOfBudgetError(Exception):
    """The next trial would exceed the budget."""


class Trials:
    """Finished trials, in a file that is complete after every one.

    Args:
        path: the file; None keeps them in memory.
        task: what was asked, so that trials of something else are not used.
        first_calls: model calls before the first trial.

    Raises:
        DCMError: a file that cannot be read, or has the trials of another task.
    """

    def __init__(self, path: Path | None, task: Mapping[str, Any], budget: int, first_calls: int = 0):
        self.path, self.task, self.budget, self.first_calls = path, dict(task), budget, first_calls
        self.done: list[Trial] = [] if path is None or not path.exists() else read_trials(path, self.task)
        self.resumed = len(self.done)

    @property
    def calls(self) -> int:
        return self.done[-1].calls if self.done else self.first_calls

    @property
    def best(self) -> Trial:
        """The first of those with the lowest distance."""
        return min(self.done, key=lambda trial: trial.distance)

    def measure(self, settings: Settings, calls: int, distance: Callable[[Settings], float]) -> float:
        """The distance of settings: the known one, or that of a new trial of so many calls.

        Raises:
            OutOfBudgetError: too few calls are left.
        """
        known = next((trial for trial in self.done if trial.settings == settings), None)
        if known is not None:
            return known.distance
        if self.calls + calls > self.budget:
            raise OutOfBudgetError
        found = distance(settings)
        self.done.append(Trial(dict(settings), found if math.isfinite(found) else math.inf, self.calls + calls))
        self.save()
        return self.done[-1].distance

    def save(self) -> None:
        if self.path is None:
            return
        trials = [
            [trial.settings, trial.distance if math.isfinite(trial.distance) else None, trial.calls]
            for trial in self.done
        ]
        data = {"format": FORMAT, "version": VERSION, "task": self.task, "trials": trials}
        write_bytes(self.path, json.dumps(data, indent=1, allow_nan=False).encode())


def read_trials(path: Path, task: Mapping[str, Any]) -> list[Trial]:
    """The trials in a file.

    Raises:
        DCMError: a damaged file, or the trials of another task.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise ValueError("it is not a file of trials")
        trials = [
            Trial(
                {str(name): float(value) for name, value in settings.items()},
                math.inf if distance is None else float(distance),
                int(calls),
            )
            for settings, distance, calls in data["trials"]
        ]
        before = dict(data["task"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DCMError(f"{path} cannot be read as trials ({error}). Remove it, or choose another name.") from error
    # through JSON, which has no tuples
    wanted = json.loads(json.dumps(dict(task)))
    if different := sorted(name for name in wanted.keys() | before.keys() if wanted.get(name) != before.get(name)):
        raise DCMError(
            f"{path} has the trials of another search: {different[0]} was {given(before.get(different[0]))} and is "
            f"{given(wanted.get(different[0]))}. Choose another name, or remove the file."
        )
    return trials


def search(
    settings: Sequence[Setting],
    start: Settings,
    measure: Callable[[Settings], float],
) -> None:
    """Search from `start` until no change helps, or the budget is used up. `Trials.best` then is the result.

    Args:
        settings: what to change, in this order; other values of `start` stay.
        measure: the distance of settings; see `Trials.measure`.
    """
    try:
        _search(settings, dict(start), measure)
    except OutOfBudgetError:
        return


def _search(settings: Sequence[Setting], best: Settings, measure: Callable[[Settings], float]) -> None:
    lowest = measure(best)
    steps = {setting.name: setting.step for setting in settings}
    while True:
        improved = False
        for setting in settings:
            for way in (1, -1):
                walked = False
                while True:
                    value = setting.changed(best[setting.name], way * steps[setting.name])
                    tried = {**best, setting.name: value}
                    if value == best[setting.name] or not (found := measure(tried)) < lowest * (1 - EQUAL):
                        break
                    best, lowest, walked, improved = tried, found, True, True
                if walked:
                    # the other way is where it came from
                    break
        if improved:
            continue
        left = [setting for setting in settings if steps[setting.name] > setting.finest]
        if not left:
            return
        for setting in left:
            steps[setting.name] = max(setting.finest, steps[setting.name] / 2)
