"""Can one dataset hold several: the same channels, file endings, readers and units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stunet.datasets.union_sources import UnionSource
from stunet.errors import DatasetError
from stunet.labels.label_cases import LABEL_ENDINGS
from stunet.labels.label_maps import NIFTI_ENDINGS
from stunet.labels.nifti import open_volume

__all__ = ["check_sources"]


def check_sources(sources: Sequence[UnionSource]) -> None:
    """Check that one dataset can hold all these.

    Raises:
        DatasetError: A dataset twice, or datasets of different channels, readers, file endings or units of spacing.
    """
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or len(sources) < 2:
        raise DatasetError(
            "datasets that make no union",
            got=f"{twice} twice" if twice else ", ".join(names) or "none",
            expected="two or more datasets, each once",
            remedy="Correct --from.",
        )
    _check_same(
        sources,
        "file endings",
        lambda source: source.dataset.dataset_json["file_ending"],
        "one file ending, since nnU-Net reads all files of a dataset with one reader",
        "Convert one of them, nnU-Net's dataset.json and all its files.",
    )
    ending = sources[0].dataset.dataset_json["file_ending"]
    if ending not in LABEL_ENDINGS:
        raise DatasetError(
            "label maps that cannot be written anew",
            got=f"{sources[0].name}: {ending}",
            expected=f"one of {', '.join(LABEL_ENDINGS)}, which hold values and geometry in one file",
            remedy="Convert the datasets.",
        )
    _check_same(
        sources,
        "channels",
        lambda source: ", ".join(source.channels),
        "the same channels in the same order",
        "Leave one out, or make its channels those of the other.",
        str.casefold,  # as nnU-Net compares them to choose a normalisation
    )
    _check_same(
        sources,
        "image readers",
        lambda source: str(source.dataset.dataset_json.get("overwrite_image_reader_writer", "None")),
        "the same overwrite_image_reader_writer in dataset.json",
        "Make it the same.",
    )
    if ending in NIFTI_ENDINGS:
        _check_same(
            sources,
            "units of spacing",
            _unit,
            "the same unit in the headers of their images",
            "Convert one of them, spacing and position included.",
        )


def _check_same(
    sources: Sequence[UnionSource],
    what: str,
    of: Callable[[UnionSource], str],
    expected: str,
    remedy: str,
    key: Callable[[str], str] = str,
) -> None:
    values = {source.name: of(source) for source in sources}
    first = sources[0].name
    for name, value in values.items():
        if key(value) != key(values[first]):
            raise DatasetError(
                f"datasets of different {what}",
                got=f"{first}: {values[first]}; {name}: {value}",
                expected=expected,
                remedy=remedy,
            )


def _unit(source: UnionSource) -> str:
    """The unit of spacing in the first image's header; mm where it says nothing, as all programs take it."""
    images, _ = next(iter(source.dataset.cases.values()))
    with open_volume(images[0]) as volume:
        unit = str(volume.header.get_xyzt_units()[0])
    return {"unknown": "mm", "meter": "m", "micron": "µm"}.get(unit, unit)
