"""The same structure under the names that different datasets give it."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files

_SIDES = {"left": "left", "lt": "left", "l": "left", "right": "right", "rt": "right", "r": "right"}
_FILLERS = {"of", "the", "and"}


def _read(table: str) -> dict[str, tuple[str, ...]]:
    text = (files("stunet.labels") / "aliases.json").read_text(encoding="utf-8")
    return {name: tuple(aliases) for name, aliases in json.loads(text)[table].items()}


def _inverted(table: str) -> dict[str, str]:
    return {alias: name for name, aliases in _read(table).items() for alias in aliases}


_WORD_OF, _NAME_OF, _SIDED_OF = _inverted("words"), _inverted("names"), _inverted("sided")

PARTS = _read("parts")
"""Canonical names of the parts of structures that have other parts than a left and a right one."""


def canonical_name(name: str) -> str:
    """Return one spelling for all usual spellings of a structure.

    Case, separators, word order of the side (``Left Kidney``, ``kidney_l``), plurals and the abbreviations of public
    datasets (``IVC``, ``RAG``, ``L1``) make no difference. A name that is not known is only normalised, so two
    datasets' own names still match.

    >>> canonical_name("Left Kidney"), canonical_name("IVC")
    ('kidney_left', 'inferior_vena_cava')
    """
    words = [w for w in re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()) if w]
    if len(words) == 1 and words[0] in _SIDED_OF:
        return _SIDED_OF[words[0]]
    if len(words) == 1 and re.fullmatch(r"c[1-7]|t([1-9]|1[0-3])|l[1-6]|s1", words[0]):
        words.insert(0, "vertebrae")  # as VerSe and its kin name them
    sides = [_SIDES[word] for word in words if word in _SIDES]
    rest = [_WORD_OF.get(word, word) for word in words if word not in _SIDES and word not in _FILLERS]
    if len(sides) != 1 or not rest:  # no side, or something that is no side at all, such as "l" alone
        return _NAME_OF.get("_".join(rest), "_".join(rest)) if not sides else "_".join(words)
    joined = "_".join(rest)
    return f"{_NAME_OF.get(joined, joined)}_{sides[0]}"


def canonical_parts(name: str) -> tuple[str, ...]:
    """Return the canonical names of the sides, lobes or ribs that a structure of a canonical name consists of."""
    sided = name.endswith(("_left", "_right"))
    return PARTS.get(name, () if sided else (f"{name}_left", f"{name}_right"))


def match_names(source: Sequence[str], target: Sequence[str]) -> dict[str, str | None]:
    """Find which name of one list means the same structure as each name of another.

    Equal names match before spellings do. Where several names of one list have the same canonical name, spelling
    cannot tell them apart, and they only match by equality.

    Args:
        source: Names to choose from.
        target: Names to find.

    Returns:
        For each target name the source name, or None. No source name is used twice.

    >>> match_names(["kidney_left", "liver"], ["Left Kidney", "spleen"])
    {'Left Kidney': 'kidney_left', 'spleen': None}
    """
    matches: dict[str, str | None] = {name: name if name in source else None for name in target}
    used = {name for name in matches.values() if name is not None}
    by_canonical = _unambiguous(name for name in source)
    wanted = _unambiguous(name for name in target)
    for canonical, name in wanted.items():
        candidate = by_canonical.get(canonical)
        if matches[name] is None and candidate is not None and candidate not in used:
            matches[name] = candidate
            used.add(candidate)
    return matches


def _unambiguous(names: Iterable[str]) -> dict[str, str]:
    listed = list(names)
    counts = Counter(map(canonical_name, listed))
    return {canonical_name(name): name for name in listed if counts[canonical_name(name)] == 1}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the known one that is like it, if there is one."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1) or [k for k in known if k.casefold() == name.casefold()]
    return f" (did you mean {close[0]!r}?)" if close else ""
