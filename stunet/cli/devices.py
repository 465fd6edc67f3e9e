"""The device that a command computes on."""

from __future__ import annotations

__all__ = ["choose_device"]


def choose_device(device: str) -> str:
    """The device to compute on.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``; ``auto`` takes the first that is there of CUDA, MPS and the CPU.

    Raises:
        UsageError: Something else, or a device that PyTorch does not find.
    """
    from stunet.errors import UsageError

    if device not in ("auto", "cpu", "cuda", "mps"):
        raise UsageError("unknown device", got=device, expected="auto, cpu, cuda or mps", remedy="Correct --device.")
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        raise UsageError(
            "a device that PyTorch does not find",
            got=device,
            expected=f"one of {', '.join(name for name, there in available.items() if there)}",
            remedy="Choose another one with --device, or leave it out.",
        )
    return device
