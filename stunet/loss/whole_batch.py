"""A batch whose loss is computed in pieces."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist

from stunet.errors import LossError
from stunet.loss.combination import Joint

__all__ = ["WholeBatch"]


class WholeBatch:
    """What the pieces of one batch must know of each other; see :meth:`PartialDiceCELoss.counted_in`.

    With deep supervision a loss is called once for each output, in the same order for each piece; each output has sums
    of its own.
    """

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._pieces = 0
        self._call = 0
        self._joined = False

    def begin_counting(self) -> None:
        """The next call of the loss is the first output of another piece.

        Raises:
            LossError: Some piece has been computed already, with the sums as they were.
        """
        if self._joined:
            raise LossError(
                "a piece that comes too late",
                got="a piece counted after another one was computed",
                expected="all pieces counted first",
                remedy="Count all pieces of a batch, then compute them; take another WholeBatch for another batch.",
            )
        self._pieces += 1
        self._call = 0

    def add(self, total: Tensor) -> None:
        """Add the sums of the present piece's next output."""
        if self._pieces == 1:
            self._totals.append(total)
        else:
            self._totals[self._call] += total
        self._call += 1

    def begin_computing(self, *, ddp: bool) -> None:
        """The next call of the loss is the first output of a piece; the first time, processes add up their sums."""
        if not self._joined and ddp:
            for total in self._totals:
                dist.all_reduce(total)
        self._joined = True
        self._call = 0

    def next_output(self) -> Joint:
        """Sums over the whole batch for the next output.

        Raises:
            LossError: So many outputs were not counted.
        """
        if self._call >= len(self._totals):
            raise LossError(
                "a piece of a batch that was not counted",
                got=f"output {self._call + 1} of a piece",
                expected=f"{len(self._totals)} outputs, as counted",
                remedy="Count every piece with all its outputs before one is computed.",
            )
        self._call += 1
        return Joint(self._totals[self._call - 1], self._pieces)
