"""Attach an expert table to a MODEL: rows of experts, full models and cfgs, each for a part of the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from ....dcm_core.errors import DCMError, ExpertError
from ....dcm_core.experts.expert import Expert
from ....dcm_core.experts.reader import WrongSideError, check_sizes
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.routing import own_timesteps
from ....dcm_core.table import Row, Span, Use, check_rows, overlap, strengths_in_words
from ....dcm_core.text import given, one_line
from ..folders import LORAS, path_of
from ..sampling.switch import Part, Sides, with_sides
from .adapters import is_proportional
from .attach import detach_experts, module_shapes, require_family, route_experts
from .expert_files import read_file
from .halves import check_half
from .route import AttachedExperts


@dataclass(frozen=True)
class ChosenExpert:
    """An expert that the user chose for a row: a file in `loras`, or one directly from its training."""

    strengths: tuple[float, ...]
    lora: str = ""
    trained: Expert | None = None

    @property
    def name(self) -> str:
        return "trained" if self.trained is not None else one_line(PurePath(self.lora).stem)

    def by_file(self) -> list[tuple[float, tuple[float, ...]]]:
        """(strength to read the file at, strengths of its steps). One, or one for each strength if it is not proportional."""
        if self.trained is not None or is_proportional(TensorFile(path_of(LORAS, self.lora, "lora")).shapes):
            return [(1.0, self.strengths)]
        apart = [
            (at, tuple(each if each == at else 0.0 for each in self.strengths)) for at in dict.fromkeys(self.strengths)
        ]
        return [(at, strengths) for at, strengths in apart if at] or [(1.0, self.strengths)]


@dataclass(frozen=True)
class ChosenRow:
    """A row as the user made it.

    Attributes:
        model: a full MODEL that runs these steps; None for the one that the table is attached to.
        cfg: None for the sampler's.
    """

    name: str
    span: Span
    experts: tuple[ChosenExpert, ...] = ()
    model: Any = None
    cfg: float | None = None

    @property
    def changes_more(self) -> bool:
        """Whether it changes the model or the cfg."""
        return self.model is not None or self.cfg is not None

    def __str__(self) -> str:
        words = [f"{expert.name}, strength {strengths_in_words(expert.strengths)}" for expert in self.experts]
        if self.model is not None:
            words.append("a model of its own")
        if self.cfg is not None:
            words.append(f"cfg {self.cfg:g}")
        return f"{one_line(self.name)}: {self.span}; {'; '.join(words) or 'the plain base'}"


def with_row(rows: Sequence[ChosenRow], row: ChosenRow) -> tuple[ChosenRow, ...]:
    """The rows and one more. Rows of one name and one interval are one row, with the experts of both.

    Raises:
        DCMError: another interval, model or cfg under the same name.
    """
    same = next((known for known in rows if known.name == row.name), None)
    if same is None:
        return (*rows, row)
    if same.span != row.span:
        raise DCMError(
            f"Two rows are named {given(row.name)}: {same.span} and {row.span}. Give each interval a name of its own."
        )
    for attribute in ("model", "cfg"):
        first, second = getattr(same, attribute), getattr(row, attribute)
        if None not in (first, second) and first != second:
            raise DCMError(
                f"Row {given(row.name)} has two different values of {attribute}. Set it on one of its nodes only."
            )
    joined = replace(
        same,
        experts=same.experts + row.experts,
        model=same.model if row.model is None else row.model,
        cfg=same.cfg if row.cfg is None else row.cfg,
    )
    return tuple(joined if known is same else known for known in rows)


def attach_table(model: Any, rows: Sequence[ChosenRow]) -> Any:
    """A clone of MODEL whose steps are run by the rows. Experts that are already attached are replaced.

    Rows without a model of their own also work on the models of the rows that they overlap.

    Raises:
        DCMError: rows that contradict each other, models that cannot share a trajectory, or experts that do not fit.
    """
    if not rows:
        raise DCMError("The expert table has no rows. Connect at least one DCM Expert node to rows.")
    check_rows([(Row(row.name, row.span), row.model is not None) for row in rows])
    require_family(model)
    clone = _attach(model, rows, lambda row: row.model is None)
    others = {}
    for row in rows:
        if row.model is not None and id(row.model) not in others:
            others[id(row.model)] = _attach(row.model, rows, _works_on(row.model, rows))
    parts = [
        Part(row.name, row.span, None if row.model is None else others[id(row.model)], row.cfg)
        for row in rows
        if row.changes_more
    ]
    return with_sides(clone, Sides(tuple(parts))) if parts else clone


def _works_on(model: Any, rows: Sequence[ChosenRow]) -> Callable[[ChosenRow], bool]:
    """Which rows' experts a full model gets: its own rows', and those without a model that may share a step with them."""
    own = [row.span for row in rows if row.model is model]

    def works(row: ChosenRow) -> bool:
        if row.model is not None:
            return row.model is model
        return any(overlap(row.span, span) is not False for span in own)

    return works


def _attach(model: Any, rows: Sequence[ChosenRow], works: Callable[[ChosenRow], bool]) -> Any:
    """A clone of one of the models with the experts that work on it.

    Args:
        works: whether a row's experts do.
    """
    routed: dict[str, Expert] = {}
    names: dict[Any, str] = {}
    attached: list[Row] = []
    for row in rows:
        uses = []
        for chosen in row.experts if works(row) else ():
            for strength, strengths in chosen.by_file():
                source = chosen.lora or id(chosen.trained), strength
                if source not in names:
                    taken = sum(name == chosen.name or name.startswith(f"{chosen.name} #") for name in routed)
                    names[source] = f"{chosen.name} #{taken + 1}" if taken else chosen.name
                    routed[names[source]] = _read(chosen, row, model, strength)
                uses.append(Use(names[source], strengths))
        attached.append(Row(row.name, row.span, tuple(uses), row.changes_more))
    used = {name for row in attached for name, strengths in row.uses if any(strengths)}
    facts = AttachedExperts(
        family=require_family(model).name,
        rows=tuple(attached),
        experts={name: str(expert) for name, expert in routed.items()},
        lines=tuple(map(str, rows)),
        timesteps=own_timesteps(expert.timesteps for expert in routed.values()),
    )
    return route_experts(
        detach_experts(model), {name: expert for name, expert in routed.items() if name in used}, facts
    )


def _read(chosen: ChosenExpert, row: ChosenRow, model: Any, strength: float) -> Expert:
    what = f"lora of row {given(row.name)} is {given(chosen.lora)}"
    if chosen.trained is not None:
        what, expert = f"expert of row {given(row.name)} does not fit", chosen.trained
        if expert.family != require_family(model).name:
            raise ExpertError(f"{what}: it is for {expert.family}. Connect an expert trained on this model.")
        try:
            check_sizes(expert, module_shapes(model))
        except ExpertError as error:
            raise ExpertError(f"{what}. {error}") from error
    else:
        path = path_of(LORAS, chosen.lora, "lora")
        try:
            # a plain LoRA has no side; an expert says its own
            expert = read_file(path, "semantic", model, what, strength)
        except WrongSideError as error:
            expert = read_file(path, error.side, model, what, strength)
    try:
        check_half(expert, expert.role, model)
    except ExpertError as error:
        raise ExpertError(f"{what}. {error}") from error
    return expert
