"""Where to compute outside a model."""

import comfy.model_management
import torch


def compute_device() -> torch.device:
    """The host's device, for work of one layer at a time."""
    return comfy.model_management.get_torch_device()
