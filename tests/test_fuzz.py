"""Files of others: damaged and crafted ones give an error of ours, soon, in little memory, and nothing in them runs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import unet, write_unet
from prediction_models import smooth_image, write_image, write_model
from raw_datasets import write_raw
from safetensors.torch import save_file
from weights import published, tiny_weights, v1_plans, write_v1

from stunet.cli.main import main
from stunet.errors import CheckpointError, STUNetError
from stunet.evaluation import read_description
from stunet.inference import load_model
from stunet.labels.labels import Vocabulary
from stunet.planning.model_folder import describe_model
from stunet.ranking.ranking import read_zoo
from stunet.weights.convert import SourceWeights, open_any_weights, open_weights
from stunet.weights.read import read_checkpoint, read_pickle
from stunet.weights.sharded import load_sharded, read_sharded

LABELS = Vocabulary("test", ("background", "liver", "spleen"), "test")
SECONDS = 10  # of a core's time for one file; what hangs does so for hours
MEMORY = 400 * 2**20  # beyond what the process has; the files are of kilobytes
ODD = (None, True, -1, 0, 7, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", [], {}, [[]], [1, 2], {"a": 1})

File = tuple[str, Callable[[], object]]
"""What a file is, and what reads it."""


def read_weights(path: Path) -> None:
    """As ``stunet convert``, ``rank`` and ``plan --from`` do."""
    weights = open_any_weights(path)
    if isinstance(weights, SourceWeights):
        describe_model(weights, LABELS)


def read_model(folder: Path) -> None:
    """As ``stunet predict`` and ``evaluate`` do before they look at an image."""
    read_description(folder)
    load_model(folder).weights("0")


def read_version(version: Path) -> None:
    """As a sharded training that continues does."""
    content, shapes = read_sharded(version)
    assert isinstance(content["current_epoch"], int)
    load_sharded(version, {name: torch.zeros(shape.shape, dtype=shape.dtype) for name, shape in shapes.items()})


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut, or a piece put elsewhere."""
    data, at = bytearray(whole), rng.randrange(len(whole))
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        piece = data[at : at + rng.randrange(1, 64)]
        data[(to := rng.randrange(len(data))) : to] = piece
    else:
        data[at : at + rng.randrange(1, 16)] = rng.randbytes(rng.randrange(1, 16))
    return bytes(data)


def swapped(content: Any, rng: random.Random) -> Any:
    """The same with one value somewhere replaced by an odd one, or gone."""
    content = copy.deepcopy(content)
    parent = content
    while True:
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        child = parent[key]
        if not (isinstance(child, dict | list) and child) or rng.random() < 0.2:
            break
        parent = child
    if isinstance(parent, dict) and rng.random() < 0.2:
        del parent[key]
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return content


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fuzzed(folder: Path) -> Iterator[File]:
    """A few hundred files: whole ones of each kind, damaged in every way."""
    rng = random.Random(13)
    write_v1(folder, tiny_weights(), v1_plans())
    torch.save({"state_dict": published(tiny_weights())}, folder / "old.model", _use_new_zipfile_serialization=False)
    write_unet(folder / "unet.pth", unet())
    save_file(tiny_weights(), folder / "x.safetensors")
    model = write_model(folder / "model", num_classes=3, mirroring=(0, 1, 2))
    checkpoint = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)

    for name in ("x.model", "old.model", "unet.pth", "x.safetensors", "model/fold_0/checkpoint_final.pth"):
        whole = (folder / name).read_bytes()
        for _ in range(25):
            path = written(folder / "damaged" / Path(name).name, damaged(whole, rng))
            yield f"damaged {name}", lambda path=path: read_weights(path)
    plain = pickle.dumps(v1_plans())
    for _ in range(60):
        path = written(folder / "damaged.pkl", damaged(plain, rng))
        yield "damaged pickle", lambda path=path: read_pickle(path)
    for _ in range(30):
        plans = pickle.dumps({"plans": swapped(v1_plans(), rng), "init": ("", 0, "", "", True, 0)})
        path = written(folder / "x.model.pkl", plans).with_suffix("")
        yield "plans of v1", lambda path=path: read_weights(path)
    for _ in range(30):
        torch.save({**checkpoint, "init_args": swapped(checkpoint["init_args"], rng)}, folder / "args.pth")
        yield "init_args", lambda: read_weights(folder / "args.pth")
    for name in ("plans.json", "dataset.json"):
        whole, content = (model / name).read_bytes(), json.loads((model / name).read_text())
        for i in range(60):
            data = damaged(whole, rng) if i < 15 else json.dumps(swapped(content, rng)).encode()
            written(model / name, data)
            yield f"{name}: {data[:2000]!r}", lambda: read_model(model)
        written(model / name, whole)
    weights = checkpoint["network_weights"]
    for _ in range(15):
        content = {**swapped({**checkpoint, "network_weights": 1}, rng), "network_weights": weights}
        torch.save(content, model / "fold_0" / "checkpoint_final.pth")
        yield "checkpoint of a model folder", lambda: read_model(model)
    zoo = f"checkpoints:\n  - {{name: a, path: {folder / 'unet.pth'}}}\n  - path: '{folder / 'x.model'}'\n".encode()
    for _ in range(40):
        path = written(folder / "zoo.yaml", damaged(zoo, rng))
        yield f"YAML {path.read_bytes()!r}", lambda path=path: read_zoo(path)
    yield from fuzzed_shards(folder / "0001", rng)


def fuzzed_shards(version: Path, rng: random.Random) -> Iterator[File]:
    version.mkdir()
    torch.save({"current_epoch": 3}, version / "training.pth")
    torch.save(torch.ones(3, 2), version / "__0_0.distcp")
    piece = {"offsets": [0, 0], "sizes": [3, 2], "file": "__0_0.distcp", "start": 0,
             "bytes": (version / "__0_0.distcp").stat().st_size}  # fmt: skip
    index = {"tensors": {"network.a": {"dtype": "float32", "size": [3, 2], "pieces": [piece]}}}
    (version / "tensors.json").write_text(json.dumps(index))
    read_version(version)
    whole = (version / "__0_0.distcp").read_bytes()
    for i in range(40):
        (version / "tensors.json").write_text(json.dumps(swapped(index, rng) if i % 2 else index))
        written(version / "__0_0.distcp", whole if i % 2 else damaged(whole, rng))
        yield "sharded", lambda: read_version(version)


class Call:
    """Something whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called


def rewritten(source: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A zip archive with other content, and checksums that fit it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return path


DOUBLED = b")" + b"q\x00h\x00\x86" * 60  # t = (t, t), sixty times: the hash of it takes for ever
BOMBS = {
    "nested tuples as a key": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "nested tuples in a set": b"\x80\x04\x8f(" + DOUBLED + b"\x90.",
    "a deep tuple": b"\x80\x02)" + b"\x85" * 300_000 + b".",
    "empty sets": b"\x80\x04(" + b"\x8f" * (8 * 2**20) + b"t.",
    "numbers with one hash as keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(1, 20_000))
    + b"u.",
}


def crafted(folder: Path) -> Iterator[File]:
    """Small files that would hang, fill the memory, show what is in it, or run code."""
    folder.mkdir()
    key = "encoder.stages.0.0.conv1.weight"
    weights = tiny_weights()
    torch.save({"network_weights": weights, "current_epoch": 1}, folder / "whole.pth")
    for name, data in BOMBS.items():
        path = written(folder / f"{name}.pkl", data)
        yield name, lambda path=path: read_pickle(path)
        path = rewritten(folder / "whole.pth", folder / f"{name}.pth",
                         lambda name, old, data=data: data if name.endswith("data.pkl") else old)  # fmt: skip
        yield f"{name}, in a checkpoint", lambda path=path: read_weights(path)
    for legacy in (False, True):
        for function, *args in ((torch.storage.TypedStorage, 10**6), (torch.UntypedStorage, 10**6),
                                (os.mkdir, str(folder / "ran")), (torch.hub.load, "a", "b")):  # fmt: skip
            content = {"network_weights": {**weights, key: Call(function, *args)}, "current_epoch": 1}
            torch.save(content, path := folder / f"call{len(list(folder.iterdir()))}.pth",
                       _use_new_zipfile_serialization=not legacy)  # fmt: skip
            yield f"{function}", lambda path=path: read_weights(path)
    short = rewritten(folder / "whole.pth", folder / "short.pth",
                      lambda name, old: old[:-4] if name.endswith("data/0") else old)  # fmt: skip
    yield "a storage that is shorter than it says", lambda: read_weights(short)
    torch.save({"network_weights": {**weights, key: torch.zeros(1).expand(10**4, 10**4)}, "current_epoch": 1},
               folder / "view.pth")  # fmt: skip
    yield "a view larger than its storage", lambda: read_weights(folder / "view.pth")
    big = torch.zeros(2**20)
    torch.save({"network_weights": {str(i): big[: 2**20 - i] for i in range(2000)}, "current_epoch": 1},
               folder / "views.pth")  # fmt: skip
    yield "views that share a storage", lambda: read_weights(folder / "views.pth")
    yield "views of a checkpoint", lambda: read_checkpoint(folder / "views.pth")
    with zipfile.ZipFile(folder / "whole.pth") as whole:
        entries = [entry for entry in whole.infolist() for _ in range(200)]
    with zipfile.ZipFile(folder / "same.pth", "w") as archive:
        archive.filelist = entries
        archive._didModify = True
    data = (folder / "same.pth").read_bytes()
    yield "members at one place", lambda: read_weights(written(folder / "same.pth", b"\0" * 10**5 + data))
    laughs = "checkpoints:\n- &a [x, x]\n" + "".join(f"- &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrst",
                                                     "bcdefghijklmnopqrstu", strict=True))  # fmt: skip
    yield "YAML aliases", lambda: read_zoo(written(folder / "laughs.yaml", laughs.encode()))
    yield "deep YAML", lambda: read_zoo(written(folder / "deep.yaml", b"[" * 50_000))
    arguments = {"n_blocks_per_stage": [8192] * 32, "strides": json.loads("[" * 500 + "]" * 500),
                 "features_per_stage": [8192] * 6, "conv_op": "os.mkdir"}  # fmt: skip
    for key, value in arguments.items():
        model = write_model(folder / key, num_classes=2)
        plans = json.loads((model / "plans.json").read_text())
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"][key] = value
        (model / "plans.json").write_text(json.dumps(plans))
        yield f"{key} {str(value)[:40]}", lambda model=model: read_model(model)


def run_limited(files: Iterator[File], must_fail: bool) -> None:
    """Read files in a process of its own, which may not take more memory, nor time for one of them."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        faults = []
        try:
            signal.signal(signal.SIGPROF, too_long)
            for name, read in files:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    read()
                    said = "was read" if must_fail else ""
                except STUNetError as error:
                    said = "memory" if "MemoryError" in str(error) or "alloc" in str(error) else ""
                except BaseException:
                    said = traceback.format_exc()[-1500:]
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
                if said:
                    faults.append(f"{name}: {said}")
        except BaseException:
            faults.append(traceback.format_exc()[-1500:])
        os.write(writer, "\n\n".join(faults[:10]).encode()[:60_000])
        os._exit(0 if not faults else 1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        faults = pipe.read()
    if os.waitpid(pid, 0)[1]:
        pytest.fail(faults or "the process ended")


def too_long(*_: Any) -> None:
    raise KeyboardInterrupt("too long")


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by what Linux says is used")


@linux
def test_damaged_files(tmp_path: Path) -> None:
    run_limited(fuzzed(tmp_path), must_fail=False)


@linux
def test_crafted_files(tmp_path: Path) -> None:
    run_limited(crafted(tmp_path / "crafted"), must_fail=True)
    assert not (tmp_path / "crafted" / "ran").exists()


def test_no_flipped_bit_becomes_another_weight(tmp_path: Path) -> None:
    content = {"network_weights": {"a": torch.arange(64.0)}, "current_epoch": 3, "note": "text"}
    torch.save(content, tmp_path / "c.pth")
    whole = (tmp_path / "c.pth").read_bytes()
    rng, refused = random.Random(5), 0
    for _ in range(210):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            got = read_checkpoint(written(tmp_path / "c.pth", bytes(data)))
        except CheckpointError:
            refused += 1
            continue
        assert torch.equal(got["network_weights"]["a"], content["network_weights"]["a"])
        assert (got["current_epoch"], got["note"]) == (3, "text")
    assert refused > 70  # the others are in padding and in fields of the zip format that nothing depends on


def test_statistics_that_are_no_numbers(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), None):
        model = write_model(tmp_path / f"m{value}", num_classes=2)
        plans = json.loads((model / "plans.json").read_text())
        plans["foreground_intensity_properties_per_channel"]["0"]["std"] = value
        (model / "plans.json").write_text(json.dumps(plans))
        with pytest.raises(STUNetError, match=f"std is {value}|must be real number"):
            load_model(model)
    for value in (np.nan, np.inf):
        statistics = dict.fromkeys(("mean", "median", "mn", "mx", "percentile_00_5", "percentile_99_5"), 1.0)
        plans = v1_plans(normalization_schemes={0: "CT"}, modalities={0: "CT"},
                         dataset_properties={"intensityproperties": {0: {**statistics, "sd": value}}})  # fmt: skip
        path = write_v1(tmp_path, tiny_weights(), plans)
        with pytest.raises(STUNetError, match="finite numbers"):
            describe_model(open_weights([path]), LABELS)


MODULE = """
from pathlib import Path
from stunet.network import STUNet

Path({marker!r}).touch()

class Network(STUNet):
    pass
"""


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Model folders whose plans and checkpoint name any class; ``foreign.Network`` leaves a marker when imported."""
    code = tmp_path / "code"
    written(code / "foreign.py", MODULE.format(marker=str(tmp_path / "ran")).encode())
    monkeypatch.syspath_prepend(code)
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.delitem(sys.modules, "foreign", raising=False)

    def make(name: str) -> Path:
        model = write_model(tmp_path / "model", num_classes=3)
        plans = json.loads((model / "plans.json").read_text())
        plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name
        (model / "plans.json").write_text(json.dumps(plans))
        path = model / "fold_0" / "checkpoint_final.pth"
        checkpoint = torch.load(path, weights_only=False)
        checkpoint["init_args"]["plans"] = plans
        torch.save(checkpoint, path)
        return model

    return make


def typed(*words: Any) -> int:
    """What a command ends with, run in this process, which saves its imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stunet", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("name", ["torch.hub.load", "foreign.Network"])
def test_commands_do_not_import_what_plans_name(
    hostile: Callable[[str], Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    nnunet_folders: dict[str, Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = hostile(name)
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 16, 16)))
    raw = write_raw(tmp_path / "nnUNet_raw" / "Dataset002_Raw", {"background": 0, "structure_1": 1}, ["a", "b"])
    monkeypatch.chdir(tmp_path)
    for command in (
        ("predict", "-i", "images", "-o", "out", "-m", model, "-device", "cpu"),
        ("predict", "-i", "images", "-o", "out", "-m", model, "-device", "cpu", "--save_probabilities"),
        ("evaluate", "-d", raw, "-m", model, "-o", "scores", "--device", "cpu"),
        ("plan", "-d", "2", "--from", model),
        ("finetune", "-d", "2", "--from", model, "-device", "cpu"),
    ):
        assert typed(*command) == 2
        assert f"--trust {name}" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(CheckpointError, match=f"--trust {name}"):  # as rank does for each candidate
        open_any_weights(model)
    assert not (tmp_path / "ran").exists()


def test_another_process_does_not_import_it_either(hostile: Callable[[str], Path], tmp_path: Path) -> None:
    model = hostile("foreign.Network")
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 16, 16)))
    command = ["-m", "stunet", "predict", "-i", "images", "-o", "out", "-m", str(model), "-device", "cpu"]
    got = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert got.returncode == 2, got.stderr
    assert "Traceback" not in got.stderr
    assert not (tmp_path / "ran").exists()


def test_what_a_user_trusts_is_imported(
    hostile: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hostile("foreign.Network")
    write_image(tmp_path / "images" / "a_0000.nii.gz", smooth_image((16, 16, 16)))
    monkeypatch.chdir(tmp_path)
    assert typed("predict", "-i", "images", "-o", "out", "-m", model, "-device", "cpu", "-npp", "0", "-nps", "0",
                 "--trust", "foreign.Network") == 0  # fmt: skip
    assert (tmp_path / "ran").exists()
    assert (tmp_path / "out" / "a.nii.gz").is_file()
    assert isinstance(open_any_weights(model, ["foreign.Network"]), SourceWeights)
