"""What ``stunet info --gpu`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stunet.memory import Recommendation
    from stunet.sizes import STUNetSize

__all__ = ["Advice", "advise"]


@dataclass(frozen=True)
class Advice:
    """A recommendation for a size, and what it is for."""

    size: str
    gpu_bytes: int
    ranks: int
    found: Recommendation

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``settings`` is null where nothing fits; ``least`` are then those that need least memory."""
        found = self.found
        return {
            "gpu_bytes": self.gpu_bytes,
            "fits": found.fits,
            "settings": found.settings if found.fits else None,
            "least": None if found.fits else found.settings,
            "training_bytes": found.estimate.training_bytes,
        }

    def print(self) -> None:
        """Say it in a line or two."""
        from stunet.cli.console import human_bytes, stdout
        from stunet.memory import USABLE_SHARE

        needed, usable = self.found.estimate.training_bytes, USABLE_SHARE * self.gpu_bytes
        values = {True: "true", False: "false"}
        assigned = " ".join(f"{name}={values.get(value, value)}" for name, value in self.found.settings.items())
        typed = f"--set {assigned}" if assigned else "none needed"
        gpu = human_bytes(self.gpu_bytes)
        share = f"needs {human_bytes(needed)}, {human_bytes(usable)} usable"
        if self.found.fits:
            text = f"{self.size} on {gpu}: {typed}  ({share})"
        else:
            more = "" if self.ranks > 1 else ", or several GPUs (--ranks)"
            text = (
                f"{self.size} on {gpu}: does not fit, {human_bytes(needed - usable)} too little even with {typed} "
                f"({share}). Take a smaller patch or size{more}."
            )
        stdout.print(text, highlight=False, markup=False, soft_wrap=True)


def advise(size: STUNetSize, gpu: str, parallel: Any, batch_dice: bool, settings: dict[str, Any]) -> Advice:
    """Find the settings to train a size with.

    Args:
        size: The size.
        gpu: Memory of each GPU, as it is typed.
        parallel: As it is typed, or None.
        batch_dice: Whether the plans have it.
        settings: Arguments of :func:`stunet.memory.estimate` that are given.

    Raises:
        UsageError: No size of memory.
    """
    from stunet.inference import parse_memory
    from stunet.memory import recommend

    gpu_bytes = parse_memory(gpu, "--gpu")
    found = recommend(size, gpu_bytes, parallel=parallel, batch_dice=batch_dice, **settings)
    return Advice(size.name, gpu_bytes, settings["ranks"], found)
