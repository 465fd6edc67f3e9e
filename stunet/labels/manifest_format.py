"""The form of ``annotated_labels.json``: what its JSON schema says too, with errors that name the place."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from importlib.resources import files
from typing import Any

from stunet.errors import LabelError
from stunet.files import write_json

__all__ = [
    "FORMAT_VERSION",
    "check_form",
    "manifest_schema",
    "order_manifest",
    "parse_manifest",
    "refuse_manifest",
    "write_manifest",
]

FORMAT_VERSION = 1
_KEYS = ("version", "groups", "cases", "default", "weights", "superclasses")


def manifest_schema() -> dict[str, Any]:
    """The JSON schema of ``annotated_labels.json``."""
    schema = files("stunet.labels") / "schemas" / "annotated_labels.schema.json"
    return dict(json.loads(schema.read_text(encoding="utf-8")))


def parse_manifest(text: str, *, source: str) -> dict[str, Any]:
    """Parse and check the form of a manifest.

    Raises:
        LabelError: Not JSON, a name twice in one object, or of another form than the schema says.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"{twice[0]!r} twice")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise refuse_manifest(source, str(error), "JSON without names that stand twice") from error
    check_form(content, source=source)
    return dict(content)


def check_form(content: Any, *, source: str) -> None:
    """Check what can be checked without the dataset: the same that the JSON schema says.

    Raises:
        LabelError: Names the first place that is wrong.
    """
    if not isinstance(content, dict):
        raise refuse_manifest(source, f"{type(content).__name__} at the top", "an object with version and cases")
    unknown = sorted(str(key) for key in content if key not in _KEYS)
    if unknown:
        raise refuse_manifest(source, f"unknown key {unknown[0]!r}", f"only the keys {', '.join(_KEYS)}")
    if isinstance(content.get("version"), bool) or content.get("version") != FORMAT_VERSION:
        raise refuse_manifest(source, f"version {content.get('version')!r}", f"version {FORMAT_VERSION}")
    if "cases" not in content:
        raise refuse_manifest(source, "no cases", "cases with what each annotates")
    for key in ("groups", "cases", "weights", "superclasses"):
        entries = content.get(key, {})
        if not isinstance(entries, dict):
            raise refuse_manifest(source, f"{key} is {type(entries).__name__}", f"{key} as an object")
        for name, value in entries.items():
            if not name:
                raise refuse_manifest(source, f"{key}: an empty name", "names with at least one letter")
            _check_entry(key, f"{key}[{name!r}]", value, source)
    if "default" in content:
        _check_entry("cases", "default", content["default"], source)


def _check_entry(key: str, place: str, value: Any, source: str) -> None:
    if key == "weights":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise refuse_manifest(source, f"{place} is {value!r}", "a number above 0")
    elif isinstance(value, str) and key == "cases":
        if not value:
            raise refuse_manifest(source, f"{place} is empty", "the name of a group, or a list of structures")
    else:
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            expected = "a list of names" + (", or the name of a group" if key == "cases" else "")
            raise refuse_manifest(source, f"{place} is {_short(value)}", expected)
        least = 2 if key == "superclasses" else 1
        if len(value) < least:
            raise refuse_manifest(source, f"{place} has {len(value)} structures", f"at least {least}")
        if len(set(value)) < len(value):
            twice = next(name for name in value if value.count(name) > 1)
            raise refuse_manifest(source, f"{place} has {twice!r} twice", "each structure once")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def refuse_manifest(
    source: str, got: str, expected: str, remedy: str = "Correct the file.", known: Collection[str] = ()
) -> LabelError:
    """The error for a manifest that cannot be used, with names similar to ``got`` where ``known`` are given."""
    if known:
        expected = f"{expected}, for example {', '.join(list(known)[:3])}"
    return LabelError(
        "a list of annotated labels that cannot be used", got=f"{source}: {got}", expected=expected, remedy=remedy
    )


def write_manifest(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a manifest, whole or not at all; equal contents give equal bytes.

    Raises:
        LabelError: The content is not of the form that the schema says.
    """
    write_json(order_manifest(content, source=str(path)), path)


def order_manifest(content: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The content of a manifest in the order in which it is written.

    Args:
        content: The content.
        source: Where it belongs, for messages.

    Raises:
        LabelError: The content is not of the form that the schema says.
    """
    check_form(dict(content), source=source)
    ordered: dict[str, Any] = {"version": FORMAT_VERSION}
    for key in ("groups", "cases", "weights", "superclasses"):
        if key in content:
            ordered[key] = dict(sorted(content[key].items()))
        if key == "cases" and "default" in content:
            ordered["default"] = content["default"]
    return ordered
