"""Label maps of direct evaluation: the shipped systems, files, suggestions, and what is compared in the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from masks import bind_manifest

from stunet.errors import LabelError
from stunet.labels.labels import load_vocabulary
from stunet.labels.mappings import (
    list_label_systems,
    load_label_system,
    observed_values,
    read_label_map,
    relate_labels,
    suggest_label_map,
)

MODEL = {"background": 0, "kidney_left": 1, "kidney_right": 2, "liver": 3, "heart": 4}
TARGET = {"background": 0, "Kidneys": 1, "Liver": 2, "liver tumour": 3, "prostate": 4, "ignore": 5}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def relate(tmp_path: Path, text: str, target: dict[str, Any] = TARGET) -> Any:
    return relate_labels(MODEL, target, read_label_map(write(tmp_path / "m.yaml", text)))


def compared(relation: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {c.name: (c.target_values, c.source_values) for c in relation.comparisons}


def numbered(system: str) -> dict[str, Any]:
    """Labels of a dataset as the system has it, with gaps filled and merged labels by one name and others."""
    by_value = {value: e.name for e in load_label_system(system).entries for value in e.target[:1]}
    labels = {by_value.get(value, f"something {value}"): value for value in range(1, max(by_value) + 3)}
    return {"background": 0, **labels}


def test_shipped_systems_are_the_published_ones(shared: Path) -> None:
    facts = json.loads((shared / "facts" / "direct_inference_label_systems.json").read_text())
    names = facts["structure_to_totalsegmentator"]
    assert len(facts["datasets"]) == len(list_label_systems())
    for published, system in facts["datasets"].items():
        expected = {
            (tuple(map(int, values.removeprefix("agg:").split(","))), name): set(
                names.get(name, name).removeprefix("agg:").split(",")
            )
            for values, name in system.items()
        }
        assert {(e.target, e.name): set(e.source) for e in load_label_system(published).entries} == expected


@pytest.mark.parametrize("system", list_label_systems())
def test_shipped_systems_fit_the_vocabulary_of_the_published_weights(system: str) -> None:
    structures = load_vocabulary("totalsegmentator_104").labels[1:]
    for entry in load_label_system(system).entries:
        assert entry.source
        assert entry.target
        assert set(entry.source) <= set(structures)


def test_there_are_fourteen_systems_and_they_bind_by_value() -> None:
    assert len(list_label_systems()) == 14
    model = load_vocabulary("totalsegmentator_104").as_dataset_labels()
    for system in list_label_systems():
        relation = relate_labels(model, numbered(system), load_label_system(system))
        entries = {e.name: e for e in load_label_system(system).entries}
        assert [c.name for c in relation.comparisons] == sorted(entries, key=lambda name: entries[name].target)
        for comparison in relation.comparisons:
            assert comparison.target_values == entries[comparison.name].target
            assert comparison.source_values == tuple(sorted(model[name] for name in entries[comparison.name].source))
        assert relation.doubtful == ()


def test_systems_go_by_any_spelling_of_their_names() -> None:
    assert load_label_system("Task011_BTCV") == load_label_system("BTCV") == load_label_system("btcv")
    assert load_label_system("ct-org").origin == "ct_org"
    with pytest.raises(LabelError, match=r"btvc.*one of abdomenct_1k, amos22, btcv, .*word"):
        load_label_system("btvc")


def test_a_system_of_another_dataset_is_refused() -> None:
    model = load_vocabulary("totalsegmentator_104").as_dataset_labels()
    labels = {"background": 0, "spleen": 1, "left kidney": 2, "right kidney": 3}
    with pytest.raises(LabelError, match=r"label 2 is left kidney in dataset.json, not right kidney, as btcv has it"):
        relate_labels(model, labels, load_label_system("btcv"))


def test_a_name_that_says_nothing_is_taken_by_its_value_and_told() -> None:
    model = load_vocabulary("totalsegmentator_104").as_dataset_labels()
    labels = {**{f"v{i}": i for i in range(8)}, "arota": 8}
    relation = relate_labels(model, {"background": 0, **labels}, load_label_system("amos22"))
    assert ("arota", "aorta") in relation.doubtful
    assert compared(relation)["aorta"] == ((8,), (3,))
    assert relation.left_out["pancreas"] == "the dataset does not have it"
    assert relation.left_out["v4"] == "no part of amos22"


def test_a_system_with_a_model_that_has_less() -> None:
    relation = relate_labels(MODEL, {"background": 0, **{f"v{i}": i for i in range(1, 7)}}, load_label_system("ct_org"))
    assert compared(relation) == {"liver": ((1,), (3,)), "kidney": ((4,), (1, 2))}
    assert relation.left_out["v2"] == "the model has no urinary_bladder"


def test_names_that_agree_need_no_map() -> None:
    relation = relate_labels(MODEL, {"background": 0, "LK": 3, "Right Kidney": 2, "liver": 1, "tumour": 7})
    assert compared(relation) == {"liver": ((1,), (3,)), "Right Kidney": ((2,), (2,)), "LK": ((3,), (1,))}
    assert relation.left_out == {"tumour": "the model has nothing of this name"}


def test_merging_on_both_sides_renaming_and_leaving_out(tmp_path: Path) -> None:
    relation = relate(
        tmp_path,
        "Kidneys: [kidney_left, Right Kidney]\n"
        "whole liver: {target: [Liver, liver tumour], source: liver}\n"
        "prostate: heart\n",
    )
    assert compared(relation) == {"Kidneys": ((1,), (1, 2)), "whole liver": ((2, 3), (3,)), "prostate": ((4,), (4,))}
    assert relation.left_out == {}
    relation = relate(tmp_path, "Liver: null\nKidneys: []\nprostate: heart\n")
    assert compared(relation) == {"prostate": ((4,), (4,))}
    assert relation.left_out == {
        "Liver": "left out by the label map",
        "Kidneys": "left out by the label map",
        "liver tumour": "the model has nothing of this name",
    }


def test_regions_on_both_sides(tmp_path: Path) -> None:
    model = {"background": 0, "whole": [1, 2], "core": [2]}
    target = {"background": [0], "tumour": [3, 1], "core": 3}
    relation = relate_labels(model, target, read_label_map(write(tmp_path / "m.yaml", "tumour: whole")))
    assert compared(relation) == {"tumour": ((1, 3), (1, 2)), "core": ((3,), (2,))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Kidnys: liver", r"unknown structure 'Kidnys'.*Did you mean Kidneys"),
        ("Kidneys: [kidney_left, kidney_rigt]", r"'kidney_rigt'.*Did you mean kidney_right or kidney_left"),
        ("prostate: zzz", r"'zzz'[\s\S]*one of kidney_left, kidney_right, liver, heart"),
        ("prostate: background", "unknown structure 'background'"),
        ("ignore: heart", "unknown structure 'ignore'"),
        ("x: {target: [Liver], sauce: [liver]}", "\\['x'\\].*unknown field sauce"),
        ("x: {target: [], source: [liver]}", r"\['x'\].target: .*length >= 1"),
        ("x: {target: [Liver, Liver], source: [liver]}", "'Liver' twice"),
        ("Kidneys: 3", r"\['Kidneys'\]: .*got int.*quotes"),
        ("no: liver", "a key: .*got bool.*quotes"),
        ("Kidneys: liver\nKidneys: heart", "duplicate key 'Kidneys'"),
        ("x: {target: [Liver], source: [liver]}\nLiver: heart", r"x \(Liver\) and Liver \(Liver\)"),
        ("Liver: {target: [prostate], source: [liver]}", r"Liver \(prostate\) and Liver \(Liver\)"),
        ("Kidneys: null\nLiver: null\n'liver tumour': null\nprostate: null", "nothing to compare: the dataset has K"),
        ("- a", "got array"),
        ("{", "m.yaml.*expected the node content"),
        ("Kidneys: !!python/object/apply:os.system ['echo']", "could not determine a constructor"),
    ],
)
def test_label_maps_that_cannot_be_used(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(LabelError, match=expected):
        relate(tmp_path, text)


def test_without_anything_in_common() -> None:
    with pytest.raises(LabelError, match=r"the dataset has prostate; the model kidney_left, .*--suggest-map"):
        relate_labels(MODEL, {"background": 0, "prostate": 1})


@pytest.mark.parametrize("labels", [{"a": "one"}, {"a": True}, {"a": -1}, {"a": []}, {"background": 0, "ignore": 2}])
def test_labels_that_are_none(labels: dict[str, Any]) -> None:
    with pytest.raises(LabelError):
        relate_labels(labels, labels)


def test_a_suggestion_is_a_label_map(tmp_path: Path) -> None:
    model = load_vocabulary("totalsegmentator_104").as_dataset_labels()
    names = ["Liver", "kidneys", "Left Lung", "lungs", "ribs", "no", "größe: 1", "Prostata, links", "gallbladdr"]
    target = {"background": 0, **{name: i for i, name in enumerate(names, start=1)}}
    text = suggest_label_map(list(model)[1:], names)
    relation = relate_labels(model, target, read_label_map(write(tmp_path / "m.yaml", text)))
    lobes = sorted(v for name, v in model.items() if name.startswith("lung_"))
    left = sorted(v for name, v in model.items() if name.startswith("lung_") and name.endswith("left"))
    assert compared(relation) == {
        "Liver": ((1,), (40,)), "kidneys": ((2,), (38, 39)), "Left Lung": ((3,), tuple(left)),
        "lungs": ((4,), tuple(lobes)),
        "ribs": ((5,), tuple(sorted(v for name, v in model.items() if name.startswith("rib_")))),
    }  # fmt: skip
    assert dict.fromkeys(relation.left_out.values()) == {"left out by the label map": None}
    assert "gallbladdr: null  # close: gallbladder" in text


def test_a_suggestion_merges_what_only_the_dataset_divides(tmp_path: Path) -> None:
    target = {"background": 0, "LK": 1, "RK": 2, "atrium left": 3, "left foot": 4}
    text = suggest_label_map(["kidney", "heart_atrium", "foot"], list(target)[1:])
    assert "kidney: {target: [LK, RK], source: [kidney]}" in text
    relation = relate_labels({"kidney": 5, "heart_atrium": 6, "foot": 7}, target, read_label_map(
        write(tmp_path / "m.yaml", text)))  # fmt: skip
    assert compared(relation) == {"kidney": ((1, 2), (5,))}  # of atrium and foot the other side is lacking


def test_what_a_case_annotates() -> None:
    labels = {"background": 0, "kidney_left": 1, "kidney_right": 2, "liver": 3, "kidney": 4}
    manifest = bind_manifest(
        {
            "version": 1,
            "superclasses": {"kidney": ["kidney_left", "kidney_right"]},
            "cases": {"all": ["kidney_left", "kidney_right", "liver"], "some": ["kidney", "liver"],
                      "left": ["kidney_left"]},
        },
        labels=labels,
        source="test",
    )  # fmt: skip
    model = {"kidney_left": 1, "kidney_right": 2, "kidney": 9, "liver": 3}
    by_name = {c.name: c for c in relate_labels(model, labels).comparisons}
    expected = {
        ("all", "kidney_left"): (1,), ("some", "kidney_left"): None, ("left", "kidney_left"): (1,),
        # either the whole or all of its parts
        ("all", "kidney"): (1, 2, 4), ("some", "kidney"): (1, 2, 4), ("left", "kidney"): None,
        ("all", "liver"): (3,), ("some", "liver"): (3,), ("left", "liver"): None,
    }  # fmt: skip
    found = {(case, name): observed_values(by_name[name], manifest, case) for case, name in expected}
    assert found == expected
    with pytest.raises(LabelError, match="nothing about case new"):
        observed_values(by_name["liver"], manifest, "new")
