"""Which label is which structure, in files beside and within the predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import numpy.typing as npt

from stunet.errors import LabelError
from stunet.labels import match_names

__all__ = ["LabelNames", "colour_of", "label_names", "name_extension"]

_BACKGROUND, _IGNORE = "background", "ignore"


@dataclass(frozen=True)
class LabelNames:
    """The structures of a prediction.

    Attributes:
        structures: Label values of each structure, background left out. Regions have several, others one.
        restricted: Whether other structures of the model are left out, their voxels becoming background.
    """

    structures: Mapping[str, tuple[int, ...]]
    restricted: bool = False

    def restrict(self, labels: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Labels of the structures alone, the others as 0. Values keep their meaning: nothing is renumbered."""
        if not self.restricted:
            return labels
        table: npt.NDArray[Any] = np.zeros(np.iinfo(labels.dtype).max + 1, labels.dtype)
        for values in self.structures.values():
            table[list(values)] = values
        restricted: npt.NDArray[Any] = table[labels]
        return restricted

    def by_value(self) -> dict[str, str]:
        """Content of ``labels.json``: names by label value; regions that share values by all of theirs."""
        named = {",".join(map(str, values)): name for name, values in self.structures.items()}
        return {"0": _BACKGROUND, **dict(sorted(named.items(), key=lambda item: [int(v) for v in item[0].split(",")]))}


def label_names(dataset_json: Mapping[str, Any], chosen: Sequence[str] | None = None) -> LabelNames:
    """The structures of a model, or those of them that a user chose.

    Args:
        dataset_json: Content of ``dataset.json``.
        chosen: Names, in any usual spelling; None for all.

    Raises:
        LabelError: A name that the model does not know.
    """
    labels = {
        name: tuple(int(v) for v in values) if isinstance(values, list | tuple) else (int(values),)
        for name, values in dataset_json["labels"].items()
        if name != _IGNORE
    }
    known = {name: values for name, values in labels.items() if set(values) != {0}}
    if chosen is None:
        return LabelNames(known)
    matches = match_names(list(known), list(chosen))
    unknown = [name for name, match in matches.items() if match is None]
    if unknown or not chosen:
        raise LabelError(
            "structures that the model does not know",
            got=", ".join(unknown) or "none",
            expected=f"some of {', '.join(known)}",
            remedy="Correct --structures.",
        )
    found = {match for match in matches.values() if match is not None}
    return LabelNames({name: values for name, values in known.items() if name in found}, restricted=True)


def colour_of(value: int) -> tuple[float, float, float]:
    """Red, green and blue of a label from 0 to 1, well apart for labels that follow each other."""
    golden = 0.618033988749895  # steps by it never come back to a hue
    return colorsys.hsv_to_rgb((value * golden) % 1, (0.6, 0.8, 1)[value % 3], (1, 0.85)[value % 2])


def name_extension(names: LabelNames) -> Any:
    """A NIfTI header extension with names and colours, in the form that TotalSegmentator and Caret's programs read."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for name, values in names.structures.items():
        red, green, blue = (f"{c:.3f}" for c in colour_of(values[0]))
        label = {"Key": str(values[0]), "Red": red, "Green": green, "Blue": blue, "Alpha": "1"}
        ElementTree.SubElement(table, "Label", label).text = name
    ElementTree.SubElement(volume, "StudyMetaDataLinkSet")
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    content = ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True)
    return nib.nifti1.Nifti1Extension(0, content)
