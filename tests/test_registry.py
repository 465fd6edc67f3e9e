from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stunet.errors import UsageError
from stunet.files import file_sha256
from stunet.labels import load_vocabulary
from stunet.network import SIZES
from stunet.weights import find_entry, load_registry


def write_registry(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": 1, "weights": list(entries)}))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "size": "small", "outputs": 3, "files": [{"file": "a.model"}], **changes}


def test_the_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUNET_REGISTRY", raising=False)
    known = load_registry()
    assert list(known) == [*(f"{s}_ep4k" for s in SIZES), *(f"abdomenatlas_{s}_ep2k" for s in SIZES)]
    for size in SIZES:
        for name in (f"{size}_ep4k", f"abdomenatlas_{size}_ep2k"):
            assert known[name].size == size
            assert known[name].outputs == len(load_vocabulary(known[name].labels or "").labels)
            assert [f.file for f in known[name].pickles] == [f"{known[name].weights_file.file}.pkl", "plans.pkl"]
            assert known[name].sources
            # Each fact that is not null says where it is from.
            assert "licence" in known[name].sources
            assert all(f.url or f.hub or f.by_hand for f in known[name].files)


def test_checksums_of_the_published_pickles(shared: Path) -> None:
    folder = shared / "golden" / "published_plan_files"
    for size in SIZES:
        for file in find_entry(f"{size}_ep4k").pickles:
            assert file.sha256 == file_sha256(folder / file.file)
            assert file.bytes == (folder / file.file).stat().st_size


def test_a_registry_of_ones_own_goes_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_registry(tmp_path / "r.json", entry(), entry(name="small_ep4k", outputs=7))
    monkeypatch.setenv("STUNET_REGISTRY", str(path))
    known = load_registry()
    assert list(known)[:2] == ["mine", "small_ep4k"]
    assert known["small_ep4k"].outputs == 7
    assert known["base_ep4k"].outputs == 105


def test_unknown_weights() -> None:
    with pytest.raises(UsageError, match="small_ep4k") as caught:
        find_entry("giant")
    assert "stunet list" in caught.value.remedy


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (entry(name="../evil"), "name"),
        (entry(name="-o"), "name"),
        (entry(outputs=0), "outputs"),
        (entry(outputs=True), "outputs"),
        (entry(size=None), "size"),
        (entry(surprise=1), "unknown field 'surprise'"),
        (entry(labels="no_such"), "totalsegmentator_104"),
        (entry(labels="abdomenatlas_9"), "3 outputs"),
        (entry(page="javascript:alert(1)"), "page"),
        (entry(files=[]), "files"),
        (entry(files=["a.model"]), "not an object"),
        (entry(files=[{"file": "../a.model"}]), "without a folder"),
        (entry(files=[{"file": "a/b.model"}]), "without a folder"),
        (entry(files=[{"file": ".a.model"}]), "without a folder"),
        (entry(files=[{"file": "a.sh"}]), "without a folder"),
        (entry(files=[{"file": "a.record.json"}]), "without a folder"),
        (entry(files=[{"file": "a.pkl"}]), "one file with weights"),
        (entry(files=[{"file": "a.model"}, {"file": "b.pth"}]), "one file with weights"),
        (entry(files=[{"file": "a.model"}, {"file": "p.pkl"}, {"file": "P.pkl"}]), "one file with weights"),
        (entry(files=[{"file": "a.model", "url": "file:///etc/passwd"}]), "url"),
        (entry(files=[{"file": "a.model", "url": 3}]), "url"),
        (entry(files=[{"file": "a.model", "hub": "nobody"}]), "OWNER/NAME"),
        (entry(files=[{"file": "a.model", "hub": "../../x"}]), "OWNER/NAME"),
        (entry(files=[{"file": "a.model", "sha256": SHA.upper()}]), "64 hexadecimal digits"),
        (entry(files=[{"file": "a.model", "bytes": -1}]), "bytes"),
        (entry(files=[{"file": "a.model", "by_hand": [{"page": "http://x"}]}]), "item"),
        ([], "not an object"),
    ],
)
def test_a_malformed_registry(broken: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUNET_REGISTRY", str(write_registry(tmp_path / "r.json", broken)))
    with pytest.raises(UsageError, match="a registry of weights that cannot be used") as caught:
        load_registry()
    assert expected in caught.value.got
    assert "r.json" in caught.value.got


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": 2, "weights": []}', '{"version": 1}'])
def test_a_file_that_is_no_registry(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("STUNET_REGISTRY", str(path))
    with pytest.raises(UsageError, match=r"r\.json"):
        load_registry()


def test_an_entry_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUNET_REGISTRY", str(write_registry(tmp_path / "r.json", entry(), entry())))
    with pytest.raises(UsageError, match="mine twice"):
        load_registry()
