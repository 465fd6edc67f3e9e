"""The files of predictions: of each case labels, masks, statistics and a preview, and of a folder its manifest.

Each file is written atomically, and the label map of a case last: where it stands, its other files do.
"""

import colorsys
import csv
import errno
import hashlib
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
import numpy.typing as npt

from stunet.datasets.raw import plane_names
from stunet.errors import DatasetError, UsageError, reading
from stunet.files import atomic_path, file_sha256, fingerprint, move_into_place, read_json, write_json
from stunet.inference.images import Case, CaseArray, resample_image
from stunet.inference.model import Model
from stunet.volumes import NIFTI_ENDINGS
from stunet.weights.read import MODEL_CARD

EXTRAS = ("masks", "statistics", "names_in_header", "preview")
"""What can be written beside the label map of a case."""

MANIFEST_NAME = "manifest.json"
"""Beside the predictions; under ``settings`` and ``images`` is what later predictions must agree with."""

_MM3_PER_ML = 1000.0
_MAX_IN_LEGEND = 60

Array = npt.NDArray[Any]
Structures = Mapping[str, tuple[int, ...]]


def write_case(
    labelled: CaseArray, model: Model, folder: Path, structures: Structures, write: Collection[str], *, lowres: bool
) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Write all files of a case whose labels were predicted.

    These are ``masks``, one for each structure in ``CASE/segmentations/NAME.nii.gz`` as TotalSegmentator lays them out;
    ``statistics``, volume and mean intensity of each structure; ``preview``, three planes through the image with the
    labels over them; and ``names_in_header``, the structures' names in the header of the label map.

    Returns:
        Labels, voxels and volume of each structure that was found; and what is missing and why, as a picture that
        cannot be drawn does not cost the labels.

    Raises:
        OSError: The disk is full.
    """
    case, properties, scratch = labelled.case, labelled.properties, labelled.path.parent
    reader = model.plans_manager.image_reader_writer_class()
    labels = np.load(labelled.path, mmap_mode="r")
    labels = labels if structures == model.structures else restrict(labels, structures)
    crop = None
    if lowres:
        properties, crop = coarse_grid(properties, labels.shape, model.plans_manager.transpose_backward)
    finished = scratch / f"{case.name}{model.file_ending}"
    _write_labels(reader, labels, properties, finished)
    if "names_in_header" in write:
        image: Any = nib.load(finished)
        named, header = finished.with_name(f"named.{finished.name}"), image.header
        header.extensions.append(name_extension(structures))
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), None, header), named)
        os.replace(named, finished)
    for name, values in structures.items() if "masks" in write else ():
        mask, place = scratch / "mask.nii.gz", folder / case.name / "segmentations"
        place.mkdir(parents=True, exist_ok=True)
        inside = labels == values[0] if len(values) == 1 else np.isin(labels, values)
        _write_labels(reader, inside.view(np.uint8), properties, mask)
        move_into_place(mask, place / f"{name.replace(os.sep, '_')}.nii.gz")
    problem, spacing = None, properties["spacing"]
    voxels: Any = ()
    if "statistics" in write or "preview" in write:
        voxels, original = reader.read_images([str(path) for path in case.files])
        if crop is not None:
            voxels = np.stack([channel[crop] for channel in voxels])
            voxels = resample_image(voxels, labels.shape, original["spacing"], spacing, order=1, force_separate_z=False)
    measured = measure(labels, structures, spacing, voxels if "statistics" in write else ())
    if "statistics" in write:
        (folder / "statistics").mkdir(exist_ok=True)
        content = {name: {key: of[key] for key in of if key != "labels"} for name, of in measured.items()}
        write_json(content, folder / "statistics" / f"{case.name}.json")
    if "preview" in write:
        (folder / "previews").mkdir(exist_ok=True)
        try:
            with atomic_path(folder / "previews" / f"{case.name}.png") as path:
                planes = plane_names(properties)
                draw_preview(voxels[0], labels, structures, spacing, path, title=case.name, planes=planes)
        except Exception as error:
            problem = f"no preview: {type(error).__name__}: {str(error)[:200]}"
    move_into_place(finished, folder / finished.name)
    return find_structures(measured), problem


def restrict(labels: Array, structures: Structures) -> Array:
    """Keep the labels of these structures, the others as 0. Values keep their meaning: nothing is renumbered."""
    table = np.zeros(np.iinfo(labels.dtype).max + 1, labels.dtype)
    for values in structures.values():
        table[list(values)] = values
    return np.asarray(table[labels])


def measure(
    labels: Array, structures: Structures, spacing: Sequence[float], image: Iterable[Array] = ()
) -> dict[str, dict[str, Any]]:
    """Measure the structures of labels ``(Z, Y, X)``, with an image of any number of channels ``(Z, Y, X)``.

    Returns:
        For each structure ``labels``, ``voxels``, ``volume_ml`` (None where the image is flat) and ``mean_intensity``:
        one number for each channel, None where the structure has no voxels.
    """
    n_labels, voxel = np.iinfo(labels.dtype).max + 1, math.prod(float(side) for side in spacing) / _MM3_PER_ML
    # Plane by plane, as counting takes 8 bytes for each voxel.
    counts: Any = sum(np.bincount(plane.reshape(-1), minlength=n_labels) for plane in labels)
    sums: list[Any] = [
        sum(np.bincount(p.ravel(), of.ravel(), minlength=n_labels) for p, of in zip(labels, channel, strict=True))
        for channel in image
    ]
    measured = {}
    for name, values in structures.items():
        n = int(counts[list(values)].sum())
        means = [round(float(total[list(values)].sum() / n), 4) if n else None for total in sums]
        volume = round(n * voxel, 6) if len(labels) > 1 else None
        measured[name] = {"labels": list(values), "voxels": n, "volume_ml": volume, "mean_intensity": means}
    return measured


def find_structures(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return labels, voxels and volume of the structures that a case has."""
    keys = ("labels", "voxels", "volume_ml")
    return {name: {key: of[key] for key in keys} for name, of in measured.items() if of["voxels"]}


def collect_statistics(folder: Path, path: Path) -> None:
    """Write a CSV table of the JSON files of all cases that were measured, one row for each case and structure.

    Raises:
        DatasetError: A file in the folder that was not written by this command.
    """
    rows = []
    for file in sorted(folder.glob("*.json")):
        with reading(file, "statistics that were not written by this command", DatasetError):
            for name, measured in read_json(file).items():
                means = ["" if mean is None else mean for mean in measured["mean_intensity"]]
                rows.append([file.stem, name, measured["voxels"], measured["volume_ml"], *means])
    n_channels = max((len(row) for row in rows), default=5) - 4
    means = ["mean_intensity"] if n_channels == 1 else [f"mean_intensity_{c:04d}" for c in range(n_channels)]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as opened:
        table = csv.writer(opened)
        table.writerow(["case", "structure", "voxels", "volume_ml", *means])
        table.writerows(rows)


def coarse_grid(
    properties: Mapping[str, Any], shape: Sequence[int], transpose_backward: Sequence[int]
) -> tuple[dict[str, Any], tuple[slice, ...]]:
    """Describe the network's grid in the order of the reader's axes; it begins and ends where the cropped image does.

    Returns:
        What a reader would note of an image on it, for ``write_seg``; and the part of the image that was not cropped.
    """
    crop = tuple(slice(*properties["bbox_used_for_cropping"][i]) for i in transpose_backward)
    ratio = np.array([(part.stop - part.start) / n for part, n in zip(crop, shape, strict=True)])
    offset = np.array([part.start for part in crop]) + ratio / 2 - 0.5  # of the first voxel's centre, in voxels
    coarse = {**properties, "spacing": [float(s * r) for s, r in zip(properties["spacing"], ratio, strict=True)]}
    if "sitk_stuff" in properties:
        old = properties["sitk_stuff"]
        n_axes = len(old["spacing"])
        spacing, (scale, shift) = np.array(old["spacing"]), (values[::-1][:n_axes] for values in (ratio, offset))
        origin = np.array(old["origin"]) + np.reshape(old["direction"], (n_axes, n_axes)) @ (spacing * shift)
        coarse["sitk_stuff"] = {**old, "spacing": (spacing * scale).tolist(), "origin": origin.tolist()}
        return coarse, crop
    old, to_old = properties["nibabel_stuff"], np.diag([*ratio[::-1], 1.0])
    to_old[:3, 3] = offset[::-1]
    coarse["nibabel_stuff"] = {"original_affine": old["original_affine"] @ to_old}
    if "reoriented_affine" in old:
        affine, orient = old["reoriented_affine"] @ to_old, nib.orientations
        axes = orient.ornt_transform(orient.axcodes2ornt("RAS"), orient.io_orientation(old["original_affine"]))
        back = affine @ orient.inv_ornt_aff(axes, tuple(shape[::-1]))
        coarse["nibabel_stuff"] = {"original_affine": back, "reoriented_affine": affine}
    return coarse, crop


def _write_labels(reader: Any, labels: Array, properties: Mapping[str, Any], path: Path) -> None:
    """Write with nnU-Net's writer and look whether all of it arrived: ITK says nothing where a disk is full."""
    reader.write_seg(labels, str(path), properties)
    n_bytes, size = labels.size * (1 if labels.max(initial=0) < 255 else 2), path.stat().st_size
    if path.name.endswith(".nii.gz"):
        with path.open("rb") as file:
            file.seek(-min(4, size), os.SEEK_END)
            (size,) = struct.unpack("<I", file.read(4).rjust(4, b"\0"))  # bytes before compression, modulo 2^32
    if path.name.endswith(NIFTI_ENDINGS) and not 0 <= (size - n_bytes) % 2**32 < 2**16:  # a header, and extensions
        raise OSError(errno.ENOSPC, "the file was not written to its end, as where the disk is full", str(path))


def name_extension(structures: Structures) -> Any:
    """A NIfTI header extension with names and colours, in the form that TotalSegmentator and Caret's programs read."""
    root = ElementTree.Element("CaretExtension")
    volume = ElementTree.SubElement(root, "VolumeInformation", Index="0")
    table = ElementTree.SubElement(volume, "LabelTable")
    for name, values in structures.items():
        red, green, blue = (f"{c:.3f}" for c in _colour(values[0]))
        label = {"Key": str(values[0]), "Red": red, "Green": green, "Blue": blue, "Alpha": "1"}
        ElementTree.SubElement(table, "Label", label).text = name
    ElementTree.SubElement(volume, "StudyMetaDataLinkSet")
    ElementTree.SubElement(volume, "VolumeType").text = "Label"
    return nib.nifti1.Nifti1Extension(0, ElementTree.tostring(root, encoding="UTF-8", xml_declaration=True))


def _colour(value: int) -> tuple[float, float, float]:
    """Red, green and blue of a label from 0 to 1, well apart for labels that follow each other."""
    golden = 0.618033988749895  # steps by it never come back to a hue
    return colorsys.hsv_to_rgb((value * golden) % 1, (0.6, 0.8, 1)[value % 3], (1, 0.85)[value % 2])


def draw_preview(
    image: Array,
    labels: Array,
    structures: Structures,
    spacing: Sequence[float],
    path: Path,
    *,
    title: str,
    planes: Sequence[str],
) -> None:
    """Draw the planes of ``(Z, Y, X)`` along each axis that hold most labelled voxels, with a legend."""
    import matplotlib as mpl  # spares the other processes matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 5), layout="constrained")
    step = max(1, image.size // 2**20)
    low, high = np.percentile(image.reshape(-1)[::step].astype(np.float64), [1, 99])
    seen: set[int] = set()
    for axis, plot in enumerate(figure.subplots(1, 3)):
        counts = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
        index = int(counts.argmax()) if counts.any() else len(counts) // 2
        grey, plane = (np.take(volume, index, axis=axis) for volume in (image, labels))
        values, where = np.unique(plane, return_inverse=True)
        seen.update(values.tolist())
        colours = np.array([(*_colour(int(value)), 0.55 * bool(value)) for value in values])
        height, width = (float(side) for i, side in enumerate(spacing) if i != axis)
        plot.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower")
        plot.imshow(colours[where.reshape(plane.shape)], interpolation="nearest", origin="lower")
        plot.set_aspect(height / width)
        plot.set_title(f"{planes[axis]}, plane {index}", fontsize=9)
        plot.set_axis_off()
    found = [(name, values[0]) for name, values in structures.items() if seen & set(values)]
    with mpl.rc_context({"text.parse_math": False}):  # a $ in a name is a dollar
        figure.suptitle(title)
        if handles := [Patch(color=_colour(value), label=name) for name, value in found[:_MAX_IN_LEGEND]]:
            figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=6)
        figure.savefig(path, format="png", dpi=110)


# The manifest ---------------------------------------------------------------------------------------------------------


class Manifest:
    """``manifest.json``: what the predictions of a folder were made with and of, and what is in them.

    It is written again after each case. Where several commands share the folder, ``manifest.json`` has only what they
    agree on, and each of them writes a ``manifest.PART.json`` like that of a command that is alone. What it said of
    cases that are not ``waiting`` is kept where the settings are equal.
    """

    def __init__(
        self, model: Model, folder: Path, record: dict[str, Any], device: str, waiting: set[str], part: int | None
    ) -> None:
        self._path, self._clock = folder / MANIFEST_NAME, time.monotonic()
        if part is not None:
            write_json(record, self._path)
            self._path = folder / f"manifest.{part}.json"
        else:
            for other in folder.glob("manifest.[0-9]*.json"):  # this one describes all cases
                other.unlink()
        before = _read_manifest(self._path)
        kept: dict[str, Any] = {"cases": {}, "failures": {}}
        for key, of in kept.items() if before.get("settings") == record["settings"] else ():
            of |= {name: value for name, value in before.get(key, {}).items() if name not in waiting}
        card, place, digests = {}, model.folder.resolve(), record["settings"]
        with suppress(OSError, ValueError):
            card = read_json(model.folder / MODEL_CARD)
        files = model.checkpoints.items()
        checkpoints = {fold: {"file": path.name, "sha256": digests[f"fold_{fold}"]} for fold, path in files}
        described = {"name": place.name, "folder": str(place), "licence": card.get("licence")}
        described |= {"sources": card.get("sources", []), "checkpoints": checkpoints}
        versions = {name: version(name) for name in ("stunet", "nnunetv2", "torch")}
        times = {"started": _now(), "finished": None, "seconds": None}
        self.content = {**record, "versions": versions, "model": described, "device": device, **times, **kept}
        write_json(self.content, self._path)

    def add(self, case: Case, found: Mapping[str, Any]) -> None:
        """Add the structures of a case."""
        self.content["cases"][case.name] = {"structures": found}
        write_json(self.content, self._path)

    def close(self, failures: Mapping[str, str]) -> None:
        """Note the end."""
        self.content |= {"finished": _now(), "seconds": round(time.monotonic() - self._clock, 1)}
        self.content["failures"] |= failures
        write_json(self.content, self._path)


def check_folder(
    folder: Path, ending: str, settings: Mapping[str, Any], cases: Sequence[Case], own: Sequence[Case], *, keep: bool
) -> tuple[dict[str, Any], set[str]]:
    """Return what a manifest must say, and the cases whose predictions it will not describe: they are predicted again.

    ``own`` are the cases of this command, where several share them, and ``keep`` says whether predictions stay.

    Raises:
        UsageError: The folder has predictions that the manifest would not describe and that would stay.
    """
    inputs = {file.resolve() for case in cases for file in case.files}
    files = folder.glob(f"*{ending}") if folder.is_dir() else ()
    present = {file.name.removesuffix(ending) for file in files if file.name[0] != "." and file.resolve() not in inputs}
    settings, images = dict(json.loads(json.dumps(settings))), {case.name: _digest(case) for case in cases}
    manifest = _read_manifest(folder / MANIFEST_NAME)
    known, of = manifest.get("settings", {}), manifest.get("images", {})
    changed = sorted(key for key in {*settings, *known} if settings.get(key) != known.get(key))
    outdated = {case for case in present if changed or of.get(case) != images.get(case, of.get(case))}
    again = {case.name for case in own} if changed else set(images)  # the other commands may have other settings
    if staying := sorted(outdated if keep or not known else outdated - again):
        differing = [f"{key}: {_show(settings.get(key))} instead of {_show(known.get(key))}" for key in changed[:3]]
        kind = "settings" if changed else "images"
        what = f"of other {kind} ({'; '.join(differing)})" if known else "without a record"
        said = f"{folder} has {staying[0]}{ending}, a prediction {what} in {MANIFEST_NAME}"
        raise UsageError(f"{said}: choose another -o, give what was given before, or remove the predictions")
    return {"settings": settings, "images": images if changed else {**of, **images}}, outdated


def model_settings(model: Model) -> dict[str, Any]:
    """Describe a model in a manifest's settings by its content, so that it may be moved."""
    settings = {"configuration": model.configuration, "trainer": model.trainer_name}
    for name, content in (("plans", model.plans), ("dataset", model.dataset_json)):
        settings[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return settings | {f"fold_{fold}": file_sha256(path) for fold, path in model.checkpoints.items()}


def remove_predictions(folder: Path, ending: str, cases: Iterable[str]) -> None:
    """Remove all files of these cases."""
    masks = _read_manifest(folder / MANIFEST_NAME).get("settings", {}).get("masks")
    for case in cases:
        if masks:
            shutil.rmtree(folder / case / "segmentations", ignore_errors=True)
        for name in (f"{case}.npz", f"{case}.pkl", f"statistics/{case}.json", f"previews/{case}.png", case + ending):
            (folder / name).unlink(missing_ok=True)


def _show(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return text if len(text) < 64 else f"{text[:60]}…"  # of a digest enough to tell two apart


def _digest(case: Case) -> str:
    """Digest the images of a case; "" where they cannot be read, which reading will say, and that stops no other."""
    with suppress(DatasetError):
        return fingerprint((*case.files, *case.slices))  # of another series of a folder it is another one
    return ""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))  # of thousands of cases it is large
        return {**content, **{key: {**content.get(key, {})} for key in ("settings", "images", "cases", "failures")}}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
