# SPDX-License-Identifier: Apache-2.0
"""LibriSpeech arrives whole, or an error says why and no byte is lost.

python -m pytest tests/test_download.py

A server on 127.0.0.1 stands in for openslr.org. Its archives have LibriSpeech's form and two short
recordings of noise for each speaker; the fixture `server` puts them into the tables of prepare.py.
"""

import errno
import hashlib
import io
import re
import shutil
import socket
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tools import prepare

TRAIN, DEV = "train-tiny", "dev-tiny"
UTTERANCES = {TRAIN: 6, DEV: 2}
TRAIN_URL, DEV_URL = f"/5/{TRAIN}.tar.gz", f"/5/{DEV}.tar.gz"
PARTIAL = f"{TRAIN}.tar.gz.partial"


# ----------------------------------------------------------------------------------- the archives


def flac(seed):
    noise = np.random.default_rng(seed).integers(-3000, 3000, 4800, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, noise, 16000, format="FLAC")
    return file.getvalue()


def split_files(split):
    """Return the files of an archive, name -> contents."""
    files = {"LibriSpeech/README.TXT": b"read me", "LibriSpeech/SPEAKERS.TXT": split.encode()}
    for number in range(UTTERANCES[split]):
        chapter = f"{100 + number // 2}-7"
        folder = f"LibriSpeech/{split}/{chapter.replace('-', '/')}"
        files[f"{folder}/{chapter}-{number:04d}.flac"] = flac(number)
        transcript = f"{folder}/{chapter}.trans.txt"
        line = f"{chapter}-{number:04d} THIS IS NUMBER {number}\n".encode()
        files[transcript] = files.get(transcript, b"") + line
    return files


def pack(files, *members):
    """Make a .tar.gz of files and of members without contents."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
        for member in members:
            tar.addfile(member)
    return packed.getvalue()


@pytest.fixture(scope="module")
def packed():
    return {split: pack(split_files(split)) for split in UTTERANCES}


# ------------------------------------------------------------------------------------- the server


class Handler(BaseHTTPRequestHandler):
    """Answers as the next item of `server.script` says, and plainly when that list is empty."""

    timeout = 5

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else {}
        data = how.get("data", server.files.get(self.path, b""))
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        start, status = (start, 206) if how.get("ranges", True) else (0, 200)
        status = how.get("status", status)
        if self.headers["User-Agent"].startswith("python-"):
            status = 403  # some servers refuse the default names of Python's libraries
        body = data[start:] + how.get("append", b"") if status in (200, 206) else b""
        headers = {"Content-Length": len(body)}
        if body:  # some servers claim a .tar.gz to be a gzip-encoded .tar
            headers["Content-Encoding"] = "gzip"
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = body[: how.get("drop")]
        server.requests.append((self.path, self.headers["Range"], len(body)))
        self.send_response(status)
        for name, value in (headers | how.get("headers", {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if how.get("stall"):
            server.stop.wait(5)

    def log_message(self, *_args):
        pass


class Server(ThreadingHTTPServer):
    """`script` lists the answers to come; `requests` collects (path, Range, bytes sent)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.script, self.requests, self.stop = {}, [], [], threading.Event()

    def publish(self, split, data):
        """Serve an archive and enter it in prepare.py's table."""
        self.files[f"/5/{split}.tar.gz"] = data
        prepare.ARCHIVES[split] = prepare.Archive(5, len(data), hashlib.md5(data).hexdigest(),
                                                  UTTERANCES[split])

    def ranges(self):
        return [requested for _, requested, _ in self.requests]


@pytest.fixture
def server(packed, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "TIMEOUT_S", 60)
    monkeypatch.setattr(prepare, "ARCHIVES", {})
    monkeypatch.setattr(prepare, "DOWNLOADS", {"tiny": (TRAIN, DEV)})
    server = Server()
    for split, data in packed.items():
        server.publish(split, data)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture
def waits(monkeypatch):
    """Collects the seconds that prepare.py would wait."""
    waits = []
    monkeypatch.setattr(prepare.time, "sleep", waits.append)
    return waits


@pytest.fixture
def root(tmp_path):
    return tmp_path / "corpora/root"


@pytest.fixture
def get(server, waits, root, capsys):
    """Runs prepare.py on `root`, by default from the server; returns what it prints to stderr."""

    def get(*argv, status=0):
        argv = argv or ("--mirror", server.url)
        assert prepare.main(["tiny", str(root), *map(str, argv)]) == status
        if status == 0:
            assert_complete(root)
        return capsys.readouterr().err

    return get


def assert_complete(root):
    expected = split_files(TRAIN) | split_files(DEV)
    expected = {name.removeprefix("LibriSpeech/"): data for name, data in expected.items()}
    files = [path for path in root.rglob("*") if not path.is_dir()]
    assert {str(path.relative_to(root)): path.read_bytes() for path in files} == expected


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------------- without failure


def test_a_corpus_arrives_whole_and_no_other_file_stays(get, root, server, packed, capsys):
    get()
    assert names(root) == ["README.TXT", "SPEAKERS.TXT", DEV, TRAIN]
    assert server.requests == [(TRAIN_URL, "bytes=0-", len(packed[TRAIN])),
                               (DEV_URL, "bytes=0-", len(packed[DEV]))]
    assert prepare.main(["check", str(root)]) == 0
    assert f"{TRAIN}: 6 utterances" in capsys.readouterr().out


def test_only_what_is_missing_is_downloaded(get, root, server, packed):
    """A call that finds the whole corpus makes no request and changes no file."""
    get()
    server.requests.clear()
    paths = [root, *root.rglob("*")]
    before = [path.stat().st_mtime_ns for path in paths]
    assert get() == ""
    assert server.requests == []
    assert [path.stat().st_mtime_ns for path in paths] == before
    shutil.rmtree(root / DEV)
    server.files[f"/copy{DEV_URL}"] = packed[DEV]
    get("--mirror", f"{server.url}/copy/")
    assert [request[0] for request in server.requests] == [f"/copy{DEV_URL}"]


def test_a_log_has_whole_lines_and_a_terminal_a_bar(get, root, monkeypatch):
    log = get()
    assert "\r" not in log
    lines = log.splitlines()
    assert all(line.endswith("B/s]") for line in lines)
    done = [line for line in lines if "100%" in line and "<00:00, " in line]
    assert [line.split(":")[0] for line in done] == [
        f"{step} {split}.tar.gz.partial" for split in (TRAIN, DEV)
        for step in ("download", "verify", "unpack")]
    shutil.rmtree(root)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert get().count("\r") >= 12  # six bars at their start and at their end


def test_published_corpora():
    assert prepare.DOWNLOADS["mini-librispeech"] == ("train-clean-5", "dev-clean-2")
    assert prepare.DOWNLOADS["librispeech-100"] == ("train-clean-100", "dev-clean", "test-clean")
    full = [prepare.ARCHIVES[split] for split in prepare.DOWNLOADS["librispeech-960"]]
    # Database.md of espnet/espnet: the three training splits together, then dev-clean, dev-other,
    # test-clean and test-other.
    assert sum(archive.utterances for archive in full) == 281241 + 2703 + 2864 + 2620 + 2939
    # https://www.openslr.org/12 and /31 list these sizes in MB, rounded down.
    assert {split: (a.resource, a.num_bytes // 10**6) for split, a in prepare.ARCHIVES.items()} == {
        "dev-clean": (12, 337), "dev-other": (12, 314), "test-clean": (12, 346),
        "test-other": (12, 328), "train-clean-100": (12, 6387), "train-clean-360": (12, 23049),
        "train-other-500": (12, 30593), "train-clean-5": (31, 332), "dev-clean-2": (31, 126),
    }
    assert all(re.fullmatch("[0-9a-f]{32}", archive.md5) for archive in prepare.ARCHIVES.values())


# --------------------------------------------------------------------------- failures that pass

NO_LENGTH = {"ranges": False, "headers": {"Content-Length": None}}


@pytest.mark.parametrize(("script", "ranges"), [
    ([{"drop": 1000}, {"drop": 500}], ["bytes=0-", "bytes=1000-", "bytes=1500-"]),
    ([{"drop": 1000}, {"drop": 0}], ["bytes=0-", "bytes=1000-", "bytes=1000-"]),
    ([NO_LENGTH | {"drop": 700}] * 2 + [NO_LENGTH | {"append": b"more than the published size"}],
     ["bytes=0-", "bytes=700-", "bytes=700-"]),
    *[([{"status": status}] * 2, ["bytes=0-"] * 3) for status in (503, 429, 408)],
])
def test_a_passing_failure_is_tried_again_from_the_last_byte(get, server, waits, script, ranges):
    server.script = script.copy()
    get()
    assert server.ranges() == [*ranges, "bytes=0-"]  # the last request is for the other split
    assert waits == [2, 4]


def test_a_silent_server_is_given_up_and_asked_again(get, server, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT_S", 2)
    server.script = [{"drop": 1000, "stall": True}]
    assert "timed out.; attempt 1 of 20, next in 2 s" in get()
    assert "bytes=1000-" in server.ranges()


def test_attempts_and_waits_are_bounded(get, waits, monkeypatch):
    monkeypatch.setattr(prepare, "ATTEMPTS", 5)
    monkeypatch.setattr(prepare, "LONGEST_WAIT_S", 7)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # a socket that does not listen refuses connections
        mirror = f"http://127.0.0.1:{unused.getsockname()[1]}"
        error = get("--mirror", mirror, status=1).splitlines()[-1]
    assert waits == [2, 4, 7, 7]
    assert error.startswith(f"tools.prepare: {mirror}{TRAIN_URL}: ")
    assert "Connection refused" in error
    assert error.endswith("; attempt 5 of 5; call again to continue")


def test_another_call_continues_the_partial_file(get, root, server, packed, monkeypatch):
    """openslr.org redirects to a mirror, which gets the same range."""
    monkeypatch.setattr(prepare, "ATTEMPTS", 1)
    size = len(packed[TRAIN])
    server.files["/elsewhere"] = packed[TRAIN]
    server.script = [{"drop": 1000},
                     {"status": 302, "headers": {"Location": f"{server.url}/elsewhere"}}]
    assert f"(1000 bytes read, {size - 1000} more expected); attempt 1 of 1; " in get(status=1)
    assert names(root) == [PARTIAL]
    assert f"download {PARTIAL}: {100 * 1000 / size:3.0f}%|" in get()
    assert server.requests[2] == ("/elsewhere", "bytes=1000-", size - 1000)


# --------------------------------------------------------------------------- failures that last


@pytest.mark.parametrize(("answer", "message"), [
    ({"status": 404}, "404 Client Error: Not Found for url: {url}"),
    ({"headers": {"Content-Range": "bytes 0-99/100"}},
     "{url}: Content-Range is 'bytes 0-99/100', expected 'bytes 1000-{last}/{size}'"),
    ({"ranges": False, "data": b"<html>log in first</html>"},
     "{url}: Content-Length is '25', expected '{size}'"),
])
def test_a_lasting_failure_is_an_error_at_once(
        get, root, server, waits, packed, answer, message):
    root.mkdir(parents=True)
    (root / PARTIAL).write_bytes(packed[TRAIN][:1000])
    server.script = [answer]
    size = len(packed[TRAIN])
    message = message.format(url=server.url + TRAIN_URL, size=size, last=size - 1)
    assert get(status=1) == f"tools.prepare: {message}\n"
    assert (len(server.requests), waits) == (1, [])
    assert (root / PARTIAL).read_bytes() == packed[TRAIN][:1000]


def test_a_mirror_that_is_no_url_is_an_error_at_once(get, waits):
    error = get("--mirror", "openslr.example", status=1)
    assert f"Invalid URL 'openslr.example{TRAIN_URL}'" in error
    assert waits == []


def test_a_full_disk_is_an_error_at_once(server, waits):
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full to write to")
    with pytest.raises(OSError, match="No space left") as failure:
        prepare.download(f"{server.url}{TRAIN_URL}", full, prepare.ARCHIVES[TRAIN].num_bytes)
    assert failure.value.errno == errno.ENOSPC
    assert waits == []


def test_a_file_with_a_wrong_md5_is_removed_and_downloaded_anew(get, root, server, packed):
    wrong = b"wrong" + packed[TRAIN][5:]
    server.script = [{"data": wrong}]
    found, expected = (hashlib.md5(data).hexdigest() for data in (wrong, packed[TRAIN]))
    assert f"{PARTIAL}: MD5 is {found}, expected {expected}" in get(status=1)
    assert names(root) == []
    get()
    assert server.ranges()[1] == "bytes=0-"


# --------------------------------------------------------------------------------------- unpacking


@pytest.mark.parametrize(("name", "kind", "target"), [
    ("../evil", tarfile.REGTYPE, ""),
    (f"LibriSpeech/{TRAIN}/evil", tarfile.SYMTYPE, "{outside}"),
    (f"LibriSpeech/{TRAIN}/evil", tarfile.SYMTYPE, "../../../../outside"),
    (f"LibriSpeech/{TRAIN}/evil", tarfile.LNKTYPE, "{outside}"),
    (f"LibriSpeech/{TRAIN}/evil", tarfile.LNKTYPE, "../../outside"),
    (f"LibriSpeech/{TRAIN}/evil", tarfile.FIFOTYPE, ""),
])
def test_a_malicious_member_is_an_error_and_none_is_written(
        get, root, server, tmp_path, name, kind, target):
    outside = tmp_path / "outside"
    outside.mkdir()
    evil = tarfile.TarInfo(name)
    evil.type, evil.linkname = kind, target.format(outside=outside)
    server.publish(TRAIN, pack(split_files(TRAIN), evil))
    assert f"tools.prepare: {root / PARTIAL}: {name!r} " in get(status=1)
    assert names(root) == [PARTIAL]
    assert names(tmp_path) == ["corpora", "outside"]
    assert names(tmp_path / "corpora") == ["root"]
    assert names(outside) == []


def test_a_python_without_the_data_filter_is_an_error_before_any_request(
        get, root, server, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter")
    error = get(status=1)
    assert error.startswith("tools.prepare: unpacking needs Python 3.10.12, 3.11.4 or 3.12")
    assert server.requests == []
    assert not root.exists()


@pytest.mark.parametrize("lost", ["-0005.flac", "102-7.trans.txt", "102-7-0005 THIS IS NUMBER 5\n"])
def test_an_archive_with_too_few_utterances_is_an_error(get, root, server, lost):
    server.publish(TRAIN, pack({
        name: contents.replace(lost.encode(), b"")
        for name, contents in split_files(TRAIN).items() if not name.endswith(lost)}))
    assert "utterances, expected 6" in get(status=1)
    assert names(root) == [PARTIAL]


def test_an_incomplete_split_is_an_error_before_any_request(get, root, server):
    get()
    server.requests.clear()
    next((root / TRAIN).rglob("*.flac")).unlink()
    shutil.rmtree(root / DEV)
    assert f"{root / TRAIN}: 5 utterances, expected 6; remove it" in get(status=1)
    assert server.requests == []


# ------------------------------------------------------------------------------ disk, interruption


def test_space_for_all_splits_and_the_largest_archive_is_needed(get, root, server, monkeypatch):
    archives = prepare.ARCHIVES.values()
    needed = sum(archive.num_bytes + 2**14 * archive.utterances for archive in archives)
    needed += prepare.ARCHIVES[TRAIN].num_bytes - 1000
    root.mkdir(parents=True)
    (root / PARTIAL).write_bytes(bytes(1000))
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    error = get(status=1)
    assert error.startswith(f"tools.prepare: {root}: ")
    assert f"{needed / 1e9:.2f} GB needed for {TRAIN}, {DEV}" in error
    assert server.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert "MD5 is" in get(status=1)
    assert server.ranges() == ["bytes=1000-"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "no space left")])
def test_interrupted_unpacking_leaves_the_archive_only(get, root, server, monkeypatch, stop):
    copy, copied = tarfile.copyfileobj, []

    def copy_until_interrupted(*args, **options):
        copied.append(args)
        if len(copied) == 5:
            raise stop
        copy(*args, **options)

    monkeypatch.setattr(tarfile, "copyfileobj", copy_until_interrupted)
    if stop is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            get()
    else:
        assert "no space left" in get(status=1)
    assert names(root) == [PARTIAL]
    server.requests.clear()
    get()
    assert [request[0] for request in server.requests] == [DEV_URL]


def test_a_second_call_at_the_same_time_waits_and_finds_the_corpus(get, root, monkeypatch):
    copy, locked, threads, statuses = tarfile.copyfileobj, prepare.locked, [], []
    has_begun = threading.Event()

    def lock(folder):
        if threading.current_thread() in threads:
            has_begun.set()
        return locked(folder)

    def copy_while_another_begins(*args, **options):
        if not threads:
            argv = ["tiny", str(root), "--mirror", "http://127.0.0.1:1"]
            threads.append(threading.Thread(target=lambda: statuses.append(prepare.main(argv))))
            threads[0].start()
            assert has_begun.wait(300)
        copy(*args, **options)

    monkeypatch.setattr(prepare, "locked", lock)

    monkeypatch.setattr(tarfile, "copyfileobj", copy_while_another_begins)
    get()
    threads[0].join()
    assert statuses == [0]
    assert_complete(root)


def test_the_files_of_a_killed_call_are_removed_before_space_is_counted(get, root, monkeypatch):
    killed = root / f".{TRAIN}.unpacking/LibriSpeech/{TRAIN}"
    killed.mkdir(parents=True)
    (killed / "half.flac").touch()
    usage, existed = shutil.disk_usage, []
    monkeypatch.setattr(shutil, "disk_usage",
                        lambda path: existed.append(killed.exists()) or usage(path))
    get()
    assert existed == [False]


# --------------------------------------------------------------------------------- local archives


@pytest.fixture
def local(packed, tmp_path):
    """Puts both archives on this machine; returns split -> path."""
    folder = tmp_path / "local"
    folder.mkdir()
    paths = {split: folder / f"{split}.tar.gz" for split in packed}
    for split, path in paths.items():
        path.write_bytes(packed[split])
    return paths


def test_local_archives_are_used_and_kept_and_need_space_unpacked_only(
        get, server, local, packed, monkeypatch):
    needed = sum(a.num_bytes + 2**14 * a.utterances for a in prepare.ARCHIVES.values())
    usage = shutil.disk_usage(local[TRAIN])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    get("--archive", *local.values())
    assert server.requests == []
    assert {split: path.read_bytes() for split, path in local.items()} == packed


def test_a_lacking_local_archive_is_an_error_unless_its_split_is_there(get, root, server, local):
    assert f"--archive lacks {TRAIN}.tar.gz" in get("--archive", local[DEV], status=1)
    assert names(root) == []
    get("--archive", *local.values())
    shutil.rmtree(root / DEV)
    get("--archive", local[DEV])
    assert server.requests == []


def test_a_damaged_local_archive_is_an_error_and_kept(get, root, local, packed):
    size = len(packed[TRAIN])
    for damaged, message in ((packed[TRAIN][:-1], f"{size - 1:,} bytes, expected {size:,}"),
                             (packed[TRAIN][:-1] + b"x", "MD5 is ")):
        local[TRAIN].write_bytes(damaged)
        assert f"{local[TRAIN]}: {message}" in get("--archive", *local.values(), status=1)
    assert local[TRAIN].exists()
    assert names(root) == []


def test_a_local_archive_of_another_name_or_none_is_an_error(get, root, local):
    other = local[TRAIN].rename(local[TRAIN].with_name("train.tgz"))
    error = get("--archive", other, local[DEV], status=1)
    assert f"{other}: expected the name {TRAIN}.tar.gz or {DEV}.tar.gz" in error
    error = get("--archive", local[TRAIN], local[DEV], status=1)
    assert f"{local[TRAIN]}: no such file" in error
    assert not root.exists()
