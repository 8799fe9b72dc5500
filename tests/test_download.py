"""scripts/download.py against a server on this machine that can be told to misbehave."""

import _thread
import hashlib
import importlib.util
import io
import os
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "download.py"


def make_zip(seed: int) -> bytes:
    """A zip of some 300 kB, so that it takes several reads; the same bytes at every call."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        numbers = zipfile.ZipInfo("numbers.bin")  # by itself it is dated 1980, a name alone would be dated now
        archive.writestr(numbers, b"".join(hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(10_000)))
    return buffer.getvalue()


FILES = {"first.zip": make_zip(1), "folder/second.zip": make_zip(2)}
FIRST, SECOND = FILES.values()


class Server(ThreadingHTTPServer):
    """Serves FILES below /data/, with ranges, unless told otherwise."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/data"
        self.files = dict(FILES)
        self.asked: list[tuple[str, str | None]] = []  # (path, Range header) of every request
        self.statuses: list[int] = []  # answered, one each, before anything is served
        self.breaks: list[int] = []  # how many bytes to send, one each, before the connection is cut
        self.ranges = True
        self.halfway = None  # called when half of a file is sent

    def handle_error(self, request, address):
        pass  # a client that goes away is what some tests are about


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, asked = self.path.removeprefix("/data/"), self.headers.get("Range")
        self.server.asked.append((path, asked))
        body = self.server.files.get(path)
        if body is None or self.server.statuses:
            return self.send_error(self.server.statuses.pop(0) if self.server.statuses else 404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start and start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        body = body[start:]
        if self.server.breaks:
            body = body[: self.server.breaks.pop(0)]
        self.wfile.write(body[: len(body) // 2])
        if self.server.halfway:
            self.server.halfway()
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def load_script():
    spec = importlib.util.spec_from_file_location("download_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch, server):
    """The script as a module, with one data set, `made`, that lies on the server, and no waiting between tries."""
    module = load_script()
    files = [module.File(path, f"sha256:{hashlib.sha256(body).hexdigest()}") for path, body in FILES.items()]
    monkeypatch.setattr(module, "DATASETS", {"made": module.DataSet("two made-up zips", lambda: (server.url, files))})
    monkeypatch.setattr(module, "WAITS", (0, 0, 0))
    return module


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "made"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(script, *arguments, says: str) -> None:
    """The script ends with one line that has these words; SystemExit with a text is exit code 1."""
    with pytest.raises(SystemExit) as end:
        script.main([str(argument) for argument in arguments])
    message = end.value.code
    assert isinstance(message, str)
    assert "\n" not in message
    assert all(word in message for word in says.split()), message


def test_fresh_download(script, server, folder, tmp_path, capsys):
    script.main(["made", "--to", str(tmp_path)])
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}
    assert server.asked == [("first.zip", None), ("folder/second.zip", None)]
    assert capsys.readouterr().out.count("checksum right") == 2


def test_files_that_are_there_are_not_fetched_again(script, server, folder, tmp_path, capsys):
    script.main(["made", "--to", str(tmp_path)])
    server.asked.clear()
    script.main(["made", "--to", str(tmp_path), "--force"])
    assert server.asked == []
    assert capsys.readouterr().out.count("there, checksum right") == 2


def test_a_repacked_zip_is_kept_unless_forced(script, server, folder, tmp_path, capsys):
    folder.mkdir()
    (folder / "first.zip").write_bytes(make_zip(3))
    script.main(["made", "--to", str(tmp_path)])
    assert contents(folder) == {"first.zip": make_zip(3), "second.zip": SECOND}
    assert "first.zip: kept" in capsys.readouterr().out
    script.main(["made", "--to", str(tmp_path), "--force"])
    assert contents(folder)["first.zip"] == FIRST


def test_a_damaged_file_is_fetched_again(script, server, folder, tmp_path):
    folder.mkdir()
    (folder / "first.zip").write_bytes(FIRST[:1000] + b"damage" + FIRST[1006:])  # opens, but a member's CRC is wrong
    (folder / "second.zip").write_bytes(SECOND[:1000])
    script.main(["made", "--to", str(tmp_path)])
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}


def test_resume_asks_for_the_rest_only(script, server, folder, tmp_path):
    folder.mkdir()
    (folder / "first.zip.part").write_bytes(FIRST[:100_000])
    script.main(["made", "--to", str(tmp_path)])
    assert server.asked[0] == ("first.zip", "bytes=100000-")
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}


def test_resume_after_the_last_byte(script, server, folder, tmp_path):
    folder.mkdir()
    (folder / "first.zip.part").write_bytes(FIRST)
    script.main(["made", "--to", str(tmp_path)])
    assert contents(folder)["first.zip"] == FIRST


def test_a_server_that_ignores_ranges_sends_it_all(script, server, folder, tmp_path):
    folder.mkdir()
    (folder / "first.zip.part").write_bytes(b"x" * 100_000)
    server.ranges = False
    script.main(["made", "--to", str(tmp_path)])
    assert server.asked[0] == ("first.zip", "bytes=100000-")
    assert contents(folder)["first.zip"] == FIRST


def test_broken_connections_are_taken_up_where_they_broke(script, server, folder, tmp_path):
    server.breaks = [70_000, 80_000]
    script.main(["made", "--to", str(tmp_path)])
    assert server.asked[:3] == [("first.zip", None), ("first.zip", "bytes=70000-"), ("first.zip", "bytes=150000-")]
    assert contents(folder)["first.zip"] == FIRST


def test_a_connection_that_breaks_every_time(script, server, folder, tmp_path):
    server.breaks = [10_000] * 4
    fails(script, "made", "--to", tmp_path, says="first.zip 40,000 of run again to resume")
    assert contents(folder) == {"first.zip.part": FIRST[:40_000]}
    script.main(["made", "--to", str(tmp_path)])
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(script, server, folder, tmp_path):
    server.statuses = [503, 429]
    del server.files["folder/second.zip"]
    fails(script, "made", "--to", tmp_path, says="second.zip 404 --url")
    assert [path for path, _ in server.asked] == ["first.zip"] * 3 + ["folder/second.zip"]
    assert contents(folder) == {"first.zip": FIRST}


def test_no_network(script, server, folder, tmp_path):
    server.shutdown()
    server.server_close()
    fails(script, "made", "--to", tmp_path, says="first.zip check the network")
    assert contents(folder) == {}


@pytest.mark.parametrize("start", [0, 100_000])
def test_wrong_bytes_leave_nothing_behind(script, server, folder, tmp_path, start):
    folder.mkdir()
    if start:
        (folder / "first.zip.part").write_bytes(FIRST[:start])
    server.files["first.zip"] = make_zip(3)
    fails(script, "made", "--to", tmp_path, says="first.zip wrong checksum deleted")
    assert contents(folder) == {}


def test_wrong_bytes_do_not_touch_the_file_that_is_there(script, server, folder, tmp_path):
    folder.mkdir()
    (folder / "first.zip").write_bytes(make_zip(3))
    server.files["first.zip"] = make_zip(4)
    fails(script, "made", "--to", tmp_path, "--force", says="first.zip wrong checksum")
    assert contents(folder) == {"first.zip": make_zip(3)}


def test_an_interrupted_download_keeps_its_part(script, server, folder, tmp_path, capsys):
    def interrupt():
        part, deadline = folder / "first.zip.part", time.monotonic() + 10
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.005)
        _thread.interrupt_main()  # as Ctrl-C does

    server.halfway = interrupt
    with pytest.raises(SystemExit) as end:
        script.main(["made", "--to", str(tmp_path)])
    assert end.value.code == 130
    assert "resumes" in capsys.readouterr().err
    part = (folder / "first.zip.part").read_bytes()
    assert contents(folder) == {"first.zip.part": FIRST[: len(part)]}
    assert part
    server.halfway = None
    script.main(["made", "--to", str(tmp_path)])
    assert server.asked[1] == ("first.zip", f"bytes={len(part)}-")
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}


def test_the_name_appears_only_when_all_is_there(script, server, folder, tmp_path):
    seen = []
    server.halfway = lambda: seen.append((folder / "first.zip").exists())
    script.main(["made", "--to", str(tmp_path)])
    assert seen[0] is False
    assert contents(folder)["first.zip"] == FIRST


def test_a_folder_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").write_text("")
    fails(script, "made", "--to", tmp_path / "file", says="first.zip --to")


def test_mirror_and_default_folder(script, server, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SIAMESE_DATA_DIR", str(tmp_path))
    files = script.DATASETS["made"].files()[1]
    monkeypatch.setitem(script.DATASETS, "made", script.DataSet("", lambda: ("http://127.0.0.1:1", files)))
    script.main(["made", "--url", f"{server.url}/"])
    assert contents(folder) == {"first.zip": FIRST, "second.zip": SECOND}


def test_list_and_usage(script, capsys):
    script.main(["--list"])
    assert capsys.readouterr().out == "made: two made-up zips\n"
    for arguments, words in [([], "name a data set: made"), (["maed"], "made"), (["made", "--url", "mirror"], "http://")]:
        with pytest.raises(SystemExit) as end:
            script.main(arguments)
        assert end.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("clinc150", 1), ("abt_buy", 3)])
def test_the_tables_of_texts(name, count):
    module = load_script()
    prefix, files = module.DATASETS[name].files()
    assert prefix.startswith("https://")
    assert len(files) == count
    assert {len(file.checksum) for file in files} == {len("sha256:") + 64}
    folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data")) / name
    if not folder.is_dir():
        pytest.skip(f"no {name} below SIAMESE_DATA_DIR to check the checksums on")
    for file in files:
        assert module.has_checksum(folder / Path(file.path).name, file.checksum), file.path


def test_omniglot_table():
    module = load_script()
    prefix, files = module.DATASETS["omniglot"].files()
    checksums = {Path(file.path).name: file.checksum for file in files}
    assert prefix.startswith("https://")
    assert len(files) == len(checksums) == 5
    assert [len(checksum) for checksum in checksums.values()] == [len("md5:") + 32] * 2 + [len("sha256:") + 64] * 3
    folder = Path(os.environ.get("SIAMESE_DATA_DIR", "data")) / "omniglot"
    if not folder.is_dir():
        pytest.skip("no Omniglot below SIAMESE_DATA_DIR to check the checksums on")
    for name in ("images_background_small1.zip", "images_background_small2.zip", "all_runs.zip"):
        assert module.has_checksum(folder / name, checksums[name]), name
