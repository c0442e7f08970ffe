"""Training on two models that share a trajectory (Wan 2.2 A14B): one expert on each."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ....dcm_core.distill.config import TrainingConfig, TrainingError
from ....dcm_core.errors import CheckpointError
from ....dcm_core.experts.expert import Expert
from ....dcm_core.families import Family
from ....dcm_core.families.keymap import Shape
from ....dcm_core.files.checkpoint import recognise, without_prefix
from ....dcm_core.files.tensor_file import TensorFile
from ....dcm_core.pair import Fingerprint, Pair, fingerprint, make_pair, two_bases
from ....dcm_core.routing import Setup, Side
from ..experts.attach import image_channels
from ..experts.halves import MODELS, model_fingerprint, name_of
from ..sampling.switch import check_pair


def bases_of(model: Any, other_model: Any, side: Side) -> dict[Side, Fingerprint]:
    """The fingerprints of two models that share a trajectory. `side` is that of `model`.

    Raises:
        DCMError: models that cannot.
    """
    models = (model, other_model) if side == "semantic" else (other_model, model)
    check_pair(*models)
    return two_bases(*map(model_fingerprint, models))


def file_fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of a model in a file, without loading it.

    Raises:
        CheckpointError: not a model of a known family.
    """
    file = TensorFile(path)
    contents = recognise(file)
    if contents.family is None:
        raise CheckpointError(
            f"{path} is not a Wan model file. Name the high-noise model as `model` and the low-noise model as `detail_model`."
        )
    matched = contents.matched
    names = {without_prefix(key): key for key in file.shapes}
    if matched is not None:
        names = {name: pieces[0].source for name, pieces in matched.items() if len(pieces) == 1}
    return fingerprint(names, lambda name: file.read(names[name]))


def patch_shape(path: Path) -> Shape | None:
    """The shape of a model's patch embedding, in any layout: it tells width and input channels."""
    return next((shape for shape in TensorFile(path).shapes.values() if len(shape) == 5), None)


def pair_boundary(model: Any, family: Family, config: TrainingConfig) -> float | None:
    """The boundary of two models if none is chosen.

    Raises:
        TrainingError: the family has no default for two models.
    """
    found = Setup(family, two_models=True, takes_image=image_channels(model) > 0).boundary_for(config.boundary)
    if not family.pair_boundary and not config.boundary:
        raise TrainingError(
            f"boundary is 0, but {family.title} has no default for two models. Set boundary to the sigma where the low-noise model "
            "takes over."
        )
    return found


def checked_pair(
    bases: Mapping[Side, Fingerprint], config: TrainingConfig, family: Family, semantic: Expert | None
) -> Pair:
    """What a run on one of two models saves with its expert.

    Raises:
        TrainingError: one expert for all noise levels, or a semantic expert with other noise levels or models.
    """
    if config.shared:
        raise TrainingError(
            "shared is true, but with two models each expert is trained for its own side. Set shared to false, or train on one model."
        )
    pair = make_pair(bases, config.boundary, config.timesteps(family))
    if semantic is not None and (semantic.pair is None or semantic.pair.id != pair.id):
        raise TrainingError(
            f"{name_of(semantic)} was trained for other models or noise levels. Both experts of two models need the same models, "
            "boundary, shift and sample_steps. Set them as in the semantic expert's training."
        )
    return pair


def known_bases(model: Any, side: Side, experts: Iterable[Expert | None]) -> dict[Side, Fingerprint] | None:
    """The two models that experts were trained on, of which MODEL must be that of `side`; None if they were trained on one.

    Raises:
        TrainingError: MODEL is not the one.
    """
    expert = next((expert for expert in experts if expert is not None and expert.pair is not None), None)
    if expert is None:
        return None
    found = expert.pair.side_of(model_fingerprint(model))
    if found != side:
        what = f"the {MODELS[found]} model" if found else "neither the high-noise nor the low-noise model"
        raise TrainingError(
            f"The {side} expert of two models is trained on the {MODELS[side]} model, but model is {what} that {name_of(expert)} was "
            f"trained for. Connect the {MODELS[side]} model, in the same precision if possible."
        )
    return expert.pair.bases
