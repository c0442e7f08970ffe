"""The model families, as data only. To add a family, add its table here."""

from .family import Family
from .hunyuan_video import HUNYUAN_VIDEO
from .wan import WAN

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, HUNYUAN_VIDEO)}

# Title -> timesteps of a schedule, largest first.
PRESETS: dict[str, tuple[float, ...]] = {
    title: timesteps
    for family in FAMILIES.values()
    for title, timesteps in {family.preset.title: family.preset.timesteps, **family.pair_timesteps}.items()
}

__all__ = ["FAMILIES", "HUNYUAN_VIDEO", "PRESETS", "WAN", "Family"]
