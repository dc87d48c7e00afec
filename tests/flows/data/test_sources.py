"""What DATASET may be, and downloads against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows.data import sources
from flows.data.sources import Download, fetch, resolve
from flows.errors import DataError, explain_os_error

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/cut":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:1000] if self.path == "/cut" else CONTENT)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRUNKLINE_DATA", raising=False)
    monkeypatch.setenv("TRUNKLINE_HOME", str(tmp_path / "home"))


def test_digits_keep_the_source_of_params_yaml() -> None:
    assert resolve("digits", Path("/clone")) == ("digits", "constraints.txt")


def test_a_folder_becomes_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("my images", tmp_path) == ("folder", str(tmp_path / "my images"))
    with pytest.raises(
        DataError, match="DATASET=nothing is neither digits, nor cifar10, nor an existing folder"
    ):
        resolve("nothing", tmp_path)


def test_cifar10_is_found_beside_the_clone_and_by_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared" / "data" / "cifar10"
    shared.mkdir(parents=True)
    (tmp_path / "clone").mkdir()
    assert resolve("cifar10", tmp_path / "clone") == ("cifar10", str(shared))
    other = tmp_path / "other" / "cifar10"
    other.mkdir(parents=True)
    monkeypatch.setenv("TRUNKLINE_DATA", str(tmp_path / "other"))
    assert resolve("cifar10", tmp_path / "clone") == ("cifar10", str(other))


def test_cifar10_is_fetched_once(tmp_path: Path, address: str) -> None:
    folder = tmp_path / "home" / ".trunkline" / "downloads" / "cifar10"
    download = Download(f"{address}/file", SHA256, len(CONTENT))
    assert resolve("cifar10", tmp_path / "clone", cifar10=download) == ("cifar10", str(folder))
    assert [path.name for path in folder.iterdir()] == ["cifar-10-binary.tar.gz"]
    assert (folder / "cifar-10-binary.tar.gz").read_bytes() == CONTENT
    unreachable = Download("http://127.0.0.1:1/file", SHA256, len(CONTENT))
    assert resolve("cifar10", tmp_path / "clone", cifar10=unreachable) == ("cifar10", str(folder))


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/missing", {}, "the server answered 404"),
        ("/file", {"sha256": "0" * 64}, "another sha256"),
        ("/file", {"size": len(CONTENT) - 1}, "more than"),
        ("/file", {"size": len(CONTENT) + 1}, f"sent {len(CONTENT)} of {len(CONTENT) + 1} bytes"),
        ("/cut", {}, "sent 1000 of|IncompleteRead|cannot fetch"),
    ],
)
def test_a_failed_download_leaves_nothing(
    tmp_path: Path, address: str, path: str, change: dict[str, object], message: str
) -> None:
    values = {"url": address + path, "sha256": SHA256, "size": len(CONTENT)} | change
    target = tmp_path / "files" / "a.tar.gz"
    with pytest.raises(DataError, match=message) as caught:
        fetch(Download(**values), target)  # type: ignore[arg-type]
    assert str(target) in str(caught.value)
    assert address + path in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_an_unreachable_address_says_how_to_go_on(tmp_path: Path) -> None:
    url = "http://127.0.0.1:1/file"
    with pytest.raises(DataError, match="Connection refused") as caught:
        fetch(Download(url, SHA256, len(CONTENT)), tmp_path / "a.tar.gz")
    assert url in str(caught.value)
    assert f"save it as {tmp_path / 'a.tar.gz'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_file_put_there_by_hand_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"a\.tar\.gz is not the file published at http://x/"):
        fetch(Download("http://x/", SHA256, len(CONTENT)), tmp_path / "a.tar.gz")


def test_a_full_disk_is_not_blamed_on_the_network(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(Download(f"{address}/file", SHA256, len(CONTENT)), tmp_path / "a.tar.gz")
    assert "disk is full" in str(explain_os_error(caught.value))


def test_the_official_file_is_pinned() -> None:
    assert sources.CIFAR10.url.startswith("https://www.cs.toronto.edu/")
    assert sources.CIFAR10.sha256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
