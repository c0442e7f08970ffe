"""Training data in one safetensors file: latents and texts, to train where there is no VAE and no text encoder."""

import hashlib
import json
import os

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..errors import DCMError
from ..storage import Progress, TensorFile, bytes_of, write_tensors
from .dataset import TensorData, TrainingData

FORMAT = "dcm-dataset"


def write_data(
    path: str | os.PathLike, data: TrainingData, dtype: torch.dtype = torch.bfloat16, progress: Progress = lambda done, total: None
) -> None:
    """Write all of `data`; texts that are the same are written once.

    Args:
        progress: called with (done, total) for each clip; may raise to interrupt, which leaves no file.

    Raises:
        DCMError: texts with extras that are no tensors or numbers.
        CheckpointError: too little room on the disk.
    """
    tensors: dict[str, Tensor] = {}
    texts: list[dict[str, float]] = []
    known: dict[str, int] = {}
    which = []
    for index in range(len(data)):
        which.append(_add_text(data.conditioning(index), tensors, texts, known, dtype))
        tensors[f"latent.{index}"] = data.latent(index).to(dtype).contiguous()
        progress(index + 1, len(data))
    unconditional = _add_text(data.unconditional(), tensors, texts, known, dtype)
    facts = {"which": which, "unconditional": unconditional, "texts": texts}
    write_tensors(path, tensors, {"format": FORMAT, "version": "1", "facts": json.dumps(facts)})


def _add_text(
    text: Conditioning, tensors: dict[str, Tensor], texts: list[dict[str, float]], known: dict[str, int], dtype: torch.dtype
) -> int:
    """Number of the text among those written."""
    context, extras = text[0]
    values = {"context": context, **{name: value for name, value in extras.items() if isinstance(value, Tensor)}}
    numbers = {name: value for name, value in extras.items() if isinstance(value, (int, float))}
    hashes = [(name, tuple(value.shape), hashlib.sha256(bytes_of(value)).hexdigest()) for name, value in values.items()]
    key = repr(hashes + sorted(numbers.items()))
    if key not in known:
        known[key] = len(texts)
        texts.append(numbers)
        for name, value in values.items():
            kept = value.to(dtype) if value.is_floating_point() else value
            tensors[f"text.{known[key]}.{name}"] = kept.contiguous().clone()
    return known[key]


def read_data(path: str | os.PathLike, progress: Progress = lambda done, total: None) -> TensorData:
    """Read the data back.

    Args:
        progress: as for `write_data`.

    Raises:
        DCMError: a file that holds none, or a damaged one.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} holds no training data. Choose a file that DCM Save Dataset wrote.")
    try:
        facts = json.loads(file.metadata["facts"])
        texts: list[Conditioning] = []
        for index, numbers in enumerate(facts["texts"]):
            start = f"text.{index}."
            values = {key.removeprefix(start): file.read(key) for key in file.shapes if key.startswith(start)}
            texts.append([[values.pop("context"), {**values, **numbers}]])
        latents = []
        for index in range(len(facts["which"])):
            latents.append(file.read(f"latent.{index}"))
            progress(index + 1, len(facts["which"]))
        return TensorData(latents, texts, facts["which"], texts[facts["unconditional"]])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DCMError(f"{path} is a damaged data file ({error}). Save the dataset again.") from error
