"""Which weights exist: the registry beside this module, and one of the user's own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from stunet.environment import did_you_mean
from stunet.errors import DownloadError, UsageError
from stunet.labels import list_vocabularies, load_vocabulary
from stunet.weights.addresses import check_url

__all__ = ["REGISTRY_VARIABLE", "Place", "WeightsEntry", "WeightsFile", "find_entry", "load_registry"]

REGISTRY_VARIABLE = "STUNET_REGISTRY"
"""Environment variable that names a further registry; its entries go before ours of the same name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(@[\w.\-/]+)?")

Value = TypeVar("Value")


@dataclass(frozen=True)
class Place:
    """Where a person can get a file.

    Attributes:
        page: Web page.
        item: The file as the page names it.
    """

    page: str
    item: str


@dataclass(frozen=True)
class WeightsFile:
    """One file of published weights.

    Attributes:
        file: Its name.
        url: Where a program may download it.
        hub: Hugging Face repository with a file of this name, ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.
        bytes: Its length where it is known.
        approximate_bytes: Its length as a page rounds it, for the table alone.
        sha256: Its checksum where it is known.
        by_hand: Where a person can get it.
    """

    file: str
    url: str | None = None
    hub: str | None = None
    bytes: int | None = None
    approximate_bytes: int | None = None
    sha256: str | None = None
    by_hand: tuple[Place, ...] = ()

    @property
    def is_pickle(self) -> bool:
        """Whether it is one of nnU-Net v1's pickles, that is, belongs to weights but holds none."""
        return self.file.endswith(".pkl")


@dataclass(frozen=True)
class WeightsEntry:
    """Published weights of one network.

    Attributes:
        name: What a user types.
        size: Size of the network as :func:`stunet.network.size_of` names it.
        outputs: Outputs, background included.
        files: The weights and the pickles that belong to them.
        title: What it was trained on, for people.
        input_channels: Channels of the image, where known.
        labels: Name of the label vocabulary with the order of the outputs, where known.
        licence: Licence of the weights, where known.
        page: The page of those who published them.
        sources: Where each of these facts is from.
    """

    name: str
    size: str
    outputs: int
    files: tuple[WeightsFile, ...]
    title: str | None = None
    input_channels: int | None = None
    labels: str | None = None
    licence: str | None = None
    page: str | None = None
    sources: Mapping[str, str] | None = None

    @property
    def weights_file(self) -> WeightsFile:
        """The file with the tensors."""
        return next(file for file in self.files if not file.is_pickle)

    @property
    def pickles(self) -> tuple[WeightsFile, ...]:
        """The files that belong to it."""
        return tuple(file for file in self.files if file.is_pickle)


def load_registry() -> dict[str, WeightsEntry]:
    """All known weights by name: those of the user's registry (``STUNET_REGISTRY``) first, then ours.

    Raises:
        UsageError: The user's registry is missing, not JSON or malformed.
    """
    ours = json.loads((files("stunet.weights") / "registry.json").read_text(encoding="utf-8"))
    known: dict[str, WeightsEntry] = {}
    named = os.environ.get(REGISTRY_VARIABLE)
    if named:
        known |= _parse(_read_json(Path(named)), named)
    for name, entry in _parse(ours, "registry.json").items():
        known.setdefault(name, entry)
    return known


def find_entry(name: str) -> WeightsEntry:
    """The weights of this name.

    Raises:
        UsageError: There are none, or the user's registry is malformed.
    """
    known = load_registry()
    if name not in known:
        raise UsageError(
            "unknown weights",
            got=name,
            expected=f"one of {', '.join(known)}",
            remedy=f"{did_you_mean(name, known)}`stunet list` shows them; STUNET_REGISTRY adds some of your own.",
        )
    return known[name]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise _malformed(str(path), str(reason)) from error


def _parse(content: Any, source: str) -> dict[str, WeightsEntry]:
    if not isinstance(content, dict) or content.get("version") != 1 or not isinstance(content.get("weights"), list):
        raise _malformed(source, 'no {"version": 1, "weights": […]}')
    entries: dict[str, WeightsEntry] = {}
    for number, value in enumerate(content["weights"]):
        fields = _Fields(value, source, f"weights[{number}]")
        entry = _entry(fields)
        if entry.name in entries:
            raise _malformed(source, f"{entry.name} twice")
        entries[entry.name] = entry
    return entries


def _entry(fields: _Fields) -> WeightsEntry:
    name = fields.take("name", str, lambda v: _NAME.fullmatch(v), "letters, digits, . _ and -")
    fields.where = name
    raw_files = fields.take("files", list, None, "a list of files")
    entry = WeightsEntry(
        name=name,
        size=fields.take("size", str, None, "the name of a size"),
        outputs=fields.take("outputs", int, lambda v: v > 0, "a positive whole number"),
        files=tuple(_file(_Fields(f, fields.source, f"{name}: files[{n}]")) for n, f in enumerate(raw_files)),
        title=fields.maybe("title", str, None, "text"),
        input_channels=fields.maybe("input_channels", int, lambda v: v > 0, "a positive whole number"),
        labels=fields.maybe(
            "labels", str, lambda v: v in list_vocabularies(), f"one of {', '.join(list_vocabularies())}"
        ),
        licence=fields.maybe("licence", str, None, "text"),
        page=fields.maybe("page", str, _is_url, "an http or https address"),
        sources=fields.maybe("sources", dict, lambda v: all(isinstance(t, str) for t in v.values()), "texts by field"),
    )
    fields.end()
    if entry.labels is not None and len(load_vocabulary(entry.labels).labels) != entry.outputs:
        raise _malformed(fields.source, f"{name}: {entry.outputs} outputs, which {entry.labels} does not name")
    names = [file.file for file in entry.files]
    if sum(not file.is_pickle for file in entry.files) != 1 or len({n.lower() for n in names}) != len(names):
        raise _malformed(
            fields.source, f"{name}: files {names}: not one file with weights, and .pkl files of other names"
        )
    return entry


def _file(fields: _Fields) -> WeightsFile:
    raw_places = fields.maybe("by_hand", list, None, "a list of pages") or []
    file = WeightsFile(
        # A name alone: a registry must not write elsewhere than into its own folder, nor over our own records.
        file=fields.take(
            "file",
            str,
            lambda v: _NAME.fullmatch(v) and v.endswith((".model", ".pth", ".safetensors", ".pkl")),
            "the name of a .model, .pth, .safetensors or .pkl file, without a folder",
        ),
        url=fields.maybe("url", str, _is_url, "an http or https address"),
        hub=fields.maybe("hub", str, lambda v: _HUB.fullmatch(v), "OWNER/NAME or OWNER/NAME@REVISION"),
        bytes=fields.maybe("bytes", int, lambda v: v > 0, "a positive whole number"),
        approximate_bytes=fields.maybe("approximate_bytes", int, lambda v: v > 0, "a positive whole number"),
        sha256=fields.maybe("sha256", str, lambda v: _SHA256.fullmatch(v), "64 hexadecimal digits in lower case"),
        by_hand=tuple(_place(_Fields(p, fields.source, f"{fields.where}.by_hand")) for p in raw_places),
    )
    fields.end()
    return file


def _place(fields: _Fields) -> Place:
    place = Place(
        fields.take("page", str, _is_url, "an http or https address"),
        fields.take("item", str, None, "the file as the page names it"),
    )
    fields.end()
    return place


def _is_url(value: str) -> bool:
    try:
        check_url(value)
    except DownloadError:
        return False
    return True


class _Fields:
    """The fields of one JSON object, each taken once and checked."""

    def __init__(self, content: Any, source: str, where: str) -> None:
        self.source, self.where = source, where
        if not isinstance(content, dict):
            raise _malformed(source, f"{where} is not an object")
        self._left = dict(content)

    def take(self, key: str, kind: type[Value], good: Callable[[Value], object] | None, expected: str) -> Value:
        value = self._left.pop(key, None)
        if (
            isinstance(value, bool)
            or not isinstance(value, kind)
            or not value
            or (good is not None and not good(value))
        ):
            raise _malformed(self.source, f"{self.where}: {key} is {str(value)[:80]!r} instead of {expected}")
        return value

    def maybe(self, key: str, kind: type[Value], good: Callable[[Value], object] | None, expected: str) -> Value | None:
        if self._left.get(key) is None or self._left[key] == []:
            self._left.pop(key, None)
            return None
        return self.take(key, kind, good, expected)

    def end(self) -> None:
        if self._left:
            raise _malformed(self.source, f"{self.where}: unknown field {next(iter(self._left))[:80]!r}")


def _malformed(source: str, problem: str) -> UsageError:
    return UsageError(
        "a registry of weights that cannot be used",
        got=f"{source}: {problem}",
        expected="JSON in the form of stunet/weights/registry.json",
        remedy=f"Correct the file, or unset {REGISTRY_VARIABLE}.",
    )
