"""Metadata of expert files: our `dcm.*` entries, and the LoRA scales that trainers write into a file or beside it.

None of this text is trusted. Size, depth, types and values are checked, and no pattern from a file is run.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import ExpertError
from ..pair import Pair, from_entry, to_entry
from ..routing import SIDES
from ..text import given, one_line

FORMAT = "1"

# Limits of a parsed text, in characters and levels of nesting.
LONGEST_TEXT, DEEPEST = 1 << 20, 32
MOST_TIMESTEPS, MOST_LAYERS = 1000, 5000

# Names of settings files beside a LoRA: PEFT (and tools that use it), FastVideo and DCM's own trainer.
SETTINGS_FILES = ("adapter_config.json", "lora_config.json")
# (metadata key, prefix of its entries) for settings inside a file: diffusers, finetrainers.
INNER_SETTINGS = (("lora_adapter_metadata", "transformer."), ("lora_config", ""))
ALPHAS, RANKS = ("lora_alpha", "alpha"), ("r", "lora_rank", "rank")

# PEFT's setting -> its name, for kinds of LoRA that do more than add a product to a layer's output.
UNROUTABLE_LORA = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "layer_replication": "made for replicated layers",
}
# Initialisations of a LoRA that subtract something from the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

TOKENS = re.compile(r'\\.|["\[\]{}]', re.DOTALL)
LAYER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


@dataclass(frozen=True)
class ExpertMetadata:
    """The `dcm.*` entries of a file's metadata; None for each missing one.

    Attributes:
        family, format: the text as written, which the caller compares.
        side: "semantic" or "detail".
        tensors: number of tensors that were written.
        rank, alpha: rank and alpha of one low-rank update, before any stacking.
        boundary: a sigma.
        timesteps: falling, within 0 to 1000.
        pair: for an expert of one of two full models.
    """

    family: str | None = None
    side: str | None = None
    format: str | None = None
    tensors: int | None = None
    rank: int | None = None
    alpha: float | None = None
    boundary: float | None = None
    timesteps: tuple[float, ...] | None = None
    pair: Pair | None = None


def read_metadata(metadata: Mapping[str, str]) -> ExpertMetadata:
    """Read our entries in a file's metadata.

    Raises:
        ExpertError: an entry is not valid.
    """
    side = metadata.get("dcm.expert")
    if side not in (None, *SIDES):
        raise _bad_entry("dcm.expert", side, "semantic or detail")
    boundary = _number(metadata, "dcm.boundary", "a number between 0 and 1")
    if boundary is not None and not 0 < boundary < 1:
        raise _bad_entry("dcm.boundary", metadata["dcm.boundary"], "a number between 0 and 1")
    return ExpertMetadata(
        said_family(metadata),
        side,
        metadata.get("dcm.format"),
        _count(metadata, "dcm.tensors"),
        _count(metadata, "dcm.rank"),
        _number(metadata, "dcm.alpha", "a number"),
        boundary,
        _timesteps(metadata),
        _pair(metadata),
    )


def level_entries(
    boundary: float | None, timesteps: Sequence[float] | None, pair: Pair | None = None
) -> dict[str, str]:
    """The `dcm.*` entries of an expert's noise levels and of its two models, as `read_metadata` reads them; none for None."""
    entries = {}
    if boundary is not None:
        entries["dcm.boundary"] = repr(boundary)
    if timesteps is not None:
        entries["dcm.timesteps"] = json.dumps(timesteps)
    if pair is not None:
        entries["dcm.pair"] = json.dumps(to_entry(pair))
    return entries


def said_family(metadata: Mapping[str, str]) -> str | None:
    """The family alone, even if other entries are not valid."""
    return metadata.get("dcm.family")


def _bad_entry(key: str, value: object, expected: str) -> ExpertError:
    return ExpertError(
        f"Its metadata says {key} = {given(value)}; expected {expected}. Save or download the file again."
    )


def _number(metadata: Mapping[str, str], key: str, expected: str) -> float | None:
    if key not in metadata:
        return None
    try:
        number = float(metadata[key])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _bad_entry(key, metadata[key], expected)
    return number


def _count(metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not (len(text) < 10 and text.isascii() and text.isdecimal()):
        raise _bad_entry(key, text, "a whole number")
    return int(text)


def _timesteps(metadata: Mapping[str, str]) -> tuple[float, ...] | None:
    text = metadata.get("dcm.timesteps")
    if text is None or text.strip() == "null":
        return None
    try:
        values = parse_json(text, "dcm.timesteps")
    except ExpertError:
        values = None
    steps = values if isinstance(values, list) and 0 < len(values) <= MOST_TIMESTEPS else [None]
    if not all(_is_number(step) and 0 < step <= 1000 for step in steps) or any(
        low >= high for high, low in pairwise(steps)
    ):
        raise _bad_entry("dcm.timesteps", text, "falling numbers within 0 to 1000, such as [1000.0, 912.4]")
    return tuple(map(float, steps))


def _pair(metadata: Mapping[str, str]) -> Pair | None:
    if (text := metadata.get("dcm.pair")) is None:
        return None
    try:
        found = from_entry(parse_json(text, "dcm.pair"))
    except ExpertError:
        found = None
    if found is None:
        raise _bad_entry("dcm.pair", text, "an id and a list of numbers for each of two models")
    return found


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def parse_json(text: str, what: str, longest: int = LONGEST_TEXT) -> Any:
    """Parse JSON of limited size and depth, without NaN and infinities.

    Raises:
        ExpertError: the text is something else. `what` says in the message where it is.
    """
    if len(text) > longest:
        raise ExpertError(
            f"{what} has {len(text):,} characters; expected at most {longest:,}. Save or download it again."
        )
    if _is_too_deep(text):
        raise ExpertError(f"{what} is nested more than {DEEPEST} levels deep. Save or download it again.")
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        raise ExpertError(f"{what} is not valid JSON ({error}). Save or download it again.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _is_too_deep(text: str) -> bool:
    """Checked before parsing, because deep nesting can exhaust the parser's stack."""
    depth = 0
    in_string = False
    for token in TOKENS.finditer(text):
        if token[0] == '"':
            in_string = not in_string
        elif not in_string and token[0] in "[{":
            depth += 1
            if depth > DEEPEST:
                return True
        elif not in_string and token[0] in "]}":
            depth -= 1
    return False


@dataclass(frozen=True)
class LoraSettings:
    """A trainer's settings for the scale of layers that store no alpha.

    Attributes:
        source: where they were found.
        alpha: alpha of every layer that is not in `alphas`.
        alphas: (name of a layer or its end, alpha). The first match counts. With a leading ^ the full name has to match.
        rank: rank of every layer that is not in `ranks`; None if it differs by layer or is unknown.
        root: whether alpha is divided by the square root of the rank (rsLoRA).
        ranks: the same as `alphas`, for ranks.
    """

    source: str
    alpha: float | None
    alphas: tuple[tuple[str, float], ...] = ()
    rank: int | None = None
    root: bool = False
    ranks: tuple[tuple[str, int], ...] = ()

    def scale(self, module: str, rank: int) -> float | None:
        """alpha / rank of a layer; None if these settings are for a file of another rank."""
        alpha = next((alpha for name, alpha in self.alphas if _is_for(name, module)), self.alpha)
        own = next((own for name, own in self.ranks if _is_for(name, module)), self.rank)
        if alpha is None or own not in (None, rank):
            return None
        return alpha / (math.sqrt(rank) if self.root else rank)


def _is_for(name: str, module: str) -> bool:
    return module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}"))


def lora_settings(metadata: Mapping[str, str], path: Path | None = None) -> LoraSettings | None:
    """A trainer's settings in a file's metadata, else beside the file, else None.

    kohya's `ss_network_alpha` does not count: converters keep it in files whose weights already include the scale.

    Raises:
        ExpertError: the settings cannot be read or are not valid.
    """
    for key, prefix in INNER_SETTINGS:
        if key in metadata:
            found = _settings(parse_json(metadata[key], f"Its metadata {key}"), f"its metadata {key}", prefix)
            if found.alpha is not None or found.alphas:
                return found
    for file in settings_beside(path) if path is not None else ():
        found = _settings(parse_json(_text_of(file), f"{file} beside the expert"), file.name, "")
        if found.alpha is not None or found.alphas:
            return found
    return None


def settings_beside(path: Path) -> list[Path]:
    """The settings files beside a LoRA file."""
    return [file for name in SETTINGS_FILES if (file := path.with_name(name)).is_file()]


def _text_of(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(LONGEST_TEXT + 1)
    except (OSError, ValueError) as error:
        raise ExpertError(f"{file} beside the expert cannot be read ({error}). Save or download it again.") from error


def _settings(values: Any, source: str, prefix: str) -> LoraSettings:
    if not isinstance(values, dict):
        raise ExpertError(f"{source} is not a table of settings. Save or download it again.")
    # there is no pipeline prefix if the layers were saved alone
    values = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)} or values
    if values.get("peft_type") is not None:
        return _peft_settings(values, source)
    inner = values.get("lora_params")
    values |= inner if isinstance(inner, dict) else {}
    patterns = _pattern(values.get("alpha_pattern"), "alpha_pattern", source)
    rank = _first_number(values, RANKS, source)
    return LoraSettings(
        source,
        _first_number(values, ALPHAS, source),
        tuple((_layer_name(name, source), alpha) for name, alpha in patterns.items()),
        None if values.get("rank_pattern") or rank is None else int(rank),
        values.get("use_rslora") is True,
    )


def _peft_settings(values: Mapping[str, Any], source: str) -> LoraSettings:
    """PEFT's settings, read with its own class. A missing setting counts as unknown, even if PEFT has a default."""
    if values["peft_type"] != "LORA":
        raise ExpertError(
            f"{source} is for the method {given(values['peft_type'])}. Experts use plain LoRA; only that can be switched during "
            "sampling."
        )
    alpha, rank = (
        None if values.get(name) is None else _alpha(name, values[name], source) for name in ("lora_alpha", "r")
    )
    config = _lora_config(values, source)
    if method := next((title for name, title in UNROUTABLE_LORA.items() if getattr(config, name, None)), None):
        raise ExpertError(
            f"{source} says that the LoRA is {method}, which cannot be switched during sampling. Convert it to plain LoRA, or load it "
            "with LoraLoaderModelOnly for all steps."
        )
    if str(config.init_lora_weights).split("_niter")[0] in CHANGES_BASE:
        raise ExpertError(
            f"{source} says init_lora_weights = {given(config.init_lora_weights)}: the LoRA needs the base that was changed with it. "
            "Save it with PEFT's path_initial_model_for_weight_conversion, which makes it a LoRA for the plain base."
        )
    alphas, ranks = (_pattern(getattr(config, name), name, source) for name in ("alpha_pattern", "rank_pattern"))
    plain = {_plain_name(name): int(value) for name, value in ranks.items()}
    if None in plain:  # the rank only shows whether the settings belong to the file, so its layers are not compared
        plain, rank = {}, None
    return LoraSettings(
        source,
        alpha,
        tuple((_layer_name(name, source), value) for name, value in alphas.items()),
        None if rank is None else int(rank),
        config.use_rslora is True,
        tuple(plain.items()),
    )


def _lora_config(values: Mapping[str, Any], source: str) -> Any:
    """PEFT's LoraConfig. Entries of newer versions are ignored, as in PEFT."""
    try:
        # imported here, as it imports transformers
        from peft import LoraConfig
    except ImportError as error:
        raise ExpertError(
            f"{source} needs the package peft, which cannot be imported ({error}). Install the pack's requirements.txt."
        ) from error
    known = {field.name for field in fields(LoraConfig)} - {"peft_type", "runtime_config"}
    try:
        return LoraConfig(**{name: value for name, value in values.items() if name in known})
    except Exception as error:  # values of wrong types can raise anything
        raise ExpertError(f"{source} is not a LoRA configuration of PEFT ({error}). Save the LoRA again.") from error


def _pattern(values: Any, name: str, source: str) -> dict[str, float]:
    """Layer name -> number."""
    if not isinstance(values or {}, dict) or len(values or {}) > MOST_LAYERS:
        raise ExpertError(
            f"{source}: {name} is {given(values)}; expected at most {MOST_LAYERS:,} layers with a number each. Save the LoRA again."
        )
    return {layer: _alpha(layer, value, source) for layer, value in (values or {}).items()}


def _first_number(values: Mapping[str, Any], names: tuple[str, ...], source: str) -> float | None:
    name = next((name for name in names if values.get(name) is not None), None)
    return None if name is None else _alpha(name, values[name], source)


def _alpha(name: str, value: Any, source: str) -> float:
    if not _is_number(value):
        raise ExpertError(
            f"{source}: {one_line(name)} is {given(value)}; expected a number. Correct it, or save the LoRA again."
        )
    return value


def _layer_name(pattern: str, source: str) -> str:
    """A PEFT pattern as a plain layer name, which it is in practice.

    Raises:
        ExpertError: it is a regular expression, which is not run because it may never finish.
    """
    if (name := _plain_name(pattern)) is None:
        raise ExpertError(
            f"{source}: alpha_pattern has {given(pattern)}, a regular expression; expected a plain layer name such as "
            "'blocks.0.self_attn.q'. Write one entry for each layer."
        )
    return name


def _plain_name(pattern: str) -> str | None:
    """The pattern as a plain name; None for a regular expression."""
    name = pattern.removesuffix("$").replace("\\.", ".")
    name = next((name[len(start) :] for start in (".*.", "(.*.)?") if name.startswith(start)), name)
    return name if LAYER_NAME.fullmatch(name.removeprefix("^")) else None
