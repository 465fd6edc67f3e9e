from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from stunet import errors

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.STUNetError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_survive_pickling(cls: type[errors.STUNetError]) -> None:
    copy = pickle.loads(pickle.dumps(cls("3 is no 4: take 4")))
    assert type(copy) is cls
    assert str(copy) == "3 is no 4: take 4"


def test_whatever_a_file_leads_to_names_the_file(tmp_path: Path) -> None:
    said = r"x\.json is odd \(KeyError: 'a'\): mend it"
    reading = errors.reading(tmp_path / "x.json", "odd", errors.PlansError, "mend it")
    with pytest.raises(errors.PlansError, match=said) as caught, reading:
        _ = {}["a"]
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(errors.UsageError, match=r"^ours$"), errors.reading("x.json"):
        raise errors.UsageError("ours")
    with pytest.raises(KeyboardInterrupt), errors.reading("x.json"):
        raise KeyboardInterrupt
