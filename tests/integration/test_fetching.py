"""``stunet weights`` and what takes weights by name, against a local server."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer, Served, serve
from integration.commands import Shell, read_array
from prediction_models import smooth_image, write_image
from weights import tiny_weights, v1_plans, write_v1

from stunet.files import file_sha256
from stunet.labels.labels import load_vocabulary

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Terminal:
    """A terminal with a cache, a registry and a server of its own."""

    root: Path
    server: FileServer
    more: dict[str, Any] = field(default_factory=dict)  # of the registry's entry

    @property
    def folder(self) -> Path:
        return self.root / "cache" / "weights" / "tiny"

    def register(self, **weights_file: Any) -> None:
        files = [{"file": f, "url": f"{self.server.url}/{f}"} for f in ("x.model.pkl", "plans.pkl")]
        files.append({"file": "x.model", "url": f"{self.server.url}/x.model", **weights_file})
        entry = {"name": "tiny", "size": "d111111w2", "outputs": 3, "licence": "CC0-1.0", "files": files, **self.more}
        (self.root / "registry.json").write_text(json.dumps({"version": 1, "weights": [entry]}))

    @property
    def variables(self) -> dict[str, str]:
        places = {"STUNET_CACHE": "cache", "STUNET_REGISTRY": "registry.json", "HF_HOME": "hf"}
        return {variable: str(self.root / name) for variable, name in places.items()}

    def start(self, *args: str, command: str = "stunet", **environment: str) -> subprocess.Popen[str]:
        """Start ``stunet`` in a process of its own."""
        return Shell(self.root).start("exec " + shlex.join([command, *args]), **{**self.variables, **environment})

    def type(self, *args: str, status: int = 0, alone: bool = False, **environment: str) -> str:
        """Run ``stunet`` to its end, in a process of its own where it is ``alone``; all that it has printed."""
        if alone:
            process = self.start(*args, **environment)
            said, _ = process.communicate(timeout=300)
            assert process.returncode == status, said
        else:
            said = Shell(self.root).run(shlex.join(["stunet", *args]), status=status, **self.variables, **environment)
        assert "Traceback" not in said
        assert status != 2 or "error:" in said
        return said


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    published = tmp_path / "published"
    published.mkdir()
    write_v1(published, tiny_weights(), v1_plans())
    (published / "plans.pkl").write_bytes(pickle.dumps(v1_plans()))
    with serve() as server:
        server.files |= {f"/{p.name}": Served(p.read_bytes()) for p in published.iterdir()}
        terminal = Terminal(tmp_path, server)
        terminal.register()
        yield terminal


def published(terminal: Terminal) -> bytes:
    return (terminal.root / "published" / "x.model").read_bytes()


def test_fetch_verify_list_convert(terminal: Terminal) -> None:
    assert "stunet weights fetch tiny" in terminal.type("convert", "tiny", "-o", "model", status=2)
    terminal.server.files["/x.model"].cuts = [300_000]
    said = terminal.type("weights", "fetch", "tiny")
    assert "again in 0.5 s" in said
    assert "CC0-1.0" in said
    assert (terminal.folder / "x.model").read_bytes() == published(terminal)
    assert len(terminal.server.ranges("/x.model")) == 2
    terminal.type("weights", "fetch", "tiny", "--to", "mine")
    assert (terminal.root / "mine" / "x.model").read_bytes() == published(terminal)

    terminal.server.files.clear()  # offline from here on
    assert "there already" in terminal.type("weights", "fetch", "tiny")
    assert terminal.type("weights", "verify").count("fine") == 3
    assert file_sha256(terminal.folder / "x.model") in terminal.type("weights", "verify", "tiny")
    said = terminal.type("weights", "verify", "published/x.model")
    assert "STU-Net d111111w2, 3D, 1 input channels, 3 outputs" in said
    assert re.search(r"^tiny .* fetched", terminal.type("weights", "list"), re.MULTILINE)
    listed = json.loads(terminal.type("weights", "list", "--json"))["weights"]
    assert [entry["state"] for entry in listed if entry["name"] == "tiny"] == ["fetched"]
    assert "small_ep4k" in [entry["name"] for entry in listed]

    (terminal.root / "labels.json").write_text(json.dumps(["background", "a", "b"]))
    terminal.type("convert", "tiny", "-o", "model", "--labels", "labels.json")
    card = json.loads((terminal.root / "model" / "model_card.json").read_text())
    assert card["licence"] == "CC0-1.0"
    assert [source["file"] for source in card["sources"]] == ["x.model", "x.model.pkl", "plans.pkl"]
    plans = json.loads((terminal.root / "model" / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3.0, 0.8, 0.9]  # from the pickle that was fetched


def test_a_file_of_the_same_name_goes_before_the_registry(terminal: Terminal) -> None:
    (terminal.root / "tiny").mkdir()
    assert "checkpoint" in terminal.type("convert", "tiny", "-o", "model", status=2)
    (terminal.root / "registry.json").write_text("{")  # which is not looked at where files are given
    terminal.type("convert", "published/x.model", "-o", "back.model", "--to", "published")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_fetch_that_is_stopped_or_killed_is_done_again(terminal: Terminal, signal_number: int) -> None:
    served = terminal.server.files["/x.model"]
    served.gate = gate = threading.Event()
    # A shell's background jobs ignore Ctrl+C, and the command would inherit that from tests that run in one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = terminal.start("weights", "fetch", "tiny")
    signal.signal(signal.SIGINT, before)
    while not served.half_sent.wait(0.05):
        assert process.poll() is None
    process.send_signal(signal_number)
    said, _ = process.communicate(timeout=300)
    gate.set()
    assert process.returncode == (130 if signal_number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in said
    assert not (terminal.folder / "x.model").exists()
    served.gate = None
    terminal.type("weights", "fetch", "tiny")
    assert (terminal.folder / "x.model").read_bytes() == published(terminal)


def test_what_goes_wrong_is_explained(terminal: Terminal) -> None:
    server = terminal.server
    server.files["/page"] = Served(b"<html>Sign in</html>")
    fetch = ("weights", "fetch", "tiny", "--attempts", "1")
    for url, expected in (
        (f"{server.url}/nothing", "404"),
        (f"{server.url}/page?token=s3cret", "a web page"),
        ("http://me:s3cret@127.0.0.1:1/x.model", "127.0.0.1:1"),
        ("file:///etc/passwd", "file:"),
    ):
        said = terminal.type(*fetch, "--url", url, status=2)
        assert expected in said
        assert "s3cret" not in said
    assert not (terminal.folder / "x.model").exists()
    assert "giant" in terminal.type("weights", "fetch", "giant", status=2)
    assert "x.model" in terminal.type("weights", "verify", "tiny", status=2)
    assert "nowhere" in terminal.type("weights", "verify", "nowhere", status=2)
    terminal.register(sha256="ab" * 32)
    assert "ab" * 32 in terminal.type(*fetch, status=2)
    terminal.register(url=None, by_hand=[{"page": "https://drive.example.org/f", "item": "fold_all/x.model"}])
    said = terminal.type("weights", "fetch", "tiny", status=2)
    for words in ("https://drive.example.org/f", "fold_all/x.model", "stunet weights verify tiny"):
        assert words in said
    (terminal.root / "registry.json").write_text("{")
    assert "registry.json" in terminal.type("weights", "list", status=2)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes to test with")
def test_a_disk_that_fills_up(terminal: Terminal, tmp_path: Path) -> None:
    """The system refuses to write in mid-file; with room made, the same command succeeds."""
    limited = tmp_path / "limited"
    limited.write_text(
        f"#!{sys.executable}\nimport resource; from stunet.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); main()\n"
    )
    limited.chmod(0o700)
    assert "room" in terminal.type("weights", "fetch", "tiny", status=2, alone=True, command=str(limited))
    assert not (terminal.folder / "x.model").exists()
    terminal.type("weights", "fetch", "tiny")
    assert (terminal.folder / "x.model").read_bytes() == published(terminal)


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
def test_a_hugging_face_repository(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """``huggingface_hub`` itself, asking our server instead of Hugging Face's, as it does with HF_ENDPOINT."""
    server = terminal.server
    addresses = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    terminal.register(url=None)
    content = published(terminal)
    elsewhere = server.url.replace("127.0.0.1", "localhost")  # another host, as the real one redirects to
    stated = {
        "X-Repo-Commit": COMMIT,
        "X-Linked-ETag": f'"{file_sha256(terminal.root / "published" / "x.model")}"',
        "X-Linked-Size": str(len(content)),
    }
    token = "Bearer hf_s3cret"
    for revision in ("main", COMMIT):
        server.files[f"/me/nets/resolve/{revision}/x.model"] = Served(
            redirect=f"{elsewhere}/cdn/x", headers=stated, authorization=token
        )
    server.files["/cdn/x"] = Served(content, cuts=[500_000])
    hub = {"HF_TOKEN": "hf_s3cret"}
    said = terminal.type("weights", "fetch", "tiny", "--hf", "me/nets", **hub)
    assert (terminal.folder / "x.model").read_bytes() == content
    assert len(server.ranges("/cdn/x")) == 2
    assert {auth for _, path, _, auth in server.requests if path == "/cdn/x"} == {None}  # the token stays with the hub
    record = (terminal.folder / "x.model.record.json").read_text()
    assert json.loads(record)["url"] == f"{server.url}/me/nets/resolve/{COMMIT}/x.model"
    assert "s3cret" not in record + said

    for name, code in (("me/other", "RepoNotFound"), ("me/private", "GatedRepo")):
        refusal = Served(statuses=[404 if code == "RepoNotFound" else 403] * 9, headers={"X-Error-Code": code})
        server.files[f"/{name}/resolve/main/x.model"] = refusal
    server.files["/cdn/x"].content = content[:-1000] + bytes(1000)
    said = terminal.type("weights", "fetch", "tiny", "--hf", "me/nets", "--force", status=2, **hub)
    assert "Hugging Face" in said
    assert (terminal.folder / "x.model").read_bytes() == content
    for repository in ("me/other", "me/private", "not a repository", "me/nets@no"):
        said = terminal.type("weights", "fetch", "tiny", "--hf", repository, "--force", status=2, **hub)
        assert repository in said


def test_without_the_library_of_hugging_face(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = terminal.type("weights", "fetch", "tiny", "--hf", "me/nets", status=2)
    assert "pip install huggingface_hub" in said


def block_pytorch(terminal: Terminal) -> dict[str, str]:
    """The environment of a machine where importing PyTorch fails."""
    (terminal.root / "blocked").mkdir()
    (terminal.root / "blocked" / "torch.py").write_text("raise ImportError('PyTorch was imported')")
    return {"PYTHONPATH": os.pathsep.join([str(terminal.root / "blocked"), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def named(terminal: Terminal) -> Terminal:
    """Weights whose outputs have names, and an image."""
    publish(terminal, tiny_weights(10))
    terminal.more |= {"outputs": 10, "labels": "abdomenatlas_9", "page": "https://example.org/nets"}
    terminal.register()
    write_image(terminal.root / "ct.nii.gz", smooth_image((12, 40, 44)), (3.0, 0.9, 0.9))
    return terminal


def publish(terminal: Terminal, weights: dict[str, Any]) -> None:
    folder = terminal.root / "published"
    write_v1(folder, weights, v1_plans(10))
    (folder / "plans.pkl").write_bytes(pickle.dumps(v1_plans(10)))
    terminal.server.files |= {f"/{p.name}": Served(p.read_bytes()) for p in folder.iterdir()}


def test_one_line_to_a_result(named: Terminal) -> None:
    def type_here(line: str) -> str:
        return named.type(*line.split())

    said = type_here("predict -i ct.nii.gz -o first -m tiny -npp 0 -nps 0")
    assert "Weights tiny, licence: CC0-1.0 (https://example.org/nets)" in said
    assert f"Downloading {named.server.url}/x.model" in said
    assert "Converting tiny" in said
    assert sorted(path.name for path in (named.root / "cache").iterdir()) == ["models", "weights"]
    manifest = json.loads((named.root / "first/manifest.json").read_text())
    assert manifest["model"]["name"] == "tiny"
    assert manifest["model"]["licence"] == "CC0-1.0"
    assert manifest["model"]["sources"][0]["sha256"] == file_sha256(named.root / "published" / "x.model")
    assert set(manifest["cases"]["ct"]["structures"]) <= set(load_vocabulary("abdomenatlas_9").labels)

    named.server.files.clear()  # from here on it is offline
    said = type_here("predict -i ct.nii.gz -o again.nii.gz -m tiny -npp 0 -nps 0")
    assert "CC0-1.0" in said
    assert "Converting" not in said
    type_here("convert tiny -o model")
    type_here("predict -i ct.nii.gz -o converted -m model -npp 0 -nps 0")
    labels = read_array(named.root / "first/ct.nii.gz")
    assert labels.max() > 0
    for path in ("again.nii.gz", "converted/ct.nii.gz"):
        assert (read_array(named.root / path) == labels).all()

    # Weights that were fetched anew are converted anew; those without a licence say so.
    publish(named, {key: tensor * 1.5 for key, tensor in tiny_weights(10).items()})
    named.more["licence"] = None
    named.register()
    type_here("weights fetch tiny --force")
    said = type_here("predict -i ct.nii.gz -o new -m tiny -npp 0 -nps 0")
    assert "Converting tiny" in said
    assert "licence: not stated; ask those who published them" in said
    model = json.loads((named.root / "new/manifest.json").read_text())["model"]
    assert model["sources"][0]["sha256"] == file_sha256(named.root / "published" / "x.model")
    assert model["licence"] is None


@pytest.mark.slow
def test_two_that_need_the_same_weights(named: Terminal) -> None:
    """One downloads and converts them, and both predict."""
    both = [named.start("predict", "-i", "ct.nii.gz", "-m", "tiny", "-o", out) for out in ("first", "second")]
    said = [process.communicate(timeout=900)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("Predicted ct" in text for text in said)
    assert sorted("Converting tiny" in text for text in said) == [False, True]
    assert named.server.ranges("/x.model") == [None]
    assert (read_array(named.root / "first" / "ct.nii.gz") == read_array(named.root / "second" / "ct.nii.gz")).all()


def test_names_that_are_neither_weights_nor_folders(terminal: Terminal) -> None:
    """Said before PyTorch is imported."""
    write_image(terminal.root / "ct.nii.gz", smooth_image((4, 4, 4)))
    without: Any = {"alone": True, **block_pytorch(terminal)}
    said = terminal.type("predict", "-i", "ct.nii.gz", "-o", "out", "-m", "smal_ep4k", status=2, **without)
    assert "Did you mean small_ep4k" in said
    assert "nothing" in terminal.type("predict", "-i", "nothing", "-o", "out", "-m", "tiny", status=2, **without)
    assert "-m" in terminal.type("predict", "-i", "ct.nii.gz", "-o", "out", status=2, **without)


def test_list_needs_no_pytorch(terminal: Terminal) -> None:
    without: Any = {"alone": True, "COLUMNS": "80", **block_pytorch(terminal)}
    said = terminal.type("list", **without)
    assert max(map(len, said.splitlines())) <= 80
    for name in ("tiny", "small_ep4k", "abdomenatlas_huge_ep2k", "btcv", "totalsegmentator_v2"):
        assert re.search(rf"^ *{name} ", said, re.MULTILINE)  # whole
    assert "CC0-1.0" in said
    content = json.loads(terminal.type("list", "--json", **without))
    assert {"name": "btcv", "structures": 13} in content["label_systems"]
    assert next(m for m in content["models"] if m["name"] == "small_ep4k")["licence"] == "Apache-2.0"
    order = load_vocabulary("totalsegmentator_104").labels
    said = terminal.type("list", "--of", "small_ep4k", **without)
    assert all(f"{i} {name}" in said for i, name in enumerate(order) if i)
    assert max(map(len, said.splitlines())) <= 80
    of_btcv = json.loads(terminal.type("list", "--of", "btcv", "--json", **without))["structures"]
    assert {"labels": [2], "name": "right kidney"} in of_btcv
    (terminal.root / "mine").mkdir()
    labels = {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}
    (terminal.root / "mine" / "dataset.json").write_text(json.dumps({"labels": labels}))
    mine = json.loads(terminal.type("list", "--of", "mine", "--json", **without))["structures"]
    assert mine == [{"labels": [1, 2], "name": "whole"}, {"labels": [2], "name": "part"}]
    assert "Did you mean btcv" in terminal.type("list", "--of", "btvc", status=2, **without)
    assert "tiny" in terminal.type("list", "--of", "tiny", status=2, **without)
    (terminal.root / "mine" / "dataset.json").write_text("[]")
    assert "dataset.json" in terminal.type("list", "--of", "mine", status=2, **without)
