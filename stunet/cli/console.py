"""What the commands share: terminal output, and list options in nnU-Net's style."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer import Exit, echo
from typer.core import TyperCommand, TyperGroup

#: Key of a context's ``meta``: the values of the list option that the command line ends with.
LIST_VALUES = "stunet.list_values"

_LIST_OPTION = "stunet.list_option"
_LONGEST_WORD = 48  # that a table keeps in one line

# Names of cases, structures and files are printed everywhere: [old] and :x: in them are text, not markup.
stdout = Console(markup=False, emoji=False, highlight=False)
stderr = Console(stderr=True, markup=False, emoji=False, highlight=False)


def print_line(line: str, *, style: str | None = None) -> None:
    """Print a line as it is, however long."""
    stdout.print(line, style=style, soft_wrap=True)


def say(line: str, *, style: str | None = None) -> None:
    """Print a line on standard error, as it is."""
    stderr.print(line, style=style, soft_wrap=True)


def warn(line: str) -> None:
    """Print a line on standard error that must not be overlooked."""
    say(line, style="bold red")


def print_error(error: Any) -> None:
    """Show one of our own errors the way the command line does."""
    stderr.print("error:", style="bold red", end=" ")
    say(str(error))


def print_json(content: Any) -> None:
    """Print JSON on standard output."""
    echo(json.dumps(content, indent=2))


def exit_with_failures(failed: Mapping[str, object], consequence: str) -> None:
    """Where cases have failed, show them and what follows, and leave with exit status 2."""
    for case, error in failed.items():
        say(f"case {case}:")
        print_error(error)
    if failed:
        say(f"{len(failed)} cases {consequence}")
        raise Exit(2)


@contextmanager
def progress_bar(text: str, total: float | None = None, *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a bar where standard error is a terminal; yield what sets its description, total and completed."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), MofNCompleteColumn())
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, *times, console=stderr, disable=not (shown and stderr.is_terminal), transient=True) as bars:
        yield partial(bars.update, bars.add_task(text, total=total))


@contextmanager
def case_bar(text: str, n_cases: int) -> Iterator[Callable[..., None]]:
    """Show how many cases are done; yield what is called after each."""
    with progress_bar(text, n_cases) as update:
        yield lambda *_: update(advance=1)


class _Help:
    """Help without the type of flags, which typer shows as ``--json <bool>``."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return all parameters, ``--help`` included."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc] # of the class that this is mixed into
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif getattr(param, "multiple", False) and param.metavar is None:
                param.metavar = "TEXT ..."
        return params


class Group(_Help, TyperGroup):
    """A command with subcommands."""


class Command(_Help, TyperCommand):
    """A command whose list options take several values at once, as nnU-Net's do: ``-c 2d 3d_fullres``.

    Typer wants an option's name before each value; that keeps working, and is the only way beside positional arguments.
    What the function's docstring says of its parameters under ``Options:`` is their help. Flags have no ``--no-…``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text, _, described = (self.help or "").partition("\n\nOptions:\n")
        self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        helps = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", described, re.MULTILINE))
        for param in self.params:
            param.secondary_opts = []
            if param.name in helps:
                cast(Any, param).help = " ".join(helps[param.name].split())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the name of a list option before each further value."""
        has_arguments = any(p.param_type_name == "argument" for p in self.params)
        multiple = [p for p in self.params if getattr(p, "multiple", False) and not has_arguments]
        options: dict[str, Any] = {name: p for p in multiple for name in p.opts}
        expanded: list[str] = []
        current, n_values = "", 0
        for arg in args:
            if arg.startswith("-"):
                name, has_value, _ = arg.partition("=")
                current, n_values = (name if name in options else ""), int(bool(has_value))
            elif current:
                expanded += [current] * bool(n_values)
                n_values += 1
            expanded.append(arg)
        if current and n_values:
            ctx.meta[_LIST_OPTION], ctx.meta[LIST_VALUES] = options[current], args[-n_values:]
        return super().parse_args(ctx, expanded)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Complete further values of a list option, too."""
        option = None if incomplete.startswith("-") else ctx.meta.get(_LIST_OPTION)
        return list(option.shell_complete(ctx, incomplete) if option else super().shell_complete(ctx, incomplete))


def print_table(
    rows: Iterable[Sequence[object]],
    *columns: str,
    title: str = "",
    caption: str = "",
    numbers: Collection[str] = (),
    padding: int = 1,
    console: Console = stdout,
) -> None:
    """Print a table for 80 columns, without a frame; an empty row draws a line, and no column names, no head.

    Texts are no markup, but may have a style. Columns keep the width of their words, and longer texts are folded: names
    are not cut.
    """
    lines = [list(row) for row in rows]
    table = Table(padding=(0, padding, 0, 0), pad_edge=False, show_edge=False, show_header=bool(columns))
    table.box, table.title_justify, table.caption_justify = SIMPLE_HEAD if columns else None, "left", "left"
    table.title, table.caption = Text(title) if title else None, Text(caption) if caption else None
    for i, column in enumerate(columns or [""] * len(lines[0])):
        cells = [column, *(str(row[i]) for row in lines if row)]
        width = min(max(map(len, " ".join(cells).split()), default=0), _LONGEST_WORD)
        whole = max(map(len, cells)) <= width  # else rich narrows it first, and cuts off what then is too wide
        justify: Literal["left", "right"] = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", min_width=width, no_wrap=whole)
    for row in lines:
        if row:
            table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
        else:
            table.add_section()
    console.print(table)


def human_bytes(n: float) -> str:
    """Write bytes for people: ``1.5 GB``, where 1 GB is 1024^3 bytes."""
    exponent = min(int(math.log(max(n, 1), 1024)), 4)
    return f"{n / 1024**exponent:.{0 if exponent == 0 else 1}f} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def human_count(n: float) -> str:
    """Write a count for people: ``14.6M``."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.{1 if n < 100 * factor else 0}f}{unit}"
    return f"{n:g}"
