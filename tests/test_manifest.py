"""Annotation manifests: their form, their fit to a dataset, and what they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from masks import bind_manifest

from stunet.errors import LabelError
from stunet.files import write_json
from stunet.labels import annotations
from stunet.labels.annotations import group_cases, order_manifest, read_manifest

SCHEMA = json.loads((Path(annotations.__file__).parent / "schemas/annotated_labels.schema.json").read_text())
LABELS = {"background": 0, "kidney_left": 1, "kidney_right": 2, "liver": 3, "kidney": 4, "ignore": 5}
FULL = {
    "version": 1,
    "groups": {"organs": ["liver", "kidney_left", "kidney_right"], "united": ["kidney"]},
    "cases": {"a": "organs", "b": "united", "c": ["liver"]},
    "default": ["liver", "kidney"],
    "weights": {"a": 0.5, "c": 2},
    "superclasses": {"kidney": ["kidney_left", "kidney_right"]},
}

GOOD: list[Any] = [
    FULL,
    {"version": 1, "cases": {}},
    {"version": 1.0, "cases": {"a": ["liver"]}, "groups": {}},
    {"version": 1, "cases": {}, "default": ["liver"]},
    {"version": 1, "cases": {"a": []}, "default": []},
]

BAD_FORM: list[tuple[Any, str]] = [
    ([], "got array"),
    ({"cases": {}}, "version"),
    ({"version": 2, "cases": {}}, "version: Expected float <= 1"),
    ({"version": True, "cases": {}}, "version: .*got bool"),
    ({"version": "1", "cases": {}}, "version: .*got str"),
    ({"version": 1}, "cases"),
    ({"version": 1, "cases": []}, "cases: .*got array"),
    ({"version": 1, "cases": {"b": ["liver"], "a": 3}}, r"cases\['a'\]: .*got int"),
    ({"version": 1, "cases": {"a": None}}, r"cases\['a'\]: .*got null"),
    ({"version": 1, "cases": {"a": ""}}, r"cases\['a'\]: .*length >= 1"),
    ({"version": 1, "cases": {"a": ["liver", "liver"]}}, r"cases\['a'\] has 'liver' twice"),
    ({"version": 1, "cases": {"a": ["liver", 3]}}, r"cases\['a'\]\[1\]: .*got int"),
    ({"version": 1, "cases": {"a": [""]}}, r"cases\['a'\]\[0\]: .*length >= 1"),
    ({"version": 1, "cases": {"": ["liver"]}}, "a key of cases: .*length >= 1"),
    ({"version": 1, "cases": {}, "case": {}}, "unknown field case"),
    ({"version": 1, "cases": {}, "groups": {"g": "liver"}}, r"groups\['g'\]: .*got str"),
    ({"version": 1, "cases": {}, "groups": {"g": []}}, r"groups\['g'\]: .*length >= 1"),
    ({"version": 1, "cases": {}, "groups": None}, "groups: .*got null"),
    ({"version": 1, "cases": {}, "default": None}, "default: .*got null"),
    ({"version": 1, "cases": {}, "weights": {"b": 1, "a": 0}}, r"weights\['a'\]: .*> 0"),
    ({"version": 1, "cases": {}, "weights": {"a": -1.5}}, r"weights\['a'\]: .*> 0"),
    ({"version": 1, "cases": {}, "weights": {"a": True}}, r"weights\['a'\]: .*got bool"),
    ({"version": 1, "cases": {}, "weights": {"a": "2"}}, r"weights\['a'\]: .*got str"),
    ({"version": 1, "cases": {}, "superclasses": {"kidney": ["kidney_left"]}}, r"\['kidney'\]: .*length >= 2"),
    ({"version": 1, "cases": {}, "superclasses": {"kidney": "kidney_left"}}, r"\['kidney'\]: .*got str"),
]

BAD_FIT: list[tuple[dict[str, Any], str]] = [
    ({"cases": {"a": ["spleen"]}}, "unknown structure 'spleen'"),
    ({"cases": {"a": ["Liver"]}}, r"unknown structure 'Liver': Did you mean liver\?"),
    ({"cases": {"a": ["background"]}}, "unknown structure 'background'"),
    ({"cases": {"a": ["ignore"]}}, "unknown structure 'ignore'"),
    ({"cases": {"a": "organs"}}, "unknown group 'organs'"),
    ({"cases": {}, "default": "organs"}, "unknown group 'organs'"),
    ({"cases": {}, "groups": {"g": ["spleen"]}}, r"groups\['g'\] has the unknown structure"),
    ({"cases": {"a": ["liver"], "z": ["liver"]}}, "unknown case 'z'"),
    ({"cases": {"case_b": ["liver"]}, "default": ["liver"]}, r"unknown case 'case_b': Did you mean case_a"),
    ({"cases": {"case_a": ["liver"]}}, "nothing about case a and 2 more"),
    ({"cases": {}, "default": ["liver"], "weights": {"z": 2}}, "unknown case 'z'"),
    ({"cases": {}, "superclasses": {"kidneys": ["kidney_left", "kidney_right"]}}, "unknown structure 'kidneys'"),
    ({"cases": {}, "superclasses": {"kidney": ["kidney_left", "spleen"]}}, "unknown structure 'spleen'"),
    ({"cases": {}, "superclasses": {"kidney": ["kidney", "liver"]}}, "superclass 'kidney' as a member"),
    (
        {"cases": {}, "superclasses": {"kidney": ["kidney_left", "kidney_right"], "liver": ["kidney", "kidney_left"]}},
        "superclass 'kidney' as a member",
    ),
    (
        {"cases": {"a": ["kidney", "kidney_left"]}, "superclasses": {"kidney": ["kidney_left", "kidney_right"]}},
        "'kidney' and 'kidney_left', which overlap",
    ),
]


@pytest.mark.parametrize("content", GOOD)
def test_what_the_schema_takes_is_read(content: Any) -> None:
    jsonschema.validate(content, SCHEMA)
    bind_manifest(content, labels=LABELS, source="m.json")


@pytest.mark.parametrize(("content", "expected"), BAD_FORM)
def test_what_the_schema_refuses_is_refused_with_its_place(tmp_path: Path, content: Any, expected: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(LabelError, match=rf"m\.json.*{expected}"):
        read_manifest(tmp_path / "m.json", labels=LABELS)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(("content", "expected"), BAD_FIT)
def test_what_only_the_dataset_tells(content: dict[str, Any], expected: str) -> None:
    content = {"version": 1, **content}
    jsonschema.validate(content, SCHEMA)
    with pytest.raises(LabelError, match=expected):
        bind_manifest(content, labels=LABELS, cases=["a", "b", "c", "case_a"], source="m.json")


@pytest.mark.parametrize(
    "text", ["{", "", "[" * 100_000, '{"version": 1, "cases": {"a": ["liver"], "a": ["kidney"]}}', '{"version": NaN}']
)
def test_files_that_are_no_json_or_name_a_case_twice(tmp_path: Path, text: str) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(LabelError, match="cannot be used"):
        read_manifest(tmp_path / "m.json", labels=LABELS)
    (tmp_path / "m.json").write_bytes(b"\xff\xfe")
    with pytest.raises(LabelError, match="decode byte"):
        read_manifest(tmp_path / "m.json", labels=LABELS)


def test_what_cases_annotate() -> None:
    manifest = bind_manifest(FULL, labels=LABELS, cases="abcd", source="m.json")
    assert [manifest.annotated(case) for case in "abcd"] == [(1, 2, 3), (4,), (3,), (3, 4)]
    assert manifest.annotated_mask("a").tolist() == [True, True, True, True, False]
    assert manifest.annotated_mask("b").tolist() == [True, False, False, False, True]
    assert [manifest.weight(case) for case in "abcd"] == [0.5, 1, 2, 1]
    assert manifest.leaves == (1, 2, 3)
    assert manifest.superclasses == {4: (1, 2)}
    assert not manifest.is_complete


def test_absent_means_everything(tmp_path: Path) -> None:
    manifest = read_manifest(tmp_path / "annotated_labels.json", labels={"background": 0, "b": 2, "a": 1}, cases=["x"])
    assert manifest.annotated("x") == (1, 2)
    assert manifest.weight("x") == 1
    assert manifest.is_complete
    assert list(manifest.structures) == ["a", "b"]


def test_a_case_that_is_not_listed_is_no_background() -> None:
    manifest = bind_manifest({"version": 1, "cases": {"a": ["liver"]}}, labels=LABELS, source="m.json")
    with pytest.raises(LabelError, match="nothing about case b"):
        manifest.annotated("b")


def test_written_manifests_are_read_again_and_equal_bytes(tmp_path: Path) -> None:
    write_json(order_manifest(FULL), tmp_path / "a.json")
    again = {key: dict(reversed(v.items())) if isinstance(v, dict) else v for key, v in reversed(FULL.items())}
    write_json(order_manifest(again), tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text()) == FULL


def test_cases_that_annotate_the_same_share_a_group() -> None:
    annotated = {"d": "ca", "a": "abc", "c": "ac", "b": "b", "e": "cba"}
    content = group_cases(annotated, "abc")
    assert content["groups"] == {"everything": ["a", "b", "c"], "group_1": ["a", "c"]}
    assert content["cases"] == {"a": "everything", "b": ["b"], "c": "group_1", "d": "group_1", "e": "everything"}
    manifest = bind_manifest(content, labels={"background": 0, "a": 1, "b": 2, "c": 3}, cases=annotated, source="m")
    values = {"a": 1, "b": 2, "c": 3}
    assert all(manifest.annotated(case) == tuple(sorted(values[s] for s in names)) for case, names in annotated.items())
