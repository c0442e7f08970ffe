"""Save and load text embeddings in a safetensors file, so that the text encoder is not needed again.

A conditioning is the host's list of [embedding, extras]. Tensors, numbers, strings and flags of the extras are kept.
"""

import json
import math
import os
from typing import Any

from torch import Tensor

from ..errors import DCMError, ExpertError, counted
from .metadata import parse_json
from .tensor_file import TensorFile
from .values import is_finite
from .writing import write_tensors

FORMAT = "dcm-conditioning"
Conditioning = list[list[Any]]


def save_conditioning(path: str | os.PathLike, conditioning: Conditioning, prompt: str = "") -> None:
    """Write a conditioning: embeddings as `0`, `1` ..., their extras as `0.pooled_output` ...

    Args:
        prompt: stored in the metadata, for people who look at the file.

    Raises:
        DCMError: there is nothing to save, the extras contain objects (controls, hooks, areas of models), or `problem_of` finds
            something.
    """
    if not conditioning:
        raise DCMError("The conditioning is empty. Connect the output of a text encode node.")
    tensors: dict[str, Tensor] = {}
    values: list[dict[str, Any]] = []
    for index, (embedding, extras) in enumerate(conditioning):
        if not isinstance(embedding, Tensor):
            raise DCMError("The conditioning has no text embedding. Connect the output of a text encode node.")
        tensors[str(index)] = _data(embedding)
        values.append({})
        for name, value in extras.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = _data(value)
            elif value is None or isinstance(value, (bool, int, float, str)):
                values[-1][name] = value
            else:
                raise DCMError(
                    f"The conditioning contains `{name}`, a {type(value).__name__}; only tensors, numbers and text can be saved. "
                    "Save the conditioning right after the text encoder, before controls, hooks or masks are added."
                )
    if problem := problem_of(conditioning):
        raise DCMError(f"The conditioning cannot be saved: {problem}. Connect the output of a text encode node.")
    metadata = {"format": FORMAT, "version": "1", "values": json.dumps(values), "prompt": prompt}
    write_tensors(path, tensors, metadata)


def _data(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def load_conditioning(path: str | os.PathLike) -> Conditioning:
    """Read a conditioning back, bit for bit.

    Raises:
        DCMError: the file is not a saved conditioning, or is damaged.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} is not a saved conditioning. Choose a file that DCM Save Conditioning wrote.")
    tensors = file.read_all()
    try:
        values = parse_json(file.metadata["values"], "metadata entry 'values'")
        if not values or not all(isinstance(extras, dict) for extras in values):
            raise ValueError("it has no list of entries")
        conditioning: Conditioning = [[tensors.pop(str(index)), dict(extras)] for index, extras in enumerate(values)]
        places = {str(index): extras for index, (_, extras) in enumerate(conditioning)}
        for key, tensor in tensors.items():
            index, dot, name = key.partition(".")
            if not dot or index not in places:
                raise ValueError(f"{key} does not belong to any entry")
            places[index][name] = tensor
        if problem := problem_of(conditioning):
            raise ValueError(problem)
        return conditioning
    except ExpertError as error:
        raise DCMError(f"{path} is a damaged conditioning file. Its {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DCMError(f"{path} is a damaged conditioning file ({error}). Save the conditioning again.") from error


def problem_of(conditioning: Conditioning) -> str:
    """Why samplers and training could not use it; empty if they can."""
    for index, (embedding, extras) in enumerate(conditioning):
        if not embedding.is_floating_point() or embedding.ndim != 3 or not embedding.numel():
            return f"embedding {index} is {embedding.dtype} of shape {tuple(embedding.shape)}; expected numbers by batch, token and width"
        for name, value in {"its embedding": embedding, **extras}.items():
            if problem := _problem_of_value(name, value, embedding):
                return f"{name} of entry {index} {problem}"
    return ""


def _problem_of_value(name: str, value: Any, embedding: Tensor) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}; expected a finite number"
    if not isinstance(value, Tensor):
        kind = value is None or isinstance(value, (bool, int, float, str))
        return "" if kind else f"is a {type(value).__name__}; expected a tensor, a number or text"
    batch, tokens, _ = embedding.shape
    expected = {"attention_mask": (batch, tokens), "pooled_output": (batch, *value.shape[1:2])}.get(
        name, tuple(value.shape)
    )
    if tuple(value.shape) != expected or not value.numel():
        return f"has shape {tuple(value.shape)}, which does not fit an embedding of shape {tuple(embedding.shape)}"
    return "has NaN or infinite values" if value.is_floating_point() and not is_finite(value) else ""


def describe_conditioning(conditioning: Conditioning) -> str:
    """One line of description: `1 prompt, 512 tokens of width 4096, torch.bfloat16`."""
    embedding = conditioning[0][0]
    prompts, tokens = counted(len(conditioning), "prompt"), counted(embedding.shape[-2], "token")
    return f"{prompts}, {tokens} of width {embedding.shape[-1]}, {embedding.dtype}"
