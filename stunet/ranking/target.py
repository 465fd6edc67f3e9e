"""The target of a ranking: its cases, and the voxels of them at which every candidate is looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stunet.errors import TransferabilityError
from stunet.ranking.candidates import Target
from stunet.ranking.sampling import CasePoints, draw_points

__all__ = ["LabelledCase", "TargetCases", "prepare_target"]


class LabelledCase(Protocol):
    """One case, as :func:`stunet.planning.open_preprocessed` gives it."""

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """``(C, X, Y, Z)``."""

    @property
    def segmentation(self) -> npt.NDArray[np.int16]:
        """``(X, Y, Z)``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetCases:
    """Cases of a target dataset with the points drawn from them.

    Attributes:
        load: Reads a case by name. Images are read anew for each candidate: twenty CTs would not fit into memory.
        points: Points of each case, in order.
        structures: Name of each label value.
        target: What the plans say about networks.
        annotated: For each case the label values of the structures that it annotates. Where some are not, background is
            not known to be background.
        digest: SHA-256 over all images and segmentations, and what is annotated.
    """

    load: Callable[[str], LabelledCase]
    points: tuple[CasePoints, ...]
    structures: Mapping[int, str]
    target: Target
    annotated: Mapping[str, frozenset[int]]
    digest: str

    @property
    def points_digest(self) -> str:
        """SHA-256 over all points."""
        digest = hashlib.sha256()
        for drawn in self.points:
            for array in (drawn.balanced, drawn.labels, drawn.whole):
                digest.update(f"{drawn.case} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def is_complete(self, case: str) -> bool:
        """Whether a case annotates all structures."""
        return self.annotated[case] >= set(self.structures)

    @property
    def shared(self) -> dict[int, list[str]]:
        """For each structure in the points the cases that have it."""
        holders: dict[int, list[str]] = {}
        for drawn in self.points:
            for label in drawn.voxels:
                if label != 0:
                    holders.setdefault(label, []).append(drawn.case)
        return dict(sorted(holders.items()))


def prepare_target(
    load: Callable[[str], LabelledCase],
    cases: Sequence[str],
    *,
    structures: Mapping[int, str],
    target: Target,
    per_class: int = 100,
    n_whole: int = 1000,
    seed: int = 0,
    ignore_label: int | None = None,
    annotated: Callable[[str], frozenset[int]] | None = None,
    on_case: Callable[[str], Any] | None = None,
) -> TargetCases:
    """Read each case once and draw its points.

    Args:
        load: Reads a case by name.
        cases: Their names.
        structures: Name of each label value.
        target: What the plans say about networks.
        per_class: Voxels of each class in each case.
        n_whole: Voxels of the whole volume of each case.
        seed: For the points.
        ignore_label: Label of voxels that nobody annotated.
        annotated: Label values that a case annotates, by name; all structures where it is None.
        on_case: Called with the name of each case when it is done.

    Raises:
        DatasetError: A case cannot be read, or has no voxel to draw.
        TransferabilityError: No two cases that share a structure, so that nothing can be compared.
    """
    digest = hashlib.sha256()
    points = []
    known = {name: frozenset(structures) if annotated is None else annotated(name) for name in cases}
    for name in cases:
        case = load(name)
        digest.update(f"{sorted(known[name])}".encode())
        for array in (case.image, case.segmentation):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        points.append(
            draw_points(
                case.segmentation, case=name, per_class=per_class, n_whole=n_whole, seed=seed, ignore_label=ignore_label
            )
        )
        if on_case is not None:
            on_case(name)
    prepared = TargetCases(
        load=load,
        points=tuple(points),
        structures=dict(structures),
        target=target,
        annotated=known,
        digest=digest.hexdigest(),
    )
    _check_pairs(prepared)
    return prepared


def _check_pairs(prepared: TargetCases) -> None:
    shared = prepared.shared
    if any(len(cases) > 1 for cases in shared.values()):
        return
    names = prepared.structures
    found = "; ".join(f"{names.get(label, f'label {label}')} in {', '.join(cases)}" for label, cases in shared.items())
    raise TransferabilityError(
        "no two cases of the target that share a structure",
        got=f"{len(prepared.points)} cases; {found or 'no foreground at all'}",
        expected="at least one structure that occurs in two cases",
        remedy="Take more cases with --cases, or annotate more of them.",
    )
