"""The losses of the two training stages for one batch (paper, sections 3.3 and 3.4)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbone import Features, Text
from .consistency import Batch, Networks, per_video, predict
from .discriminator import Discriminator
from .losses import discriminator_hinge, feature_matching, generator_hinge, pseudo_huber, temporal_coherence
from .phases import Phases

Terms = dict[str, Tensor]
TeacherFeatures = Callable[[Tensor, Tensor, Text], Features]


@dataclass(frozen=True)
class SemanticStage:
    """Consistency and temporal coherence at high noise."""

    phases: Phases
    cfg: float = 5.0
    temporal_weight: float = 1.0

    def losses(self, networks: Networks, batch: Batch) -> tuple[Tensor, Terms]:
        """The student's loss and its terms."""
        pred, target = predict(networks, batch, self.phases, self.cfg)
        huber = pseudo_huber(pred, target)
        temporal = temporal_coherence(pred, target)
        return huber + self.temporal_weight * temporal, {"huber": huber.detach(), "temporal": temporal.detach()}


@dataclass(frozen=True)
class DetailStage:
    """Consistency, adversarial and feature matching losses at low noise.

    The adversarial and the feature matching loss compare features of pred and target in the frozen teacher. Both videos are
    noised from the end of their phase to the same random level with the same noise.
    """

    phases: Phases
    cfg: float = 5.0
    adversarial_weight: float = 0.1
    gan_weight: float = 5.0
    feature_weight: float = 10.0

    def losses(
        self,
        networks: Networks,
        batch: Batch,
        features: TeacherFeatures | None = None,
        discriminator: Discriminator | None = None,
    ) -> tuple[Tensor, Terms, Callable[[], Tensor] | None]:
        """The student's loss, its terms, and a function that returns the discriminator's loss on the same videos.

        Args:
            features: the teacher's features; None trains with the consistency loss alone.
        """
        pred, target = predict(networks, batch, self.phases, self.cfg)
        huber = pseudo_huber(pred, target)
        if features is None or discriminator is None or self.adversarial_weight == 0:
            return huber, {"huber": huber.detach()}, None
        sigma = self.phases.previous[batch.level].to(pred.device)
        end = self.phases.ends(batch.index).to(pred.device)
        fake = features(renoise(pred, batch.level_noise, end, sigma), sigma, batch.text)
        with torch.no_grad():
            real = features(renoise(target, batch.level_noise, end, sigma), sigma, batch.text)
        # no gradient for the discriminator here: it learns from its own loss
        discriminator.requires_grad_(False)
        gan = self.gan_weight * generator_hinge(discriminator(fake.raw, fake.grid))
        discriminator.requires_grad_(True)
        matching = self.feature_weight * feature_matching(fake.projected, real.projected)
        loss = huber + self.adversarial_weight * (gan + matching)
        fake_raw = [feature.detach() for feature in fake.raw]

        def discriminator_loss() -> Tensor:
            return discriminator_hinge(discriminator(real.raw, real.grid), discriminator(fake_raw, fake.grid))

        return (
            loss,
            {"huber": huber.detach(), "gan": gan.detach(), "feature_matching": matching.detach()},
            discriminator_loss,
        )


def renoise(video: Tensor, noise: Tensor, end: Tensor, sigma: Tensor) -> Tensor:
    """Add noise from the phase's end to the level `sigma`: ((1 - sigma) video + (sigma - end) noise) / (1 - end)."""
    end, sigma = per_video(end, video), per_video(sigma, video)
    return ((1 - sigma) * video + (sigma - end) * noise) / (1 - end)
