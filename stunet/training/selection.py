"""Which checkpoint of a pre-training will transfer best to a target, scored while it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stunet.errors import STUNetError
from stunet.files import atomic_path, write_json
from stunet.planning import PreprocessedDataset
from stunet.ranking import Target, prepare_target, score_candidate

__all__ = ["BEST_TRANSFER", "TransferSelection"]

BEST_TRANSFER = "checkpoint_best_transfer.pth"
"""The checkpoint with the highest score so far."""

_CURVE = "transfer_curve.json"
_N_CASES = 20


@dataclass(frozen=True)
class TransferSelection:
    """Scores checkpoints of a training for one target by CC-FV, and keeps the best one.

    Attributes:
        name: The target dataset.
        target: Its cases, the same ones with the same points throughout.
        folder: The fold's folder. ``transfer_curve.json`` there has all scores, and a training that is continued goes
            on with it.
        device: For the networks.
        log: Takes a line.
    """

    name: str
    target: Target
    folder: Path
    device: torch.device
    log: Callable[[str], Any]

    @classmethod
    def prepare(
        cls, dataset: PreprocessedDataset, folder: Path, device: torch.device, log: Callable[[str], Any]
    ) -> TransferSelection:
        """Draw cases and points of the target, so that what is wrong with it shows before the training.

        Raises:
            DatasetError: A case cannot be read.
            TransferabilityError: No two cases share a structure.
        """
        target = prepare_target(dataset, dataset.choose(dataset.cases, _N_CASES, seed=0))
        return cls(dataset.name, target, folder, device, log)

    def score(self, checkpoint: Path, epoch: int) -> None:
        """Score a checkpoint that was just written. What fails is logged: it must not end a training of weeks.

        Args:
            checkpoint: The file.
            epoch: Epochs that it was trained for.
        """
        try:
            result = score_candidate(checkpoint.name, checkpoint, self.target, device=self.device, n_resamples=200)
        except STUNetError as error:
            self.log(f"No transferability score for epoch {epoch}: {error}")
            return
        # Epochs from here on are of a run that was interrupted, and are done again.
        curve = [point for point in self.read_curve() if point["epoch"] < epoch]
        best = max((point["score"] for point in curve), default=-float("inf"))
        score = float(result.scores["ccfv"] or 0.0)
        if score > best or not (self.folder / BEST_TRANSFER).is_file():
            with atomic_path(self.folder / BEST_TRANSFER) as temporary:
                shutil.copyfile(checkpoint, temporary)
        interval = None if result.interval is None else list(result.interval)
        write_json([*curve, {"epoch": epoch, "score": score, "interval": interval}], self.folder / _CURVE)
        self.log(
            f"Transferability to {self.name} after epoch {epoch}: CC-FV {score:.4f}"
            f"{', the best so far' if score > best else f' (best {best:.4f})'}, in {result.seconds:.0f} s"
        )

    def read_curve(self) -> list[dict[str, Any]]:
        """Scores so far: ``epoch``, ``score`` and its ``interval``, in order. Empty where there are none to read."""
        try:
            return list(json.loads((self.folder / _CURVE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return []
