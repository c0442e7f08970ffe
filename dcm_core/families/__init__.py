"""The model families: data only. Add a family by adding its table here."""

from .family import Family
from .hunyuan_video import HUNYUAN_VIDEO
from .wan import WAN

FAMILIES: dict[str, Family] = {family.name: family for family in (WAN, HUNYUAN_VIDEO)}

__all__ = ["FAMILIES", "HUNYUAN_VIDEO", "WAN", "Family"]
