"""What the subcommands share: terminal output and options in nnU-Net's style."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from typer.core import TyperCommand

__all__ = ["ListOptionsCommand", "human_bytes", "human_count", "print_error", "stderr", "stdout"]

# Names of cases, structures and files are printed everywhere: [old] and :x: in them are text, not markup.
stdout = Console(markup=False, emoji=False)
stderr = Console(stderr=True, markup=False, emoji=False)


class ListOptionsCommand(TyperCommand):
    """A command whose list options take several values at once, as nnU-Net's do: ``-c 2d 3d_fullres``.

    Typer wants an option's name before each value; that keeps working. Only for commands without positional arguments.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a list option before each further value; take hyphens for underscores."""
        known = {name for p in self.params for name in p.opts}
        names = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        expanded: list[str] = []
        current: str | None = None
        n_values = 0
        for arg in args:
            if arg.startswith("-"):
                name, has_value, value = arg.partition("=")
                if name not in known and (underscored := f"--{name[2:].replace('-', '_')}") in known:
                    name, arg = underscored, f"{underscored}{has_value}{value}"  # --disable-tta for --disable_tta
                current, n_values = (name if name in names else None), int(bool(has_value))
            elif current is not None:
                if n_values:
                    expanded.append(current)
                n_values += 1
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


def human_bytes(n: float) -> str:
    """Bytes for people: ``1.5 GB``, where 1 GB is 1024^3 bytes."""
    exponent = min(int(math.log(max(n, 1), 1024)), 4)
    return f"{n / 1024**exponent:.{0 if exponent == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def human_count(n: float) -> str:
    """A count for people: ``14.6M``."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f}{unit}" if n < 100 * factor else f"{n / factor:.0f}{unit}"
    return f"{n:g}"


def print_error(error: Any) -> None:
    """Show one of our own errors the way the command line does."""
    stderr.print("error:", style="bold red", end=" ", highlight=False)
    stderr.print(str(error), highlight=False, markup=False, soft_wrap=True)
