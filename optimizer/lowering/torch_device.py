"""The GPU that the installed PyTorch can use."""

from __future__ import annotations


def cuda_device() -> str | None:
    """Name of the GPU and version of CUDA, None if PyTorch can use no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
