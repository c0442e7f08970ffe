"""Text embeddings to and from a safetensors file, so that a text encoder need not be loaded again.

A conditioning is the host's: a list of [embedding, extras]; the extras' tensors, numbers, strings and flags are kept.
"""

import json
import os
from typing import Any

import torch
from torch import Tensor

from .errors import DCMError
from .storage import TensorFile, write_tensors

FORMAT = "dcm-conditioning"
EMBEDDING = "cond"
Conditioning = list[list[Any]]


def save_conditioning(path: str | os.PathLike, conditioning: Conditioning, prompt: str = "") -> None:
    """Write a conditioning.

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
        values.append({})
        for name, value in {EMBEDDING: embedding, **extras}.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            elif value is None or isinstance(value, (bool, int, float, str)):
                values[-1][name] = value
            else:
                raise DCMError(
                    f"The conditioning holds `{name}`, a {type(value).__name__}; only tensors, numbers and text can be saved. "
                    "Save the conditioning right after the text encoder, before controls, hooks or masks are added."
                )
    metadata = {"format": FORMAT, "version": "1", "values": json.dumps(values), "prompt": prompt}
    write_tensors(path, tensors, metadata)


def load_conditioning(path: str | os.PathLike) -> Conditioning:
    """Read a conditioning back, bit for bit.

    Raises:
        DCMError: a file that is no saved conditioning.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} holds no saved conditioning. Choose a file that DCM Save Conditioning wrote.")
    try:
        values: list[dict[str, Any]] = json.loads(file.metadata["values"])
        entries: list[dict[str, Any]] = [dict(value) for value in values]
        for key in file.shapes:
            index, _, name = key.partition(".")
            entries[int(index)][name] = file.read(key)
        return [[entry.pop(EMBEDDING), entry] for entry in entries]
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise DCMError(f"{path} is a damaged conditioning file ({error!r}). Save the conditioning again.") from error


def describe_conditioning(conditioning: Conditioning) -> str:
    """A line about it: `1 prompt, 512 tokens of width 4096, torch.bfloat16`."""
    embedding = conditioning[0][0]
    plural = "s" if len(conditioning) > 1 else ""
    if not isinstance(embedding, torch.Tensor):
        return f"{len(conditioning)} prompt{plural}, no embedding"
    return f"{len(conditioning)} prompt{plural}, {embedding.shape[-2]} tokens of width {embedding.shape[-1]}, {embedding.dtype}"
