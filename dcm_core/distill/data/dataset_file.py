"""Training data in one safetensors file: latents, texts and image conditionings, to train without their encoders."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, DCMError, ExpertError
from ...files.conditioning import Conditioning, problem_of
from ...files.mapped import views
from ...files.metadata import parse_json
from ...files.tensor_file import MAX_HEADER, Progress, TensorFile
from ...files.values import bytes_of, cast, is_finite
from ...files.writing import write_stream
from .dataset import Dataset, ImageConditioning, TensorDataset

FORMAT = "dcm-dataset"


def write_dataset(
    path: str | os.PathLike,
    data: Dataset,
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write all of `data`, clip by clip. Equal texts are written once.

    Args:
        progress: called with (done, total) for each clip. It may raise to interrupt, which leaves no file.

    Raises:
        CheckpointError: there is not enough room on the disk, or a value is too large for the dtype.
    """
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    clips = range(len(data))
    texts: list[dict[str, float]] = []
    sources: list[Callable[[], Conditioning]] = []
    known: dict[str, int] = {}

    def number(read: Callable[[], Conditioning]) -> int:
        """The index of a text in the file."""
        tensors, numbers = _parts(read(), dtype)
        hashes = [
            (name, tuple(value.shape), hashlib.sha256(bytes_of(value)).hexdigest()) for name, value in tensors.items()
        ]
        key = repr(hashes + sorted(numbers.items()))
        if key not in known:
            known[key] = len(texts)
            for name, value in tensors.items():
                entries[f"text.{known[key]}.{name}"] = (value.dtype, tuple(value.shape))
            texts.append(numbers)
            sources.append(read)
        return known[key]

    which = [
        [number(partial(data.conditioning, clip, place)) for place in range(data.captions(clip))] for clip in clips
    ]
    contents = {
        "which": [own[0] if len(own) == 1 else own for own in which],
        "unconditional": number(data.unconditional),
        "empty": number(data.empty) if data.empty() else None,
        "sample_prompts": [number(partial(list, prompt)) for prompt in data.sample_prompts()],
        "texts": texts,
    }
    for index in clips:
        entries[f"latent.{index}"] = (dtype, data.shape(index))
        entries |= {f"image.{index}.{name}": (dtype, tuple(value.shape)) for name, value in data.image(index).items()}

    def each() -> Iterator[tuple[str, Tensor]]:
        for number, read in enumerate(sources):
            for name, value in _parts(read(), dtype)[0].items():
                yield f"text.{number}.{name}", value
        for index in clips:
            yield f"latent.{index}", cast(f"latent.{index}", data.latent(index), dtype)
            for name, value in data.image(index).items():
                yield f"image.{index}.{name}", cast(f"image.{index}.{name}", value, dtype)
            progress(index + 1, len(data))

    write_stream(path, entries, each(), {"format": FORMAT, "version": "1", "facts": json.dumps(contents)})


def _parts(text: Conditioning, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A text's tensors in the dtype of the file, and its numbers."""
    context, extras = text[0]
    tensors = {"context": context, **{name: value for name, value in extras.items() if isinstance(value, Tensor)}}
    numbers = {name: value for name, value in extras.items() if isinstance(value, (int, float))}
    return {
        name: cast(name, value, dtype) if value.is_floating_point() else value for name, value in tensors.items()
    }, numbers


def read_dataset(path: str | os.PathLike, progress: Progress = lambda done, total: None) -> TensorDataset:
    """Read the data back. The file is read once to verify it, and the tensors are views of it.

    Args:
        progress: see `write_dataset`.

    Raises:
        DCMError: the file contains no training data, or is damaged.
    """
    file = TensorFile(path)
    if file.metadata.get("format") != FORMAT:
        raise DCMError(f"{path} is not a dataset file. Choose a file that DCM Save Dataset wrote.")
    try:
        contents = parse_json(file.metadata["facts"], "metadata entry 'facts'", MAX_HEADER)
        which = [_indices(value) if isinstance(value, list) else _index(value) for value in contents["which"]]
        unconditional, empty = _index(contents["unconditional"]), contents.get("empty")
        samples = _indices(contents.get("sample_prompts", []))
        if not which:
            raise ValueError("it has no clips")
        file.verify(lambda *_: progress(0, len(which)))
        tensors = views(file)
        latents = [tensors.pop(f"latent.{index}") for index in range(len(which))]
        images = _images(len(which), tensors)
        texts = _texts(contents["texts"], tensors)
        for done, latent in enumerate(latents):
            if problem := _problem_of_latent(latent, latents[0]):
                raise ValueError(f"latent.{done} {problem}")
            progress(done + 1, len(latents))
        nothing = None if empty is None else texts[_index(empty)]
        return TensorDataset(
            latents, texts, which, texts[unconditional], images, nothing, [texts[sample] for sample in samples]
        )
    except CheckpointError:
        raise
    except ExpertError as error:
        raise DCMError(f"{path} is a damaged dataset file. Its {error}") from error
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DCMError(f"{path} is a damaged dataset file ({error}). Save the dataset again.") from error


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not the index of a text")
    return value


def _indices(values: Any) -> list[int]:
    if not isinstance(values, list):
        raise ValueError(f"{values!r} is not a list of texts")
    return [_index(value) for value in values]


def _images(clips: int, tensors: dict[str, Tensor]) -> list[ImageConditioning]:
    """The image conditionings of all clips, taken out of `tensors`; an empty list for text to video."""
    images: dict[str, dict[str, Tensor]] = {str(index): {} for index in range(clips)}
    for key in [key for key in tensors if key.startswith("image.")]:
        _, index, name = (*key.split(".", 2), "")[:3]
        if index not in images or not name:
            raise ValueError(f"{key} does not belong to any clip")
        value = images[index][name] = tensors.pop(key)
        if not value.is_floating_point() or not value.numel() or not is_finite(value):
            raise ValueError(f"{key} is not made of finite numbers")
    if len({frozenset(image) for image in images.values()}) > 1:
        raise ValueError("its clips have different parts of an image conditioning")
    return list(images.values()) if images["0"] else []


def _texts(numbers: list[dict[str, float]], tensors: Mapping[str, Tensor]) -> list[Conditioning]:
    """The texts from their numbers and all their `tensors`."""
    if not isinstance(numbers, list) or not all(isinstance(values, dict) for values in numbers):
        raise ValueError("its texts are not a list of entries")
    texts: dict[str, dict[str, Any]] = {f"text.{index}": dict(values) for index, values in enumerate(numbers)}
    for key, tensor in tensors.items():
        kind, index, name = (*key.split(".", 2), "", "")[:3]
        if f"{kind}.{index}" not in texts:
            raise ValueError(f"{key} does not belong to any text")
        texts[f"{kind}.{index}"][name] = tensor
    found = [[[extras.pop("context"), extras]] for extras in texts.values()]
    if problem := problem_of([text[0] for text in found]):
        raise ValueError(problem)
    if len(widths := {text[0][0].shape[2] for text in found}) > 1:
        raise ValueError(f"its texts have the widths {', '.join(map(str, sorted(widths)))}; expected one")
    return found


def _problem_of_latent(latent: Tensor, first: Tensor) -> str:
    if not latent.is_floating_point() or latent.ndim != 4 or not latent.numel() or len(latent) != len(first):
        return f"is {latent.dtype} of shape {tuple(latent.shape)}; expected numbers by channel, frame, row and column, as in latent.0"
    return "" if is_finite(latent) else "has NaN or infinite values"
