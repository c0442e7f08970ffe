"""The losses of a run in files beside its checkpoints: a table, and TensorBoard's events where it is installed."""

import csv
import io
import logging
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.unfinished import write_bytes
from ..text import LOGGER
from .checkpoint_file import History
from .config import TrainingConfig
from .divergence import is_skipped
from .learner import learning_rate_at

logger = logging.getLogger(LOGGER)

TABLE, EVENTS = "losses.csv", "tensorboard"
# The table's first columns. The losses follow.
FIRST_COLUMNS = ("step", "learning_rate", "steps_per_second", "skipped")
# Steps whose mean time gives the speed.
RECENT = 20


class RunLog:
    """Writes every step of a run to files, and measures its speed.

    Attributes:
        rate: the learning rate of the last step.
        speed: steps a second; 0 before it is known.
    """

    def __init__(self, folder: Path, config: TrainingConfig):
        self.rate = self.speed = 0.0
        self._path, self._config = folder / TABLE, config
        self._times: deque[float] = deque(maxlen=RECENT + 1)
        self._columns: list[str] = []
        self._events: Any = None
        self._with_events = True

    def step(self, history: History) -> None:
        """Write the last step. Files that cannot be written are reported and do not end the run."""
        step, entry = len(history), history[-1]
        self._times.append(time.monotonic())
        # no time at all on a coarse clock
        passed = self._times[-1] - self._times[0]
        self.speed = (len(self._times) - 1) / passed if passed else 0.0
        self.rate = learning_rate_at(step - 1, self._config)
        row = {**entry, "step": step, "learning_rate": self.rate, "skipped": int(is_skipped(entry))}
        if self.speed:
            row["steps_per_second"] = self.speed
        try:
            self._write(row, history)
        except (OSError, CheckpointError) as error:
            # the next step writes all of it
            self._columns = []
            logger.warning("%s cannot be written (%s). It will be tried again after the next step.", self._path, error)
        try:
            self._add_events(row, step)
        except Exception as error:
            # the package may be broken, or the disk full
            self._events, self._with_events = None, False
            logger.warning("TensorBoard's events cannot be written (%s). The losses are in %s alone.", error, TABLE)

    def seconds_left(self, steps: int) -> float:
        """Seconds that this many steps take; 0 if the speed is not known."""
        return steps / self.speed if self.speed else 0.0

    def close(self) -> None:
        """Write what is still in memory."""
        if self._events is not None:
            self._events.close()

    def _add_events(self, row: dict[str, Any], step: int) -> None:
        """Add the step for TensorBoard, if that is installed."""
        if not self._with_events:
            return
        if self._events is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self._with_events = False
                return
            # an earlier run may have got further than its checkpoint: its steps from this one on are replaced
            self._events = SummaryWriter(str(self._path.with_name(EVENTS)), purge_step=step)
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, step)

    def _write(self, row: dict[str, Any], history: History) -> None:
        """Append a row. The table is written again at first, and when there is a new column."""
        if row.keys() <= set(self._columns):
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            return
        # earlier runs may have got further than the checkpoint, so the history says which steps there are
        known = _read(self._path)
        rows = [
            {**known.get(step, {}), **entry, "step": step, "skipped": int(is_skipped(entry))}
            for step, entry in enumerate(history[:-1], start=1)
        ]
        columns = list(dict.fromkeys([*FIRST_COLUMNS, *(name for each in [*rows, row] for name in each)]))
        write_bytes(self._path, _as_table(columns, [*rows, row]).encode())
        self._columns = columns


def _read(path: Path) -> dict[int, dict[str, str]]:
    """Step -> row of a table; empty if there is none that can be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {int(row["step"]): row for row in csv.DictReader(file) if None not in row}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}


def _as_table(columns: list[str], rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
