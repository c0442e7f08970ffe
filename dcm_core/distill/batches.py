"""The videos, noise and noise levels of each step. They depend on seed and step alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..families import Family
from ..files.conditioning import Conditioning
from .backbone import Text
from .config import TrainingConfig, TrainingError
from .data.dataset import BatchOrder, Dataset
from .method.consistency import Batch
from .method.phases import Phases
from .parallel import Processes


def generator_of(seed: int, step: int, element: int) -> torch.Generator:
    """The random generator for one video of one step. It does not depend on the process."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 65_537 + element) % 2**63)


@dataclass(frozen=True)
class Video:
    """One element of a batch, before stacking."""

    x0: Tensor
    text: Text
    no_text: Text
    generator: torch.Generator

    @property
    def kind(self) -> tuple:
        """Videos of the same kind can be stacked."""
        texts = (self.text.context.shape, self.no_text.context.shape)
        return (tuple(self.x0.shape), *texts)


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
    )


def _join(texts: Sequence[Text]) -> Text:
    extras = {name: torch.cat([text.extras[name] for text in texts]) for name in texts[0].extras}
    return Text(torch.cat([text.context for text in texts]), extras)


class Batches:
    """The batches of a run.

    Args:
        indices: the clips of the dataset to train on.
        guidance: embedded guidance, for a transformer that uses it.
        latent_in: the host's scaling from VAE latents to the transformer's input.
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
    ):
        self._dataset, self._config, self._phases = dataset, config, phases
        self._family, self._guidance, self._latent_in = family, guidance, latent_in
        self._processes, self._device = processes, device
        self._size = config.batch_size * processes.count
        self.order = BatchOrder(dataset.buckets_of(indices), self._size, config.seed)
        self._no_text = text_of(dataset.unconditional(), family, guidance)

    def of_step(self, step: int) -> Iterator[tuple[Batch, float]]:
        """This process's batches of a step, counted from 0, each with its share of the loss."""
        parts = self._config.gradient_accumulation_steps
        for part in range(parts):
            chosen = self.order.batch(step * parts + part)
            videos = [
                self._video(index, generator_of(self._config.seed, step, part * self._size + position))
                for position, index in self._processes.share(chosen)
            ]
            yield from ((batch, share / parts) for batch, share in self._stacked(videos))

    def text(self, index: int) -> Text:
        """The caption of a clip."""
        return text_of(self._dataset.conditioning(index), self._family, self._guidance).to(self._device)

    def held_out(self, position: int, index: int) -> Batch:
        """The batch of the `position`-th held-out clip. Its noise is the same each time."""
        batch, _ = next(self._stacked([self._video(index, generator_of(self._config.seed + 1, 0, position))]))
        return batch

    def empty(self, index: int, shape: tuple[int, ...]) -> Iterator[tuple[Batch, float]]:
        """Batches with zeros instead of a clip's latent.

        Args:
            shape: (videos, channels, frames, height, width).
        """
        zeros = torch.zeros(shape[1:])
        return self._stacked([self._video(index, generator_of(0, 0, element), zeros) for element in range(shape[0])])

    def _video(self, index: int, generator: torch.Generator, x0: Tensor | None = None) -> Video:
        text = text_of(self._dataset.conditioning(index), self._family, self._guidance)
        x0 = self._latent_in(self._dataset.latent(index)[None].float())[0] if x0 is None else x0
        return Video(x0, text, self._no_text, generator)

    def _stacked(self, videos: Sequence[Video]) -> Iterator[tuple[Batch, float]]:
        return stacked(videos, self._phases, self._device)
