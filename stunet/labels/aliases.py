"""The same structure under the names that different datasets give it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

__all__ = ["PARTS", "canonical_name", "canonical_parts", "match_names"]

_LEFT, _RIGHT = "left", "right"
_SIDES = {"left": _LEFT, "lt": _LEFT, "l": _LEFT, "right": _RIGHT, "rt": _RIGHT, "r": _RIGHT}
_FILLERS = {"of", "the", "and"}

#: Words that mean the same, by the word that TotalSegmentator uses.
_WORDS = {
    "esophagus": ("oesophagus", "eso", "esophagos"),
    "vertebrae": ("vertebra", "vert"),
    "kidney": ("kidneys",),
    "lung": ("lungs",),
    "rib": ("ribs",),
    "clavicula": ("clavicle", "clavicles"),
    "vena": ("vein",),
    "bowel": ("intestine", "gut"),
    "autochthon": ("autochthonous",),
    "adrenal": ("suprarenal",),
    "femur": ("femurs", "femora"),
    "hip": ("hips",),
}

#: Whole names without their side, by TotalSegmentator's name. The abbreviations are those of FLARE22, AMOS, VerSe and
#: the other datasets of STU-Net's direct evaluation (arXiv 2304.06716, table 5).
_NAMES = {
    "adrenal_gland": ("adrenal", "adrenals", "adrenal_glands"),
    "autochthon": ("autochthon_back_muscle", "autochthon_back_muscles"),
    "colon": ("large_bowel",),
    "gallbladder": ("gall_bladder", "gb"),
    "heart_atrium": ("atrium", "cardiac_atrium"),
    "heart_myocardium": ("myocardium", "myo"),
    "heart_ventricle": ("ventricle", "cardiac_ventricle"),
    "hip": ("hip_bone",),
    "iliac_vena": ("common_iliac_vena",),
    "iliac_artery": ("common_iliac_artery",),
    "iliopsoas": ("iliopsoas_muscle",),
    "inferior_vena_cava": ("ivc", "postcava", "vena_cava_inferior"),
    "portal_vena_splenic_vena": ("portal_splenic_vena", "portal_splenic_veins", "psv"),
    "pulmonary_artery": ("pulmonary_arteries",),
    "small_bowel": ("small_bowels",),
    "spinal_cord": ("myelon",),
    "superior_vena_cava": ("svc", "vena_cava_superior"),
    "thyroid_gland": ("thyroid",),
    "urinary_bladder": ("bladder",),
}

#: Abbreviations that hold structure and side in one word.
_SIDED = {
    "heart_atrium_left": ("la",),
    "heart_atrium_right": ("ra",),
    "heart_ventricle_left": ("lv",),
    "heart_ventricle_right": ("rv",),
    "adrenal_gland_left": ("lag",),
    "adrenal_gland_right": ("rag",),
    "kidney_left": ("lk", "lkidney"),
    "kidney_right": ("rk", "rkidney"),
}

#: Canonical names of the parts of structures that have other parts than a left and a right one.
PARTS = {
    "lung_left": ("lung_upper_lobe_left", "lung_lower_lobe_left"),
    "lung_right": ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right"),
    **{f"rib_{side}": tuple(f"rib_{i}_{side}" for i in range(1, 13)) for side in ("left", "right")},
}


def _inverted(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {alias: name for name, aliases in table.items() for alias in aliases}


_WORD_OF, _NAME_OF, _SIDED_OF = _inverted(_WORDS), _inverted(_NAMES), _inverted(_SIDED)


def canonical_name(name: str) -> str:
    """One spelling for all usual spellings of a structure.

    Case, separators, word order of the side (``Left Kidney``, ``kidney_l``), plurals and the abbreviations of public
    datasets (``IVC``, ``RAG``, ``L1``) make no difference. A name that is not known is only normalised, so two
    datasets' own names still match.

    Args:
        name: A structure's name in a ``dataset.json``.

    Returns:
        Words in lower case joined by ``_``, the side last.
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
    """Canonical names of what a structure would consist of, if it were divided: its sides, lobes or ribs.

    Args:
        name: A canonical name.
    """
    sided = name.endswith(("_left", "_right"))
    return PARTS.get(name, () if sided else (f"{name}_left", f"{name}_right"))


def match_names(source: Sequence[str], target: Sequence[str]) -> dict[str, str | None]:
    """Which name of one list means the same structure as each name of another.

    Equal names match before spellings do. Where several names of one list have the same canonical name, spelling
    cannot tell them apart, and they only match by equality.

    Args:
        source: Names to choose from.
        target: Names to find.

    Returns:
        For each target name the source name, or None. No source name is used twice.
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
