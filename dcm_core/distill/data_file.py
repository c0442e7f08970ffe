"""Training data in one safetensors file: latents and texts, to train where there is no VAE and no text encoder."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..conditioning import Conditioning
from ..errors import DCMError
from ..mapped import views
from ..storage import Progress, TensorFile, write_stream
from ..values import bytes_of
from .dataset import TensorData, TrainingData

FORMAT = "dcm-dataset"


def write_data(
    path: str | os.PathLike, data: TrainingData, dtype: torch.dtype = torch.bfloat16, progress: Progress = lambda done, total: None
) -> None:
    """Write all of `data`, clip by clip; texts that are the same are written once.

    Args:
        progress: called with (done, total) for each clip; may raise to interrupt, which leaves no file.

    Raises:
        CheckpointError: too little room on the disk.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    texts: list[dict[str, float]] = []
    sources: list[Callable[[], Conditioning]] = []
    known: dict[str, int] = {}
    which = []
    for read in (*(partial(data.conditioning, index) for index in range(len(data))), data.unconditional):
        tensors, numbers = _parts(read(), dtype)
        hashes = [(name, tuple(value.shape), hashlib.sha256(bytes_of(value)).hexdigest()) for name, value in tensors.items()]
        key = repr(hashes + sorted(numbers.items()))
        if key not in known:
            known[key] = len(texts)
            entries |= {f"text.{known[key]}.{name}": (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
            texts.append(numbers)
            sources.append(read)
        which.append(known[key])
    entries |= {f"latent.{index}": (dtype, data.shape(index)) for index in range(len(data))}
    facts = {"which": which[:-1], "unconditional": which[-1], "texts": texts}

    def each() -> Iterator[tuple[str, Tensor]]:
        for number, read in enumerate(sources):
            for name, value in _parts(read(), dtype)[0].items():
                yield f"text.{number}.{name}", value
        for index in range(len(data)):
            yield f"latent.{index}", data.latent(index).to(dtype)
            progress(index + 1, len(data))

    write_stream(path, entries, each(), {"format": FORMAT, "version": "1", "facts": json.dumps(facts)})


def _parts(text: Conditioning, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A text's tensors as they are written, and its numbers."""
    context, extras = text[0]
    tensors = {"context": context, **{name: value for name, value in extras.items() if isinstance(value, Tensor)}}
    numbers = {name: value for name, value in extras.items() if isinstance(value, (int, float))}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}, numbers


def read_data(path: str | os.PathLike, progress: Progress = lambda done, total: None) -> TensorData:
    """Read the data back; its tensors are views of the file.

    Args:
        progress: as for `write_data`.

    Raises:
        DCMError: a file that holds none, or a damaged one.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} holds no training data. Choose a file that DCM Save Dataset wrote.")
    try:
        facts, tensors = json.loads(file.metadata["facts"]), views(file)
        texts: list[Conditioning] = []
        for index, numbers in enumerate(facts["texts"]):
            start = f"text.{index}."
            values = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            texts.append([[values.pop("context"), {**values, **numbers}]])
        latents = []
        for index in range(len(facts["which"])):
            latents.append(tensors[f"latent.{index}"])
            progress(index + 1, len(facts["which"]))
        return TensorData(latents, texts, facts["which"], texts[facts["unconditional"]])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DCMError(f"{path} is a damaged data file ({error}). Save the dataset again.") from error
