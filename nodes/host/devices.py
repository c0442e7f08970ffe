"""Where to compute outside a model."""

import comfy.model_management
import torch


def compute_device() -> torch.device:
    """Device for linear algebra on one layer at a time: CUDA, else the CPU, as other devices lack some of it (Apple's has no QR)."""
    device = comfy.model_management.get_torch_device()
    return device if device.type == "cuda" else torch.device("cpu")
