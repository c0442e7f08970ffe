"""Training data: latents with their texts, on disk or in memory."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ...errors import CheckpointError, DCMError, counted
from ...files.conditioning import Conditioning, load_conditioning
from ...files.tensor_file import TensorFile
from ...files.values import bytes_of
from .clips import Problem

LATENT = "latent"
# Characters of a clip's id. A checkpoint's header has those of all clips.
ID_LENGTH = 12

# What an image-to-video model takes besides the text, by the host's names.
ImageConditioning = Mapping[str, Tensor]


class Dataset(ABC):
    """Latents with their texts, by index.

    Attributes:
        fingerprint: identifies the data. Equal fingerprints mean the same latents and texts in the same order.
    """

    fingerprint: str

    @abstractmethod
    def __len__(self) -> int:
        """Number of clips."""

    @abstractmethod
    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of a latent: channels, frames, height, width."""

    @abstractmethod
    def latent(self, index: int) -> Tensor:
        """A latent in the VAE's own space, (channels, frames, height, width)."""

    @abstractmethod
    def captions(self, index: int) -> int:
        """Number of captions of a clip."""

    @abstractmethod
    def conditioning(self, index: int, caption: int = 0) -> Conditioning:
        """One of the texts of a clip."""

    @abstractmethod
    def unconditional(self) -> Conditioning:
        """The text of the negative prompt."""

    @abstractmethod
    def empty(self) -> Conditioning | None:
        """The empty text, which replaces dropped captions; None in a file that an earlier version saved."""

    @abstractmethod
    def sample_prompts(self) -> list[Conditioning]:
        """The texts of the sample videos; an empty list uses a caption."""

    @abstractmethod
    def image(self, index: int) -> ImageConditioning:
        """The image conditioning of a clip; empty for text to video. All clips have the same names."""

    @property
    def example(self) -> int:
        """The first clip that is not an image; the first image if there are only images."""
        return next((index for index in range(len(self)) if self.shape(index)[1] > 1), 0)

    @property
    @abstractmethod
    def clip_ids(self) -> list[str]:
        """For each clip a short hash of its latent, its text and the negative prompt."""

    def name(self, index: int) -> str:
        """What a message calls a clip."""
        return f"clip {index + 1}"

    def samples(self) -> list[tuple[Conditioning, int]]:
        """(text, clip) of each sample video: the sample prompts, else a caption. A video has the size of the clip and, for image to
        video, its images."""
        first = self.example
        # each prompt has the images of another clip
        step = 1 if self.image(first) else 0
        prompts = self.sample_prompts() or [self.conditioning(first)]
        return [(prompt, (first + number * step) % len(self)) for number, prompt in enumerate(prompts)]

    @property
    def buckets(self) -> list[list[int]]:
        """All indices, grouped by latent shape."""
        return self.buckets_of(range(len(self)))

    def buckets_of(self, indices: Iterable[int]) -> list[list[int]]:
        """These indices, grouped by latent shape."""
        found: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            found.setdefault(self.shape(index), []).append(index)
        return [found[shape] for shape in sorted(found)]

    def split(self, held_out: int, seed: int) -> tuple[list[int], list[int]]:
        """The indices to train on and `held_out` others, both in rising order. The choice depends on the seed alone.

        Raises:
            DCMError: no clip would be left to train on.
        """
        if not 0 <= held_out < len(self):
            raise DCMError(
                f"{held_out} of {counted(len(self), 'clip')} cannot be held out; expected 0 to {len(self) - 1}. "
                "Hold out fewer, or add clips."
            )
        order = random.Random(f"split {seed}").sample(range(len(self)), len(self))
        return sorted(order[held_out:]), sorted(order[:held_out])


@dataclass(frozen=True)
class Entry:
    """A clip in the cache.

    Attributes:
        latent, image: its files; `image` only for image to video.
        conditionings: files of its captions.
        size: width and height in pixels.
        shape: the latent's shape.
    """

    clip: Path
    captions: tuple[str, ...]
    latent: Path
    conditionings: tuple[Path, ...]
    size: tuple[int, int]
    shape: tuple[int, ...]
    image: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files that training reads."""
        return [self.latent, *self.conditionings, *([self.image] if self.image else [])]


@dataclass(frozen=True)
class CachedDataset(Dataset):
    """Encoded clips on disk. Nothing is kept in memory.

    Attributes:
        negative, nothing, prompts: files of the conditionings of negative prompt, empty text, and sample prompts.
        problems: the clips left out.
        notes: what the user should know about the other clips.
        others: ignored files, as lines of text.
    """

    entries: tuple[Entry, ...]
    negative: Path
    nothing: Path
    prompts: tuple[Path, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def shape(self, index: int) -> tuple[int, ...]:
        return self.entries[index].shape

    def latent(self, index: int) -> Tensor:
        """A latent from its file.

        Raises:
            DCMError: the file is missing or damaged.
        """
        path = self.entries[index].latent
        try:
            return _read(path)[LATENT]
        except KeyError as error:
            raise _lost(path, error) from error

    def captions(self, index: int) -> int:
        return len(self.entries[index].conditionings)

    def conditioning(self, index: int, caption: int = 0) -> Conditioning:
        """A text from its file.

        Raises:
            DCMError: the file is missing or damaged.
        """
        return _read_conditioning(self.entries[index].conditionings[caption])

    def unconditional(self) -> Conditioning:
        """The negative prompt from its file.

        Raises:
            DCMError: the file is missing or damaged.
        """
        return _read_conditioning(self.negative)

    def empty(self) -> Conditioning:
        """The empty text from its file.

        Raises:
            DCMError: the file is missing or damaged.
        """
        return _read_conditioning(self.nothing)

    def sample_prompts(self) -> list[Conditioning]:
        """The sample prompts from their files.

        Raises:
            DCMError: a file is missing or damaged.
        """
        return [_read_conditioning(path) for path in self.prompts]

    def image(self, index: int) -> ImageConditioning:
        """An image conditioning from its file.

        Raises:
            DCMError: the file is missing or damaged.
        """
        path = self.entries[index].image
        return {} if path is None else _read(path)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the files' names, which are hashes of their content. Samples do not change a run."""
        files = [path for entry in self.entries for path in entry.files]
        return hashlib.sha256("\n".join(path.name for path in (*files, self.negative)).encode()).hexdigest()

    @cached_property
    def clip_ids(self) -> list[str]:
        return [
            hashlib.sha256(" ".join(path.name for path in (*entry.files, self.negative)).encode()).hexdigest()[
                :ID_LENGTH
            ]
            for entry in self.entries
        ]

    def name(self, index: int) -> str:
        """The path of its video."""
        return str(self.entries[index].clip)

    def __str__(self) -> str:
        """One line: `12 clips, 3 sizes, 2 files left out`."""
        sizes = counted(len({entry.size for entry in self.entries}), "size")
        left_out = f", {counted(len(self.problems), 'file')} left out" if self.problems else ""
        return f"{counted(len(self), 'clip')}, {sizes}{left_out}"

    def report(self) -> str:
        """This line, then one line for each size, each clip left out, each note and each kind of ignored file."""
        sizes = Counter(entry.size for entry in self.entries)
        lines = [f"{width}x{height}: {count}" for (width, height), count in sorted(sizes.items())]
        left_out, notes = (f"left out {problem}" for problem in self.problems), (f"note {note}" for note in self.notes)
        return "\n".join([str(self), *lines, *left_out, *notes, *self.others])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return TensorFile(path).read_all()
    except CheckpointError as error:
        raise _lost(path, error) from error


def _read_conditioning(path: Path) -> Conditioning:
    try:
        return load_conditioning(path)
    except DCMError as error:
        raise _lost(path, error) from error


def _lost(path: Path, error: Exception) -> DCMError:
    return DCMError(
        f"{path.name} of the encoded data cannot be read ({error}). Restart the host and run DCM Video Dataset again."
    )


class TensorDataset(Dataset):
    """Data in memory.

    Args:
        latents: (channels, frames, height, width) each.
        conditionings: the texts.
        which: for every latent, the indices of its texts.
        unconditional: the text of the negative prompt.
        images: for every latent, its image conditioning; none for text to video.
        empty, sample_prompts: see `Dataset`.

    Raises:
        DCMError: there are no latents, or the texts or images do not fit them.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        conditionings: Sequence[Conditioning],
        which: Sequence[Sequence[int] | int],
        unconditional: Conditioning,
        images: Sequence[ImageConditioning] = (),
        empty: Conditioning | None = None,
        sample_prompts: Sequence[Conditioning] = (),
    ):
        texts = [[of_latent] if isinstance(of_latent, int) else list(of_latent) for of_latent in which]
        if not latents or len(latents) != len(texts) or not all(texts):
            found = f"{counted(len(latents), 'latent')} with {counted(len(texts), 'text')}"
            raise DCMError(f"The dataset has {found}; expected at least one latent, and one text for each.")
        indices = [index for of_latent in texts for index in of_latent]
        if not all(0 <= index < len(conditionings) for index in indices):
            raise DCMError(
                f"`which` has indices from {min(indices)} to {max(indices)}; expected 0 to {len(conditionings) - 1}."
            )
        if images and (len(images) != len(latents) or len({frozenset(image) for image in images}) > 1):
            raise DCMError(
                f"The dataset has {counted(len(latents), 'latent')} with {counted(len(images), 'image conditioning')}; expected one for "
                "each latent, all with the same parts."
            )
        self._latents, self._conditionings = list(latents), list(conditionings)
        self._texts, self._unconditional, self._images = texts, unconditional, list(images)
        self._empty, self._sample_prompts = empty, list(sample_prompts)

    def __len__(self) -> int:
        return len(self._latents)

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(self._latents[index].shape)

    def latent(self, index: int) -> Tensor:
        return self._latents[index]

    def captions(self, index: int) -> int:
        return len(self._texts[index])

    def conditioning(self, index: int, caption: int = 0) -> Conditioning:
        return self._conditionings[self._texts[index][caption]]

    def unconditional(self) -> Conditioning:
        return self._unconditional

    def empty(self) -> Conditioning | None:
        return self._empty

    def sample_prompts(self) -> list[Conditioning]:
        return self._sample_prompts

    def image(self, index: int) -> ImageConditioning:
        return self._images[index] if self._images else {}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tensors. Samples do not change a run."""
        captions = (self._conditionings[index] for texts in self._texts for index in texts)
        texts = [*captions, self._unconditional, *([self._empty] if self._empty else [])]
        images = (image[name] for image in self._images for name in sorted(image))
        return _hash_of([*self._latents, *(tensor for text in texts for tensor in _tensors_of(text)), *images])

    @cached_property
    def clip_ids(self) -> list[str]:
        return [_hash_of(self._tensors_of_clip(index))[:ID_LENGTH] for index in range(len(self))]

    def _tensors_of_clip(self, index: int) -> Iterator[Tensor]:
        yield self._latents[index]
        for text in (*(self._conditionings[caption] for caption in self._texts[index]), self._unconditional):
            yield from _tensors_of(text)
        yield from (tensor for _, tensor in sorted(self.image(index).items()))


def _tensors_of(text: Conditioning) -> list[Tensor]:
    values = (value for embedding, extras in text for value in (embedding, *extras.values()))
    return [value for value in values if isinstance(value, Tensor)]


def _hash_of(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
