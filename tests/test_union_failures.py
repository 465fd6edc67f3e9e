"""All that can be wrong with the sources of a union, and what can happen while it is made."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from killing import run_and_kill
from raw_datasets import AFFINE, SHAPE, write_raw
from union_cases import B_LABELS, NAMES, annotated, contents, dataset_json, run, write_sources

from stunet.datasets.unions import check_sources, read_union_source
from stunet.errors import DatasetError, LabelError
from stunet.labels.mappings import UnionMapping


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return write_sources(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-12])


def unlisted_value(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, 9, np.uint8), AFFINE), path)


def fraction(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.full(SHAPE, 0.5, np.float32), AFFINE), path)


def reshape(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((2, 5, 4), np.uint8), AFFINE), path)


def stretch(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE * [[2], [1], [1], [1]]), path)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (truncate, "unreadable image file"),
        (unlisted_value, "does not list: 9"),
        (fraction, "values that are no labels"),
        (reshape, r"another shape, \(2, 5, 4\), than .*a1_0000.*, \(6, 5, 4\)"),
        (stretch, "another spacing"),
    ],
)
def test_a_bad_label_map_is_named_and_stops_no_other(raw: Path, damage: Callable[[Path], None], expected: str) -> None:
    path = raw / NAMES[0] / "labelsTr" / "a1.nii.gz"
    whole = path.read_bytes()
    run(raw, "Dataset701_U")
    damage(path)
    report = run(raw)
    assert list(report.failed) == ["D007_a1"]
    assert str(path) in str(report.failed["D007_a1"])
    with pytest.raises(DatasetError, match=expected):
        raise report.failed["D007_a1"]
    union = raw / "Dataset700_U"
    assert [p.name[:-7] for p in sorted((union / "labelsTr").iterdir())] == ["D007_a0", "D007_a2", "D007_a3", "D123_x"]
    assert dataset_json(union)["numTraining"] == 4
    weights = json.loads((union / "annotated_labels.json").read_text())["weights"]
    assert weights["D007_a0"] == pytest.approx(3**-0.5, rel=1e-5)
    kept = run(raw, "Dataset701_U")  # which had it when it was whole
    assert (list(kept.failed), kept.kept) == (["D007_a1"], ["D007_a1"])
    path.write_bytes(whole)
    assert run(raw).reused == 4
    assert contents(union) == contents(raw / "Dataset701_U") | {
        "import_report.json": (union / "import_report.json").read_bytes()
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"channel_names": {"0": "MRI"}}, "different channels, Dataset007_A: CT; Dataset123_B: MRI"),
        ({"file_ending": ".nii"}, "different file endings.*one reader"),
        ({"unit": "micron"}, "different units of spacing, Dataset007_A: mm; Dataset123_B: µm"),
        ({"overwrite_image_reader_writer": "NibabelIO"}, "different image readers"),
        ({"labels": {"background": 0, "a": [1, 2], "b": 2}}, r"Dataset123_B: a is a region, \[1, 2\]"),
        ({"labels": {"background": 0, "a": 1, "A": 2}}, r"Dataset123_B: 'a' and 'A'"),
        ({"manifest": {"cases": {"x": ["lung"]}}}, r"Dataset123_B/annotated_labels.json.*unknown structure 'lung'"),
        ({"cases": ["x", "X"]}, "Dataset123_B: 'x' and 'X'"),
    ],
)
def test_sources_that_do_not_fit(raw: Path, options: dict[str, Any], expected: str) -> None:
    shutil.rmtree(raw / NAMES[1])
    options = {"labels": B_LABELS, "cases": ["x"], **options}
    write_raw(raw / NAMES[1], **options)
    with pytest.raises((DatasetError, LabelError), match=expected):
        run(raw)
    assert not (raw / "Dataset700_U").exists()


def test_channels_are_compared_in_order_and_without_case(raw: Path) -> None:
    two = {"channel_names": {"1": "b", "0": "A"}}
    for folder, names in (("Dataset001_A", two), ("Dataset002_B", {"channel_names": {"0": "a", "1": "B"}})):
        write_raw(raw / folder, B_LABELS, ["x"], **names)
    sources = [read_union_source(raw / name) for name in ("Dataset001_A", "Dataset002_B")]
    check_sources(sources)
    with pytest.raises(DatasetError, match=r"different channels.*A, b; Dataset007_A: CT"):
        check_sources([*sources, read_union_source(raw / NAMES[0])])
    with pytest.raises(DatasetError, match="Dataset001_A twice"):
        check_sources([sources[0], sources[0]])
    with pytest.raises(DatasetError, match="two or more"):
        check_sources(sources[:1])


def test_a_case_that_annotates_a_superclass_and_a_member(raw: Path) -> None:
    write_raw(raw / NAMES[1], {"background": 0, "kidney": 1, "kidney_left": 2}, ["x", "y"])
    with pytest.raises(LabelError, match="Dataset123_B, case x annotates kidney and kidney_left, which overlap"):
        run(raw)
    manifest = {"cases": {"x": ["kidney"], "y": ["kidney_left"]}}
    write_raw(raw / NAMES[1], {"background": 0, "kidney": 1, "kidney_left": 2}, ["x", "y"], manifest=manifest)
    run(raw)
    assert annotated(raw / "Dataset700_U")["D123_x"] == ["kidney"]


def test_a_structure_annotated_nowhere(raw: Path) -> None:
    manifest = {"cases": {"x": ["kidneys", "Spleen"]}}
    write_raw(raw / NAMES[1], B_LABELS, ["x"], manifest=manifest)
    with pytest.raises(DatasetError, match=r"no training case annotates liver tumour.*--allow-unannotated"):
        run(raw)
    assert not (raw / "Dataset700_U").exists()
    run(raw, allow_unannotated=True)
    shutil.rmtree(raw / "Dataset700_U")
    (raw / NAMES[1] / "annotated_labels.json").unlink()
    truncate(raw / NAMES[1] / "labelsTr" / "x.nii.gz")
    with pytest.raises(DatasetError, match=r"spleen, liver tumour.*1 cases failed, D123_x first: unreadable"):
        run(raw)
    assert not (raw / "Dataset700_U" / "dataset.json").exists()


def test_a_folder_that_holds_something_else_is_kept(raw: Path) -> None:
    run(raw)
    before = contents(raw)
    mapping = UnionMapping({}, {}, "m.yaml")
    with pytest.raises(DatasetError, match=r"there already, .*, an import with other labels, superclasses"):
        run(raw, mapping=mapping)
    with pytest.raises(DatasetError, match=r"there already, .*, no import of this kind"):
        run(raw, NAMES[0])
    assert contents(raw) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and a limit of file sizes")
def test_a_full_disk_and_then_room(raw: Path) -> None:
    import resource

    sources = [read_union_source(raw / name) for name in NAMES]
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (250, 250))
        try:
            run(raw, sources=sources)
        except OSError as error:
            os._exit(7 if error.errno == errno.EFBIG and str(raw) in str(error.filename) else 1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert not (raw / "Dataset700_U" / "dataset.json").exists()
    run(raw)
    run(raw, "Dataset701_U")
    assert contents(raw / "Dataset700_U") == contents(raw / "Dataset701_U")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_killed_at_each_change_and_continued(
    raw: Path, after: bool, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        (raw / name / "splits_final.json").write_text('[{"train": [], "val": []}]')
    (raw / NAMES[0] / "splits_final.json").write_text('[{"train": ["a0"], "val": ["a1"]}]')
    if broken:
        truncate(raw / NAMES[0] / "labelsTr" / "a2.nii.gz")
    monkeypatch.setenv("nnUNet_preprocessed", str(raw / "preprocessed"))
    sources = [read_union_source(raw / name) for name in NAMES]
    run(raw, sources=sources)
    expected = contents(raw / "Dataset700_U") | contents(raw / "preprocessed")
    moment, dataset_seen = 0, False
    while True:
        moment += 1
        shutil.rmtree(raw / "Dataset700_U")
        shutil.rmtree(raw / "preprocessed", ignore_errors=True)
        if not run_and_kill(lambda: run(raw, sources=sources), moment, after):
            break
        if (raw / "Dataset700_U" / "dataset.json").exists():
            dataset_seen = True
            there = {k: v for k, v in contents(raw / "Dataset700_U").items() if not k.startswith(".import")}
            assert there.items() <= expected.items()
        run(raw, sources=sources)
        assert contents(raw / "Dataset700_U") | contents(raw / "preprocessed") == expected, moment
    assert moment > 12
    assert dataset_seen
