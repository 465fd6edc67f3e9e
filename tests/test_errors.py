from __future__ import annotations

import inspect
import pickle

import pytest

from stunet import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.STUNetError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_message_has_all_parts_and_survives_pickling(cls: type[errors.STUNetError]) -> None:
    error = cls("bad thing", got=3, expected="4", remedy="Do it.")
    for part in ("bad thing", "got:      3", "expected: 4", "remedy:   Do it."):
        assert part in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert str(copy) == str(error)


def test_the_docstring_draws_the_whole_tree() -> None:
    drawn = {line.split("── ")[1].split()[0] for line in (errors.__doc__ or "").splitlines() if "── " in line}
    assert drawn == {c.__name__ for c in CLASSES} - {"STUNetError"}
    assert set(errors.__all__) == {c.__name__ for c in CLASSES} | {"reading"}
