"""Presets: a size and the settings that go with it, from the JSON files in ``plans/``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from stunet.errors import ArchitectureError
from stunet.network import STUNetSize, find_size
from stunet.settings import check_settings

__all__ = ["Preset", "list_presets", "load_preset"]


@dataclass(frozen=True)
class Preset:
    """What ``stunet plan --size NAME`` puts into plans.

    Attributes:
        name: The file's name without its ending.
        size: Size of the network.
        settings: Settings, see :data:`stunet.planning.SETTINGS`; those given with ``--set`` go before them.
    """

    name: str
    size: STUNetSize
    settings: Mapping[str, Any] = field(default_factory=dict)


def list_presets() -> list[str]:
    """Names of all presets, smallest network first."""
    entries = [entry for entry in files("stunet.plans").iterdir() if entry.name.endswith(".json")]
    contents = {entry.name.removesuffix(".json"): json.loads(entry.read_text(encoding="utf-8")) for entry in entries}
    names = [name for name, content in contents.items() if "size" in content]  # the others are recipes
    return sorted(names, key=lambda name: (load_preset(name).size.width, name))


def load_preset(name: str) -> Preset:
    """Read a preset.

    Raises:
        ArchitectureError: There is no such preset.
    """
    file = files("stunet.plans") / f"{name}.json"
    if not name.isidentifier() or not file.is_file():
        raise ArchitectureError(
            "unknown preset", got=name, expected=f"one of {', '.join(list_presets())}", remedy="Choose one of these."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    check_settings(content["settings"], source=f"preset {name}")
    return Preset(name, find_size(content["size"]), content["settings"])
