# SPDX-License-Identifier: Apache-2.0
"""prepare.py gets LibriSpeech whole, or says what is wrong and keeps what it has.

python -m pytest tests/test_download.py

A server on 127.0.0.1 stands in for openslr.org. Its archives have LibriSpeech's form and two short
recordings of noise for each speaker; `corpus` puts their sizes into prepare.py's tables.
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
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tools import prepare

TRAIN, DEV = "train-tiny", "dev-tiny"
UTTERANCES = {TRAIN: 6, DEV: 2}


# ----------------------------------------------------------------------------------- the archives


def flac(seed):
    noise = np.random.default_rng(seed).integers(-3000, 3000, 4800, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, noise, 16000, format="FLAC")
    return file.getvalue()


def split_files(split, utterances):
    """Name -> contents of an archive, two utterances for each speaker."""
    files = {"LibriSpeech/README.TXT": b"read me", "LibriSpeech/SPEAKERS.TXT": split.encode()}
    for number in range(utterances):
        chapter = f"{100 + number // 2}-7"
        folder = f"LibriSpeech/{split}/{chapter.replace('-', '/')}"
        files[f"{folder}/{chapter}-{number:04d}.flac"] = flac(number)
        transcript = f"{folder}/{chapter}.trans.txt"
        line = f"{chapter}-{number:04d} THIS IS NUMBER {number}\n".encode()
        files[transcript] = files.get(transcript, b"") + line
    return files


def pack(files, *members):
    """Bytes of a .tar.gz of these files, then of members that have no contents."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, contents in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
        for member in members:
            tar.addfile(member)
    return packed.getvalue()


def publish(monkeypatch, split, data, utterances=None):
    """Make `data` what prepare.py expects of a split."""
    count = UTTERANCES[split] if utterances is None else utterances
    published = prepare.Archive(5, len(data), hashlib.md5(data).hexdigest(), count)
    monkeypatch.setitem(prepare.ARCHIVES, split, published)


@pytest.fixture(scope="module")
def packed():
    return {split: pack(split_files(split, count)) for split, count in UTTERANCES.items()}


@pytest.fixture
def corpus(packed, monkeypatch):
    monkeypatch.setattr(prepare, "ARCHIVES", {})
    monkeypatch.setattr(prepare, "CORPORA", {"tiny": (TRAIN, DEV)})
    for split, data in packed.items():
        publish(monkeypatch, split, data)


# ------------------------------------------------------------------------------------- the server


class Handler(BaseHTTPRequestHandler):
    """Answers as the next of `server.script` says, plainly if nothing is left of it."""

    timeout = 5

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else {}
        data = how.get("data", server.files.get(self.path, b""))
        start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        start, status = (start, 206) if how.get("ranges", True) else (0, 200)
        status = how.get("status", status)
        if self.headers["User-Agent"].startswith("Python-urllib"):
            status = 403  # as some servers do
        body = data[start:] if status in (200, 206) else b""
        headers = {"Content-Length": len(body)}
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


@pytest.fixture
def server(packed, monkeypatch):
    """The archives; `script` holds how to answer, `requests` (path, Range, bytes of the answer)."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "TIMEOUT_S", 5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.files = {f"/5/{split}.tar.gz": data for split, data in packed.items()}
    server.script, server.requests, server.stop = [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
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
    """Seconds that prepare.py would have waited."""
    waits = []
    monkeypatch.setattr(prepare.time, "sleep", waits.append)
    return waits


@pytest.fixture
def get(corpus, server, waits, tmp_path, capsys):
    """Runs prepare.py on `root`; returns (exit status, stderr)."""

    def get(*words):
        words = words or ("--mirror", server.url)
        status = prepare.main(["tiny", str(tmp_path / "corpora/root"), *map(str, words)])
        return status, capsys.readouterr().err

    return get


@pytest.fixture
def root(tmp_path):
    return tmp_path / "corpora/root"


def assert_complete(root):
    expected = {}
    for split, count in UTTERANCES.items():
        expected |= split_files(split, count)
    expected = {name.removeprefix("LibriSpeech/"): data for name, data in expected.items()}
    assert {str(p.relative_to(root)): p.read_bytes() for p in files_of(root)} == expected


def files_of(root):
    return sorted(path for path in root.rglob("*") if not path.is_dir())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------- what goes well


def test_a_corpus_arrives_whole_and_nothing_else_stays(get, root, server, packed, capsys):
    assert get()[0] == 0
    assert_complete(root)
    assert names(root) == ["README.TXT", "SPEAKERS.TXT", DEV, TRAIN]
    assert server.requests == [
        (f"/5/{split}.tar.gz", "bytes=0-", len(packed[split])) for split in (TRAIN, DEV)
    ]
    assert prepare.main(["check", str(root)]) == 0
    assert f"{TRAIN}: 6 utterances" in capsys.readouterr().out


def test_nothing_is_asked_for_or_written_when_all_is_there(get, root, server):
    get()
    server.requests.clear()
    before = [(path, path.stat().st_mtime_ns) for path in (root, *sorted(root.rglob("*")))]
    assert get() == (0, "")
    assert server.requests == []
    assert before == [(path, path.stat().st_mtime_ns) for path in (root, *sorted(root.rglob("*")))]


def test_only_the_missing_split_is_downloaded(get, root, server, packed):
    get()
    server.requests.clear()
    shutil.rmtree(root / DEV)
    server.files[f"/copy/5/{DEV}.tar.gz"] = packed[DEV]
    assert get("--mirror", f"{server.url}/copy/")[0] == 0
    assert [request[0] for request in server.requests] == [f"/copy/5/{DEV}.tar.gz"]
    assert_complete(root)


def test_a_log_has_plain_lines(get):
    lines = get()[1].splitlines()
    assert not any("\r" in line or "|" in line for line in lines)
    done = [line for line in lines if "100 % of" in line]
    assert [line.split(":")[0] for line in done] == [
        f"{step} {split}.tar.gz.partial"
        for split in (TRAIN, DEV)
        for step in ("download", "verify", "unpack")
    ]
    assert all("B/s, 00:00 left" in line for line in done)


def test_a_terminal_has_a_bar_with_rate_and_remaining_time(get, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    last = get()[1].replace("\n", "\r").split(f"\rdownload {TRAIN}.tar.gz.partial: ")[-1]
    assert last.startswith("100%|")
    assert "<00:00" in last
    assert "B/s]" in last


@pytest.mark.parametrize(
    ("split", "resource", "size", "unit"),
    [
        ("dev-clean", 12, 337, 10**6),
        ("dev-other", 12, 314, 10**6),
        ("test-clean", 12, 346, 10**6),
        ("test-other", 12, 328, 10**6),
        ("train-clean-100", 12, 63, 10**8),
        ("train-clean-360", 12, 23, 10**9),
        ("train-other-500", 12, 30, 10**9),
        ("dev-clean-2", 31, 126, 10**6),
        ("train-clean-5", 31, 332, 10**6),
    ],
)
def test_published_address_and_size(split, resource, size, unit, monkeypatch, tmp_path):
    """As https://www.openslr.org/12 and /31 list them, sizes rounded down."""
    asked = []
    monkeypatch.setattr(prepare, "verify", lambda *args: None)
    monkeypatch.setattr(prepare, "download", lambda *args: asked.append(args))
    path = prepare.fetch(tmp_path, split, prepare.OPENSLR)
    url = f"https://www.openslr.org/resources/{resource}/{split}.tar.gz"
    assert asked == [(url, path, prepare.ARCHIVES[split].num_bytes)]
    assert prepare.ARCHIVES[split].num_bytes // unit == size


def test_published_corpora():
    assert prepare.CORPORA["mini-librispeech"] == ("train-clean-5", "dev-clean-2")
    assert prepare.CORPORA["librispeech-100"] == ("train-clean-100", "dev-clean", "test-clean")
    full = [prepare.ARCHIVES[split] for split in prepare.CORPORA["librispeech-960"]]
    # The three training splits and dev-clean, dev-other, test-clean, test-other: Database.md of
    # espnet/espnet.
    assert sum(archive.utterances for archive in full) == 281241 + 2703 + 2864 + 2620 + 2939
    assert all(re.fullmatch("[0-9a-f]{32}", archive.md5) for archive in prepare.ARCHIVES.values())


# ------------------------------------------------------------------------ what a network does


def test_a_broken_connection_is_continued(get, root, server, packed, waits):
    server.script = [{"drop": 1000}, {"drop": 500}]
    assert get()[0] == 0
    size = len(packed[TRAIN])
    assert [request[1:] for request in server.requests[:-1]] == [
        ("bytes=0-", 1000),
        ("bytes=1000-", 500),
        ("bytes=1500-", size - 1500),
    ]
    assert waits == [2, 4]
    assert_complete(root)


def test_another_call_continues_from_the_partial_file(get, root, server, packed, monkeypatch):
    monkeypatch.setattr(prepare, "ATTEMPTS", 1)
    server.script = [{"drop": 1000}]
    status, error = get()
    assert status == 1
    assert f"/5/{TRAIN}.tar.gz" in error
    assert "byte 1,000 of" in error
    assert names(root) == [f"{TRAIN}.tar.gz.partial"]
    server.requests.clear()
    status, log = get()
    size = len(packed[TRAIN])
    assert status == 0
    assert server.requests[0][1:] == ("bytes=1000-", size - 1000)
    assert log.startswith(f"download {TRAIN}.tar.gz.partial: {100 * 1000 / size:.0f} % of")
    assert_complete(root)


def test_a_whole_partial_file_is_not_downloaded_again(get, root, server, packed):
    root.mkdir(parents=True)
    (root / f"{TRAIN}.tar.gz.partial").write_bytes(packed[TRAIN])
    assert get()[0] == 0
    assert [request[0] for request in server.requests] == [f"/5/{DEV}.tar.gz"]
    assert_complete(root)


def test_a_server_without_ranges_starts_over(get, root, server, packed):
    root.mkdir(parents=True)
    (root / f"{TRAIN}.tar.gz.partial").write_bytes(b"x" * 1000)  # what must not survive
    server.script = [{"ranges": False, "drop": 700}, {"ranges": False}]
    assert get()[0] == 0
    assert [request[1] for request in server.requests[:2]] == ["bytes=1000-", "bytes=700-"]
    assert server.requests[1][2] == len(packed[TRAIN])
    assert_complete(root)


def test_a_silent_server_is_given_up_and_asked_again(get, root, server, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT_S", 0.3)
    server.script = [{"drop": 1000, "stall": True}]
    status, error = get()
    assert status == 0
    assert "timed out; attempt 1 of 20, next in 2 s" in error
    assert server.requests[1][1] == "bytes=1000-"
    assert_complete(root)


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_failure_of_the_server_is_tried_again(get, root, server, waits, status):
    server.script = [{"status": status}] * 2
    assert get()[0] == 0
    assert waits == [2, 4]
    assert_complete(root)


def test_attempts_and_waits_are_bounded(get, root, server, waits, monkeypatch):
    monkeypatch.setattr(prepare, "ATTEMPTS", 5)
    monkeypatch.setattr(prepare, "LONGEST_WAIT_S", 7)
    server.script = [{"status": 500}] * 100
    status, error = get()
    assert status == 1
    assert len(server.requests) == 5
    assert waits == [2, 4, 7, 7]
    assert f"{server.url}/5/{TRAIN}.tar.gz: HTTP Error 500" in error.splitlines()[-1]
    assert "attempt 5 of 5" in error.splitlines()[-1]


@pytest.mark.parametrize("status", [404, 403, 416])
def test_a_lasting_failure_of_the_server_is_an_error_at_once(get, root, server, waits, status):
    server.script = [{"status": status}]
    code, error = get()
    assert code == 1
    assert (len(server.requests), waits) == (1, [])
    assert f"prepare.py: {server.url}/5/{TRAIN}.tar.gz: HTTP Error {status}" in error


def test_a_server_that_is_not_there(get, monkeypatch, waits):
    monkeypatch.setattr(prepare, "ATTEMPTS", 3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        status, error = get("--mirror", f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert (status, waits) == (1, [2, 4])
    assert "Connection refused" in error


def test_a_redirected_request_keeps_its_range(get, root, server, packed):
    root.mkdir(parents=True)
    (root / f"{TRAIN}.tar.gz.partial").write_bytes(packed[TRAIN][:1000])
    server.files["/elsewhere"] = packed[TRAIN]
    server.script = [{"status": 302, "headers": {"Location": f"{server.url}/elsewhere"}}]
    assert get()[0] == 0
    assert server.requests[1] == ("/elsewhere", "bytes=1000-", len(packed[TRAIN]) - 1000)
    assert_complete(root)


def test_a_full_disk_is_an_error_at_once(monkeypatch, waits):
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("no /dev/full to write to")
    monkeypatch.setattr(prepare, "receive", lambda *args: iter([(0, bytes(100_000))]))
    with pytest.raises(OSError, match="No space left") as failure:
        prepare.download("http://127.0.0.1/x", full, 200_000)
    assert failure.value.errno == errno.ENOSPC
    assert waits == []


# ---------------------------------------------------------------------------- what a server sends


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ({"headers": {"Content-Range": "bytes 0-99/100"}}, "Content-Range"),
        ({"headers": {"Content-Range": None}}, "Content-Range"),
        ({"ranges": False, "headers": {"Content-Length": "100"}}, "Content-Length"),
        ({"ranges": False, "data": b"<html>log in first</html>"}, "Content-Length"),
    ],
)
def test_an_announced_length_that_disagrees_is_an_error(get, root, server, packed, answer, name):
    server.script = [answer]
    status, error = get()
    assert status == 1
    assert len(server.requests) == 1
    assert f"{TRAIN}.tar.gz: {name} is " in error
    assert str(len(packed[TRAIN])) in error
    assert (root / f"{TRAIN}.tar.gz.partial").stat().st_size == 0


def test_a_range_that_begins_elsewhere_is_an_error(get, root, server, packed):
    size = len(packed[TRAIN])
    server.script = [
        {"drop": 1000},
        {"headers": {"Content-Range": f"bytes 999-{size - 1}/{size}"}},
    ]
    status, error = get()
    assert status == 1
    assert f"is 'bytes 999-{size - 1}/{size}', expected 'bytes 1000-{size - 1}/{size}'" in error
    assert (root / f"{TRAIN}.tar.gz.partial").read_bytes() == packed[TRAIN][:1000]


def test_without_announced_length_no_more_than_the_published_is_read(get, root, server, packed):
    server.script = [
        {"ranges": False, "data": packed[TRAIN] + b"more", "headers": {"Content-Length": None}}
    ]
    assert get()[0] == 0
    assert_complete(root)


def test_wrong_bytes_are_removed_and_downloaded_anew(get, root, server, packed):
    wrong = b"wrong" + packed[TRAIN][5:]
    server.script = [{"data": wrong}]
    status, error = get()
    assert status == 1
    found, expected = (hashlib.md5(data).hexdigest() for data in (wrong, packed[TRAIN]))
    assert f"{TRAIN}.tar.gz.partial: MD5 is {found}, expected {expected}" in error
    assert names(root) == []
    assert get()[0] == 0
    assert server.requests[1][1] == "bytes=0-"
    assert_complete(root)


def test_too_long_a_partial_file_is_removed(get, root, packed):
    root.mkdir(parents=True)
    (root / f"{TRAIN}.tar.gz.partial").write_bytes(packed[TRAIN] + b"more")
    status, error = get()
    size = len(packed[TRAIN])
    assert status == 1
    assert f"{size + 4:,} bytes, expected {size:,}" in error
    assert names(root) == []


# -------------------------------------------------------------------------- what an archive holds


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../evil", tarfile.REGTYPE),
        (f"LibriSpeech/{TRAIN}/../../../evil", tarfile.REGTYPE),
        ("{outside}/evil", tarfile.REGTYPE),
        ("../evil", tarfile.DIRTYPE),
        (f"LibriSpeech/{TRAIN}/evil", tarfile.SYMTYPE),
        (f"LibriSpeech/{TRAIN}/evil", tarfile.LNKTYPE),
        (f"LibriSpeech/{TRAIN}/evil", tarfile.FIFOTYPE),
        (f"LibriSpeech/{TRAIN}/evil", tarfile.CHRTYPE),
    ],
)
def test_a_malicious_member_is_an_error_and_nothing_stays(
    get, root, server, monkeypatch, tmp_path, name, kind
):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = name.format(outside=outside)
    data = pack(split_files(TRAIN, 6), member(name, kind, str(outside)))
    publish(monkeypatch, TRAIN, data)
    server.files[f"/5/{TRAIN}.tar.gz"] = data
    status, error = get()
    assert status == 1
    assert f"{name!r} " in error
    assert f"{TRAIN}.tar.gz" in error
    assert names(root) == [f"{TRAIN}.tar.gz.partial"]
    assert names(tmp_path) == ["corpora", "outside"]
    assert names(tmp_path / "corpora") == ["root"]
    assert names(outside) == []


@pytest.mark.parametrize("lost", ["-0005.flac", "102-7.trans.txt", "102-7-0005 THIS IS NUMBER 5\n"])
def test_an_archive_with_too_few_utterances_is_an_error(get, root, server, monkeypatch, lost):
    files = split_files(TRAIN, 6)
    left = {name: files[name].replace(lost.encode(), b"") for name in files}
    data = pack({name: contents for name, contents in left.items() if not name.endswith(lost)})
    publish(monkeypatch, TRAIN, data)
    server.files[f"/5/{TRAIN}.tar.gz"] = data
    status, error = get()
    assert status == 1
    assert f"expected {UTTERANCES[TRAIN]}" in error
    assert names(root) == [f"{TRAIN}.tar.gz.partial"]


def test_an_incomplete_split_is_an_error_before_anything_is_asked_for(get, root, server):
    get()
    server.requests.clear()
    next((root / TRAIN).rglob("*.flac")).unlink()
    shutil.rmtree(root / DEV)
    status, error = get()
    assert status == 1
    assert f"{root / TRAIN}: 5 utterances, expected 6; remove it" in error
    assert server.requests == []


# ------------------------------------------------------------------------------ disk, interruption


def test_space_for_all_splits_and_the_largest_archive_is_needed(get, root, server, monkeypatch):
    archives = prepare.ARCHIVES.values()
    needed = sum(archive.num_bytes + 2**14 * archive.utterances for archive in archives)
    needed += prepare.ARCHIVES[TRAIN].num_bytes - 1000
    root.mkdir(parents=True)
    (root / f"{TRAIN}.tar.gz.partial").write_bytes(bytes(1000))
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    status, error = get()
    assert status == 1
    assert f"{root}: " in error
    assert f"{needed / 1e9:.2f} GB needed for {TRAIN}, {DEV}" in error
    assert server.requests == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    get()
    assert server.requests[0][1] == "bytes=1000-"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "no space left")])
def test_interrupted_unpacking_leaves_the_archive_only(get, root, server, monkeypatch, stop):
    copy = shutil.copyfileobj
    copied = []

    def copy_until_interrupted(*args):
        copied.append(args)
        if len(copied) == 5:
            raise stop
        copy(*args)

    monkeypatch.setattr(shutil, "copyfileobj", copy_until_interrupted)
    if stop is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            get()
    else:
        assert get()[0] == 1
    assert names(root) == [f"{TRAIN}.tar.gz.partial"]
    server.requests.clear()
    assert get()[0] == 0
    assert [request[0] for request in server.requests] == [f"/5/{DEV}.tar.gz"]
    assert_complete(root)


def test_a_second_call_at_the_same_time_waits_and_finds_all_there(get, root, server, monkeypatch):
    copy, threads = shutil.copyfileobj, []

    def copy_while_another_begins(*args):
        if not threads:
            words = ["mini-librispeech", str(root), "--mirror", "http://127.0.0.1:1"]
            threads.append(threading.Thread(target=prepare.main, args=[words]))
            threads[0].start()
            time.sleep(0.3)
        copy(*args)

    monkeypatch.setattr(shutil, "copyfileobj", copy_while_another_begins)
    status, _ = get()
    threads[0].join()
    assert status == 0
    assert_complete(root)


def test_what_a_killed_call_left_is_removed_before_space_is_counted(get, root, monkeypatch):
    killed = root / f".{TRAIN}.unpacking/LibriSpeech/{TRAIN}"
    killed.mkdir(parents=True)
    (killed / "half.flac").touch()
    usage = shutil.disk_usage

    def assert_removed(path):
        assert not killed.exists()
        return usage(path)

    monkeypatch.setattr(shutil, "disk_usage", assert_removed)
    assert get()[0] == 0
    assert_complete(root)


# ------------------------------------------------------------------------------------- no internet


@pytest.fixture
def local(packed, tmp_path):
    """Both archives on this machine."""
    folder = tmp_path / "local"
    folder.mkdir()
    paths = {split: folder / f"{split}.tar.gz" for split in packed}
    for split, path in paths.items():
        path.write_bytes(packed[split])
    return paths


def test_local_archives_are_taken_and_kept(get, root, server, local, packed):
    assert get("--archive", *local.values())[0] == 0
    assert_complete(root)
    assert server.requests == []
    assert {split: path.read_bytes() for split, path in local.items()} == packed


def test_local_archives_need_space_unpacked_only(get, root, local, monkeypatch):
    needed = sum(a.num_bytes + 2**14 * a.utterances for a in prepare.ARCHIVES.values())
    usage = shutil.disk_usage(local[TRAIN])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert get("--archive", *local.values())[0] == 0
    assert_complete(root)


def test_a_lacking_local_archive_is_an_error_unless_its_split_is_there(get, root, server, local):
    status, error = get("--archive", local[DEV])
    assert status == 1
    assert f"--archive lacks {TRAIN}.tar.gz" in error
    assert names(root) == []
    get("--archive", *local.values())
    shutil.rmtree(root / DEV)
    assert get("--archive", local[DEV])[0] == 0
    assert server.requests == []
    assert_complete(root)


def test_a_damaged_local_archive_is_an_error_and_kept(get, root, local, packed):
    local[TRAIN].write_bytes(packed[TRAIN][:-1])
    status, error = get("--archive", *local.values())
    size = len(packed[TRAIN])
    assert status == 1
    assert f"{local[TRAIN]}: {size - 1:,} bytes, expected {size:,}" in error
    local[TRAIN].write_bytes(packed[TRAIN][:-1] + b"x")
    status, error = get("--archive", *local.values())
    assert status == 1
    assert f"{local[TRAIN]}: MD5 is " in error
    assert local[TRAIN].exists()
    assert names(root) == []


def test_a_local_archive_of_another_name_is_an_error(get, root, local):
    other = local[TRAIN].rename(local[TRAIN].with_name("train.tgz"))
    status, error = get("--archive", other, local[DEV])
    assert status == 1
    assert f"{other}: expected the name {TRAIN}.tar.gz or {DEV}.tar.gz" in error
    assert not root.exists()


def test_a_local_archive_that_does_not_exist_is_an_error(get, root, local):
    local[DEV].unlink()
    status, error = get("--archive", *local.values())
    assert status == 1
    assert f"{local[DEV]}: no such file" in error
    assert not root.exists()


def test_mirror_and_archive_exclude_each_other(get, local, server):
    with pytest.raises(SystemExit) as stop:
        get("--mirror", server.url, "--archive", *local.values())
    assert stop.value.code == 2
