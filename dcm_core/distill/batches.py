"""The videos, captions, noise and noise levels of each step. They depend on seed and step alone."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families import Family
from ..files.conditioning import Conditioning
from .backbone import Text
from .config import TrainingConfig, TrainingError
from .data.dataset import Dataset, ImageConditioning
from .data.order import BatchOrder
from .method.consistency import Batch
from .method.phases import Phases
from .parallel import Processes

# A clip's image conditioning and its x0 (1, ...) -> `Text.concat` and further `Text.extras`.
ImageIn = Callable[[ImageConditioning, Tensor], tuple[Tensor, dict[str, Tensor]]]


def generator_of(seed: int, step: int, element: int) -> torch.Generator:
    """The random generator for one video of one step. It does not depend on the process."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 65_537 + element) % 2**63)


@dataclass(frozen=True)
class Video:
    """One element of a batch, before stacking.

    Attributes:
        clip: its index in the dataset.
    """

    x0: Tensor
    text: Text
    no_text: Text
    generator: torch.Generator
    clip: int = 0

    @property
    def kind(self) -> tuple:
        """Videos of the same kind can be stacked."""
        texts = (self.text.context.shape, self.no_text.context.shape)
        return (tuple(self.x0.shape), *texts)

    def emptied(self, shape: tuple[int, ...]) -> "Video":
        """The same with zeros of `shape` (channels, frames, height, width) instead of its pictures."""

        def empty(text: Text) -> Text:
            if text.concat is None:
                return text
            return replace(text, concat=torch.zeros(1, text.concat.shape[1], *shape[1:]))

        return replace(self, x0=torch.zeros(shape), text=empty(self.text), no_text=empty(self.no_text))


def text_of(conditioning: Conditioning, family: Family, guidance: float | None) -> Text:
    """A conditioning in the form that the transformer takes. Masked text is cut to its valid tokens.

    Args:
        guidance: embedded guidance, for a transformer that uses it.

    Raises:
        TrainingError: an entry that the family needs is missing.
    """
    context, entries = conditioning[0]
    mask = entries.get("attention_mask")
    if mask is not None:
        context = context[:, mask[0].bool()]
    values = {**entries, "guidance": torch.tensor([guidance]) if guidance is not None else None}
    extras = {}
    for entry, argument in family.text_extras:
        value = values.get(entry)
        if value is None and entry == "guidance":
            continue
        if value is None:
            raise TrainingError(
                f"A caption's conditioning has no {entry}, which {family.title} needs. Encode the captions with a CLIP of type "
                f"{family.clip_type}."
            )
        extras[argument] = value.float().cpu()
    return Text(context.float().cpu(), extras)


def stacked(videos: Sequence[Video], phases: Phases, device: torch.device) -> Iterator[tuple[Batch, float]]:
    """Batches of videos of the same kind, each with its share of all videos."""
    kinds = {video.kind: None for video in videos}
    for kind in kinds:
        group = [video for video in videos if video.kind == kind]
        yield make_batch(group, phases, device), len(group) / len(videos)


def make_batch(videos: Sequence[Video], phases: Phases, device: torch.device) -> Batch:
    """Draw solver points and noise for each video from its own generator."""
    index = torch.cat([phases.draw(1, video.generator) for video in videos])
    level = torch.cat([phases.draw_above_phase(index[i : i + 1], video.generator) for i, video in enumerate(videos)])

    def noise() -> Tensor:
        return torch.stack([torch.randn(video.x0.shape, generator=video.generator) for video in videos]).to(device)

    return Batch(
        x0=torch.stack([video.x0 for video in videos]).to(device),
        text=_join([video.text for video in videos]).to(device),
        no_text=_join([video.no_text for video in videos]).to(device),
        noise=noise(),
        index=index,
        level=level,
        level_noise=noise(),
        clips=tuple(video.clip for video in videos),
    )


def _join(texts: Sequence[Text]) -> Text:
    extras = {name: torch.cat([text.extras[name] for text in texts]) for name in texts[0].extras}
    concats = [text.concat for text in texts if text.concat is not None]
    return Text(torch.cat([text.context for text in texts]), extras, torch.cat(concats) if concats else None)


class Batches:
    """The batches of a run.

    Args:
        indices: the clips of the dataset to train on.
        guidance: embedded guidance, for a transformer that uses it.
        latent_in: the host's scaling from VAE latents to the transformer's input.
        image_in: the host's conversion of an image conditioning. Text to video needs none.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        config: TrainingConfig,
        phases: Phases,
        family: Family,
        *,
        guidance: float | None,
        processes: Processes,
        device: torch.device,
        latent_in: Callable[[Tensor], Tensor],
        image_in: ImageIn | None = None,
    ):
        self._dataset, self._config, self._phases = dataset, config, phases
        self._family, self._guidance = family, guidance
        self._latent_in, self._image_in = latent_in, image_in
        self._processes, self._device = processes, device
        self.order = BatchOrder(dataset.buckets_of(indices), config.batch_size, config.seed)
        self._no_text = text_of(dataset.unconditional(), family, guidance)

    def of_step(self, step: int) -> Iterator[tuple[Batch, float]]:
        """This process's batches of a step, counted from 0, each with its share of the loss."""
        parts, count, size = self._config.gradient_accumulation_steps, self._processes.count, self._config.batch_size
        # processes take turns, so several of them train like one with as many more accumulated batches
        for turn in range(self._processes.rank, parts * count, count):
            chosen = self.order.batch(step * parts * count + turn)
            videos = [self._drawn(index, step, turn * size + position) for position, index in enumerate(chosen)]
            yield from ((batch, share / parts) for batch, share in self._stacked(videos))

    def clips_of_step(self, step: int) -> list[int]:
        """The clips in the batches of all processes of a step."""
        turns = self._config.gradient_accumulation_steps * self._processes.count
        return [index for turn in range(turns) for index in self.order.batch(step * turns + turn)]

    def samples(self) -> Iterator[tuple[Text, Tensor]]:
        """Text and latent of each sample video: see `Dataset.samples`."""
        for prompt, clip in self._dataset.samples():
            video = self._video(clip, generator_of(self._config.seed, 0, 0), prompt)
            yield video.text.to(self._device), video.x0[None].to(self._device)

    def held_out(self, position: int, index: int) -> Batch:
        """The batch of the `position`-th held-out clip. Its noise is the same each time."""
        batch, _ = next(self._stacked([self._video(index, generator_of(self._config.seed + 1, 0, position))]))
        return batch

    def empty(self, index: int, shape: tuple[int, ...]) -> Iterator[tuple[Batch, float]]:
        """Batches with zeros instead of a clip's latent.

        Args:
            shape: (videos, channels, frames, height, width).
        """
        videos = [self._video(index, generator_of(0, 0, element)) for element in range(shape[0])]
        return self._stacked([video.emptied(shape[1:]) for video in videos])

    def _drawn(self, index: int, step: int, element: int) -> Video:
        """A video with one of its captions, or the empty text."""
        seed = self._config.seed
        # noise does not depend on the captions; a string as seed gives the same numbers on every machine
        draw = random.Random(f"caption {seed} {step} {element}")
        dropped = draw.random() < self._config.caption_dropout
        empty = self._dataset.empty() if dropped else None
        text = empty or self._dataset.conditioning(index, draw.randrange(self._dataset.captions(index)))
        return self._video(index, generator_of(seed, step, element), text)

    def _video(self, index: int, generator: torch.Generator, conditioning: Conditioning | None = None) -> Video:
        """A video with a conditioning, by default its first caption."""
        text = text_of(conditioning or self._dataset.conditioning(index), self._family, self._guidance)
        no_text = self._no_text
        x0 = self._latent_in(self._dataset.latent(index)[None].float())
        if self._image_in is not None and (image := self._dataset.image(index)):
            # both see the image, as in the host: guidance is about the text
            concat, extras = self._image_in(image, x0)
            text, no_text = (replace(each, concat=concat, extras={**each.extras, **extras}) for each in (text, no_text))
        return Video(x0[0], text, no_text, generator, index)

    def _stacked(self, videos: Sequence[Video]) -> Iterator[tuple[Batch, float]]:
        return stacked(videos, self._phases, self._device)
