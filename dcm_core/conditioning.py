"""Text embeddings to and from a safetensors file, so that a text encoder need not be loaded again.

A conditioning is the host's: a list of [embedding, extras]; the extras' tensors, numbers, strings and flags are kept.
"""

import json
import os
from typing import Any

from torch import Tensor

from .errors import DCMError, counted
from .storage import TensorFile, write_tensors

FORMAT = "dcm-conditioning"
Conditioning = list[list[Any]]


def save_conditioning(path: str | os.PathLike, conditioning: Conditioning, prompt: str = "") -> None:
    """Write a conditioning: embeddings as `0`, `1` ..., their extras as `0.pooled_output` ...

    Args:
        prompt: kept in the metadata, for people who look at the file.

    Raises:
        DCMError: nothing to save, or extras that are more than data (controls, hooks, areas of models).
    """
    if not conditioning:
        raise DCMError("The conditioning is empty. Connect the output of a text encode node.")
    tensors: dict[str, Tensor] = {}
    values: list[dict[str, Any]] = []
    for index, (embedding, extras) in enumerate(conditioning):
        if not isinstance(embedding, Tensor):
            raise DCMError("The conditioning holds no text embedding. Connect the output of a text encode node.")
        tensors[str(index)] = _data(embedding)
        values.append({})
        for name, value in extras.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = _data(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                values[-1][name] = value
            else:
                raise DCMError(
                    f"The conditioning holds `{name}`, a {type(value).__name__}; only tensors, numbers and text can be saved. "
                    "Save the conditioning right after the text encoder, before controls, hooks or masks are added."
                )
    metadata = {"format": FORMAT, "version": "1", "values": json.dumps(values), "prompt": prompt}
    write_tensors(path, tensors, metadata)


def _data(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def load_conditioning(path: str | os.PathLike) -> Conditioning:
    """Read a conditioning back, bit for bit.

    Raises:
        DCMError: a file that is no saved conditioning, or a damaged one.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} holds no saved conditioning. Choose a file that DCM Save Conditioning wrote.")
    try:
        values = json.loads(file.metadata["values"])
        if not values or not all(isinstance(extras, dict) for extras in values):
            raise ValueError("no list of entries")
        conditioning: Conditioning = [[file.read(str(index)), dict(extras)] for index, extras in enumerate(values)]
        for key in file.shapes:
            index, dot, name = key.partition(".")
            if not index.isdecimal() or int(index) >= len(values):
                raise ValueError(f"{key} belongs to no entry")
            if dot:
                conditioning[int(index)][1][name] = file.read(key)
        return conditioning
    except (KeyError, ValueError, TypeError) as error:
        raise DCMError(f"{path} is a damaged conditioning file ({error}). Save the conditioning again.") from error


def describe_conditioning(conditioning: Conditioning) -> str:
    """A line about it: `1 prompt, 512 tokens of width 4096, torch.bfloat16`."""
    embedding = conditioning[0][0]
    prompts, tokens = counted(len(conditioning), "prompt"), counted(embedding.shape[-2], "token")
    return f"{prompts}, {tokens} of width {embedding.shape[-1]}, {embedding.dtype}"
