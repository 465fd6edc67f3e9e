"""Published weights: registries, and files fetched from a local server, checked and kept."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from file_server import FileServer, Served, serve
from weights import tiny_weights, v1_plans, write_v1

from stunet.errors import CheckpointError, DownloadError, UsageError
from stunet.files import file_sha256
from stunet.inference.model import _is_made_of
from stunet.labels.labels import load_vocabulary
from stunet.network import SIZES, STUNetSize
from stunet.weights.published import (
    cached_weights,
    clean_url,
    entry_folder,
    fetch,
    find_entry,
    list_models,
    load_registry,
    verify,
    verify_file,
)

FILES = ["x.model.pkl", "plans.pkl", "x.model"]  # in the order of fetching


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny STU-Net with 3 outputs as it would be published, and others that are not it."""
    folder = tmp_path_factory.mktemp("published")
    write_v1(folder, tiny_weights(), v1_plans())
    (folder / "plans.pkl").write_bytes(pickle.dumps(v1_plans()))
    write_v1(folder, tiny_weights(num_classes=4), None, name="outputs")
    write_v1(folder, tiny_weights(input_channels=2), None, name="channels")
    write_v1(folder, tiny_weights(size=STUNetSize("d111111w3", (1,) * 6, 3)), None, name="size")
    (folder / "page.model").write_text("<!DOCTYPE html><html><body>Google Drive - virus scan warning</body></html>")
    (folder / "cut.model").write_bytes((folder / "x.model").read_bytes()[:-5000])
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    return folder


@pytest.fixture
def server(published: Path) -> Iterator[FileServer]:
    with serve() as running:
        running.files |= {f"/{p.name}": Served(p.read_bytes()) for p in published.iterdir()}
        yield running


@pytest.fixture
def register(
    server: FileServer, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Write a registry with one entry ``tiny``, whose files are changed by name."""
    monkeypatch.setenv("STUNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STUNET_REGISTRY", str(tmp_path / "registry.json"))

    def write(changes: dict[str, dict[str, Any]] | None = None, **entry: Any) -> None:
        files = [{"file": f, "url": f"{server.url}/{f}", **(changes or {}).get(f, {})} for f in FILES]
        content = {"name": "tiny", "size": "d111111w2", "outputs": 3, "input_channels": 1, "files": files, **entry}
        (tmp_path / "registry.json").write_text(json.dumps({"version": 1, "weights": [content]}))

    write()
    return write


def get(**options: Any) -> Path:
    return fetch(find_entry("tiny"), **{"attempts": 1, **options})


def left_in_cache() -> list[str]:
    """Everything in the folder of ``tiny`` but the lock."""
    return sorted(str(p.relative_to(entry_folder("tiny"))) for p in entry_folder("tiny").rglob("*") if p.is_file()
                  and p.name != "lock")  # fmt: skip


COMPLETE = sorted([*FILES, *(f"{f}.record.json" for f in FILES)])


def test_fetch_and_everything_after(register: Callable[..., None], published: Path, server: FileServer) -> None:
    with pytest.raises(CheckpointError, match="stunet weights fetch tiny"):
        cached_weights("tiny")
    path = get()
    assert path == cached_weights("tiny") == entry_folder("tiny") / "x.model"
    assert left_in_cache() == COMPLETE
    for name in FILES:
        assert (path.parent / name).read_bytes() == (published / name).read_bytes()
        record = json.loads((path.parent / f"{name}.record.json").read_text())
        assert record["url"] == f"{server.url}/{name}"
        assert record["sha256"] == file_sha256(published / name)
        assert record["bytes"] == (published / name).stat().st_size
        assert record["date"].endswith("+00:00")
    server.files.clear()  # offline from here on
    n_requests = len(server.requests)
    assert get() == path
    assert len(server.requests) == n_requests
    assert [v.path.name for v in verify(find_entry("tiny"))] == FILES
    assert all(v.compared_with.startswith("noted 20") for v in verify(find_entry("tiny")))


def test_the_pickles_come_first(register: Callable[..., None], server: FileServer) -> None:
    get()
    assert [path for _, path, _, _ in server.requests] == [f"/{f}" for f in FILES]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize("how", [{"cuts": [100_000, 200_000]}, {"statuses": [500, 429]}])
def test_what_may_pass_is_tried_again(
    register: Callable[..., None], server: FileServer, published: Path, pauses: list[float], how: dict[str, Any]
) -> None:
    for name, value in how.items():
        setattr(server.files["/x.model"], name, value)
    said: list[str] = []
    assert get(attempts=3, say=said.append).read_bytes() == (published / "x.model").read_bytes()
    assert len(server.ranges("/x.model")) == 3
    assert [pause for pause in pauses if pause >= 0.5] == [0.5, 1.0]
    assert len([text for text in said if "again in" in text]) == 2
    assert left_in_cache() == COMPLETE


def test_a_busy_server_says_when_to_come_again(
    register: Callable[..., None], server: FileServer, pauses: list[float]
) -> None:
    served = server.files["/x.model"]
    served.statuses, served.headers = [503, 429], {"Retry-After": "7"}
    get(attempts=3)
    assert [pause for pause in pauses if pause >= 0.5] == [7.0, 7.0]
    served.statuses, served.headers = [429], {"Retry-After": "7200"}
    with pytest.raises(DownloadError, match="in 7200 s"):
        get(attempts=3, force=True)
    assert max(pauses) == 7.0


def test_a_disk_without_room(
    register: Callable[..., None], server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once the server states a length, and before it is asked where the registry does."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(DownloadError, match=r"GB free.* make room"):
        get()
    assert len(server.requests) == 1
    register({FILES[0]: {"bytes": 10**12}})
    with pytest.raises(DownloadError, match=r"1000\.00 GB are missing"):
        get()
    assert len(server.requests) == 1
    assert left_in_cache() == []


def test_where_the_hub_fails_the_address_serves(
    register: Callable[..., None], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repository: str, *_: Any) -> Any:
        raise DownloadError(f"{repository} does not give it")

    monkeypatch.setattr("stunet.weights.published._from_hub", fail)
    register({"x.model": {"hub": "me/nets"}})
    said: list[str] = []
    assert get(say=said.append).read_bytes() == (published / "x.model").read_bytes()
    assert "me/nets does not give it" in said
    with pytest.raises(DownloadError, match="you/nets does not give it"):  # what was asked for is not replaced
        get(hub="you/nets", force=True)


def test_models_are_known_by_what_they_are_made_of(register: Callable[..., None], tmp_path: Path) -> None:
    """Whatever the time stamps of copies say."""
    path, card = get(), tmp_path / "model_card.json"
    card.write_text(json.dumps({"sources": [{"sha256": file_sha256(path)}]}))
    copied = Path(shutil.copytree(path.parent, tmp_path / "copied")) / "x.model"
    for weights in (path, copied, tmp_path / "gone"):
        assert _is_made_of(card, weights, None)
        assert not _is_made_of(card, weights, "ab" * 32)
    copied.write_bytes(copied.read_bytes()[::-1])
    os.utime(copied, (time.time() + 60,) * 2)
    assert not _is_made_of(card, copied, None)
    assert not _is_made_of(tmp_path / "none.json", path, None)


def test_an_interrupted_fetch_leaves_nothing_half(register: Callable[..., None], server: FileServer) -> None:
    server.files["/x.model"].cuts = [100_000]
    with pytest.raises(DownloadError, match=r"x\.model could not be downloaded in 1 attempts"):
        get()
    assert [name for name in left_in_cache() if name.endswith("x.model")] == []


@pytest.mark.parametrize(("status", "expected"), [(404, "404"), (401, "hf auth login"), (403, "its link has run out")])
def test_errors_that_last_are_not_tried_again(
    register: Callable[..., None], server: FileServer, status: int, expected: str
) -> None:
    server.files["/x.model"].statuses = [status]
    with pytest.raises(DownloadError, match=expected):
        get(attempts=3)
    assert len(server.ranges("/x.model")) == 1


def test_redirects(register: Callable[..., None], server: FileServer, published: Path) -> None:
    """Hugging Face redirects to another server, and states the checksum in that very answer."""
    stated = {"X-Linked-ETag": f'"{file_sha256(published / "x.model")}"'}
    server.files["/moved"] = server.files["/x.model"]
    server.files["/x.model"] = Served(redirect=f"{server.url}/moved", headers=stated)
    assert get().read_bytes() == (published / "x.model").read_bytes()
    record = json.loads((entry_folder("tiny") / "x.model.record.json").read_text())
    assert record["url"] == f"{server.url}/x.model"
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "/x.model"):
        server.files["/x.model"].redirect = target
        with pytest.raises(DownloadError, match=r"x\.model"):
            get(force=True)


def test_secrets_are_sent_but_neither_shown_nor_noted(register: Callable[..., None], server: FileServer) -> None:
    server.files["/x.model"].authorization = "Basic bWU6czNjcmV0"  # me:s3cret
    said: list[str] = []
    secret = server.url.replace("http://", "http://me:s3cret@") + "/x.model?token=t0ken#frag"
    noted = get(urls=[secret], say=said.append).with_name("x.model.record.json").read_text()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        with pytest.raises(DownloadError, match="Connection refused") as caught:
            get(urls=[f"http://me:s3cret@127.0.0.1:{taken.getsockname()[1]}/a?token=t0ken"], force=True)
    for text in (noted, str(caught.value), *said):
        assert not {"s3cret", "t0ken"} & set(text.replace("@", " ").replace("=", " ").split())
        assert "s3cret" not in text
        assert "t0ken" not in text


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/a", "/etc/passwd", "http:///a", "http://h:port/a", "", "http://[::1/a"]
)
def test_other_schemes_are_refused(register: Callable[..., None], url: str) -> None:
    with pytest.raises(DownloadError, match="http://"):
        get(urls=[url])


def test_addresses_as_they_are_shown() -> None:
    assert clean_url("https://u:p@host.org:8443/a/b.model?key=1#x") == "https://host.org:8443/a/b.model"
    assert clean_url("http://[::1]:80/a") == "http://[::1]:80/a"


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        ("page.model", ("a web page",)),
        ("outputs.model", ("1 input channels and 4 outputs", "1 input channels and 3 outputs")),
        ("channels.model", ("2 input channels", "1 input channels")),
        ("size.model", ("d111111w3", "d111111w2")),
        ("cut.model", ("truncated",)),
        ("x.model.pkl", ("truncated",)),
    ],
)
def test_a_wrong_file_is_refused(
    register: Callable[..., None], server: FileServer, served: str, expected: tuple[str, ...]
) -> None:
    register({"x.model": {"url": f"{server.url}/{served}"}})
    with pytest.raises(CheckpointError, match="is not the published") as caught:
        get()
    for words in (*expected, f"{server.url}/{served}"):
        assert words in str(caught.value)
    assert [name for name in left_in_cache() if "x.model" in name and ".pkl" not in name] == []


def test_a_length_that_is_too_short(register: Callable[..., None], server: FileServer) -> None:
    server.files["/x.model"].length_lie = -100
    with pytest.raises(CheckpointError, match="truncated"):
        get()
    assert "x.model" not in left_in_cache()


def test_a_length_that_is_too_long(register: Callable[..., None], server: FileServer) -> None:
    server.files["/x.model"].length_lie = 100
    with pytest.raises(DownloadError, match="could not be downloaded"):
        get()
    assert "x.model" not in left_in_cache()


def test_a_wrong_checksum_or_length(register: Callable[..., None], published: Path) -> None:
    register({"x.model": {"sha256": "ab" * 32}})
    with pytest.raises(CheckpointError, match="ab" * 32) as caught:
        get()
    assert file_sha256(published / "x.model") in str(caught.value)
    register({"x.model": {"bytes": 12}})
    with pytest.raises(CheckpointError, match="instead of 12 bytes"):
        get()
    assert [name for name in left_in_cache() if "x.model" in name and ".pkl" not in name] == []
    register(
        {"x.model": {"sha256": file_sha256(published / "x.model"), "bytes": (published / "x.model").stat().st_size}}
    )
    get()
    compared = {v.path.name: v.compared_with for v in verify(find_entry("tiny"))}
    assert compared["x.model"] == "the registry"


def test_the_checksum_that_the_server_states(register: Callable[..., None], server: FileServer) -> None:
    server.files["/x.model"].headers["X-Linked-ETag"] = f'"{"cd" * 32}"'
    with pytest.raises(CheckpointError, match=r"cdcdcd.* \(Hugging Face\)"):
        get()


def test_a_pickle_that_asks_for_code_is_refused_before_the_weights_are_loaded(
    register: Callable[..., None], server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    register({"plans.pkl": {"url": f"{server.url}/evil.pkl"}})
    with pytest.raises(CheckpointError, match=r"os\.system|posix\.system"):
        get()
    assert not (tmp_path / "pwned").exists()
    assert server.ranges("/x.model") == []


def test_by_hand(register: Callable[..., None], published: Path) -> None:
    place = {"page": "https://drive.example.org/folder?id=7", "item": "Task1/fold_all/x.model"}
    register({"x.model": {"url": None, "by_hand": [place]}})
    with pytest.raises(DownloadError) as caught:
        get()
    folder = entry_folder("tiny")
    for words in (place["page"], place["item"], str(folder / "x.model"), "stunet weights verify tiny", "--url"):
        assert words in str(caught.value)
    assert (folder / "plans.pkl").is_file()  # what could be fetched is there
    (folder / "x.model").write_bytes((published / "x.model").read_bytes())
    assert [v.compared_with for v in verify(find_entry("tiny"))][-1] == ""
    record = json.loads((folder / "x.model.record.json").read_text())
    assert record["url"] is None
    assert record["sha256"] == file_sha256(published / "x.model")
    assert verify(find_entry("tiny"))[-1].compared_with.startswith("noted")
    assert cached_weights("tiny") == get() == folder / "x.model"


def test_a_wrong_file_put_there_by_hand(register: Callable[..., None], published: Path) -> None:
    get()
    path = cached_weights("tiny")
    for record in path.parent.glob("*.record.json"):
        record.unlink()
    path.write_bytes((published / "size.model").read_bytes())
    with pytest.raises(CheckpointError, match="d111111w3"):
        verify(find_entry("tiny"))
    assert not path.with_name("x.model.record.json").exists()
    with pytest.raises(CheckpointError, match="--force"):
        get()
    assert get(force=True).read_bytes() == (published / "x.model").read_bytes()
    verify(find_entry("tiny"))


def test_a_file_that_changes_later(register: Callable[..., None]) -> None:
    """One bit in the middle of a tensor: still a fine STU-Net, but not what was fetched."""
    path = get()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert cached_weights("tiny") == path  # it looks at lengths alone
    with pytest.raises(CheckpointError, match="noted"):
        verify(find_entry("tiny"))
    path.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="--force"):
        cached_weights("tiny")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no x\.model in"):
        verify(find_entry("tiny"))


def test_a_failed_forced_fetch_keeps_the_old_file(register: Callable[..., None], published: Path) -> None:
    path = get()
    with pytest.raises(DownloadError):
        get(force=True, urls=["http://127.0.0.1:1/x.model"])
    assert path.read_bytes() == (published / "x.model").read_bytes()
    verify(find_entry("tiny"))


def test_other_addresses_and_another_folder(register: Callable[..., None], server: FileServer, tmp_path: Path) -> None:
    register({f: {"url": None} for f in FILES})
    server.files["/mirror"] = server.files["/x.model"]
    urls = [f"{server.url}/{f}?key=s3cret" for f in ("mirror", "plans.pkl", "x.model.pkl")]
    path = get(urls=urls, folder=tmp_path / "mine")
    assert path == tmp_path / "mine" / "x.model"
    assert json.loads(path.with_name("x.model.record.json").read_text())["url"] == f"{server.url}/mirror"
    verify(find_entry("tiny"), tmp_path / "mine")
    with pytest.raises(UsageError, match="two addresses"):
        get(urls=[urls[0], f"{server.url}/x.model"])
    with pytest.raises(DownloadError, match="http://"):
        get(urls=["file:///etc/passwd"])


def test_a_single_file_anywhere(register: Callable[..., None], published: Path) -> None:
    assert verify_file(published / "x.model", find_entry("tiny")).sha256 == file_sha256(published / "x.model")
    with pytest.raises(CheckpointError, match="4 outputs"):
        verify_file(published / "outputs.model", find_entry("tiny"))
    with pytest.raises(CheckpointError, match="missing file"):
        verify_file(published / "nothing.model", find_entry("tiny"))
    assert not list(published.glob("*.record.json"))


def test_two_fetches_at_once(register: Callable[..., None], server: FileServer, published: Path) -> None:
    """The second waits for the first and downloads nothing."""
    gate = threading.Event()
    server.files["/x.model"].gate = gate
    said: list[str] = []
    failures: list[BaseException] = []

    def note(text: str) -> None:
        said.append(text)
        if "waiting" in text:
            gate.set()

    def run(say: Callable[[str], None]) -> None:
        try:
            get(say=say)
        except BaseException as error:
            failures.append(error)
            gate.set()

    first = threading.Thread(target=run, args=(lambda text: None,))
    first.start()
    assert server.files["/x.model"].half_sent.wait(60)
    second = threading.Thread(target=run, args=(note,))
    second.start()
    for thread in (first, second):
        thread.join(60)
    assert failures == []
    assert any("waiting" in text for text in said)
    assert len(server.ranges("/x.model")) == 1
    assert cached_weights("tiny").read_bytes() == (published / "x.model").read_bytes()
    assert left_in_cache() == COMPLETE


def test_a_folder_that_cannot_be_made(register: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="--to"):
        get(folder=tmp_path / "file" / "folder")


def test_safetensors(register: Callable[..., None], server: FileServer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous() for key, tensor in tiny_weights().items()}, tmp_path / "t.safetensors")
    server.files["/t.safetensors"] = Served((tmp_path / "t.safetensors").read_bytes())
    register(files=[{"file": "t.safetensors", "url": f"{server.url}/t.safetensors"}])
    assert torch.equal(*[next(iter(p.values())) for p in (_load(get()), _load(tmp_path / "t.safetensors"))])


def _load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_the_cache_is_the_platforms_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STUNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = entry_folder("small_ep4k")
    assert folder.parts[-2:] == ("weights", "small_ep4k")
    assert "stunet" in str(folder)
    assert folder.is_relative_to(tmp_path)
    assert "small_ep4k" in load_registry()


def write_registry(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": 1, "weights": list(entries)}))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "size": "small", "outputs": 3, "files": [{"file": "a.model"}], **changes}


def test_the_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STUNET_REGISTRY", raising=False)
    known = load_registry()
    assert list_models() == list(known) == [*(f"{s}_ep4k" for s in SIZES), *(f"abdomenatlas_{s}_ep2k" for s in SIZES)]
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
    with pytest.raises(UsageError, match=r"giant[\s\S]*stunet list[\s\S]*small_ep4k"):
        find_entry("giant")


SHA = "ab" * 32


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (entry(name="../evil"), "name"),
        (entry(name="-o"), "name"),
        (entry(outputs=0), "outputs"),
        (entry(outputs=True), "outputs"),
        (entry(size=None), "size"),
        (entry(surprise=1), "unknown field `surprise`"),
        (entry(labels="no_such"), "totalsegmentator_104"),
        (entry(labels="abdomenatlas_9"), "3 outputs"),
        (entry(page="javascript:alert(1)"), "page"),
        (entry(files=[]), "files"),
        (entry(files=["a.model"]), "weights[0].files[0]"),
        (entry(files=[{"file": "../a.model"}]), "weights[0].files[0].file"),
        (entry(files=[{"file": "a/b.model"}]), "weights[0].files[0].file"),
        (entry(files=[{"file": ".a.model"}]), "weights[0].files[0].file"),
        (entry(files=[{"file": "a.sh"}]), "weights[0].files[0].file"),
        (entry(files=[{"file": "a.record.json"}]), "weights[0].files[0].file"),
        (entry(files=[{"file": "a.pkl"}]), "one file with weights"),
        (entry(files=[{"file": "a.model"}, {"file": "b.pth"}]), "one file with weights"),
        (entry(files=[{"file": "a.model"}, {"file": "p.pkl"}, {"file": "P.pkl"}]), "one file with weights"),
        (entry(files=[{"file": "a.model", "url": "file:///etc/passwd"}]), "url"),
        (entry(files=[{"file": "a.model", "url": 3}]), "url"),
        (entry(files=[{"file": "a.model", "hub": "nobody"}]), "weights[0].files[0].hub"),
        (entry(files=[{"file": "a.model", "hub": "../../x"}]), "weights[0].files[0].hub"),
        (entry(files=[{"file": "a.model", "sha256": SHA.upper()}]), "{64}"),
        (entry(files=[{"file": "a.model", "bytes": -1}]), "bytes"),
        (entry(files=[{"file": "a.model", "by_hand": [{"page": "http://x"}]}]), "item"),
        ([], "weights[0]"),
    ],
)
def test_a_malformed_registry(broken: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUNET_REGISTRY", str(write_registry(tmp_path / "r.json", broken)))
    with pytest.raises(UsageError, match="a registry of weights that cannot be used") as caught:
        load_registry()
    assert expected in str(caught.value)
    assert "r.json" in str(caught.value)


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


@pytest.mark.parametrize("url", ["https://me:cr#et@host/a", "https://me:cr/et@host/a", "https://me:cret@host/a"])
def test_no_password_of_an_address_is_shown(url: str) -> None:
    assert "me:cr" not in clean_url(url)
