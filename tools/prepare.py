# SPDX-License-Identifier: Apache-2.0
"""Prepares corpora: speaks the demo, downloads LibriSpeech, imports other forms, checks any corpus.

    python -m tools.prepare demo ROOT                 # splits train-demo and dev-demo, by espeak-ng
    python -m tools.prepare mini-librispeech ROOT     # or librispeech-100, librispeech-960
    python -m tools.prepare import SOURCE ROOT SPLIT  # NeMo's, Common Voice's or Kaldi's form
    python -m tools.prepare check ROOT [SPLIT ...]    # exit status 1 if there is an error

After an interruption the same command continues. From a mirror, or without internet:
    python -m tools.prepare mini-librispeech ROOT --mirror https://openslr.elda.org/resources
    python -m tools.prepare mini-librispeech ROOT --archive train-clean-5.tar.gz dev-clean-2.tar.gz

Every corpus has LibriSpeech's form (Panayotov et al. 2015, doi:10.1109/ICASSP.2015.7178964):
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac    16 kHz, mono, int16
    <ROOT>/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt        lines `ID TEXT`
The text is in capitals.
"""

import argparse
import contextlib
import hashlib
import shutil
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import requests
import urllib3
from tqdm import tqdm

from data import (
    describe_layout,
    describe_problems,
    is_audio,
    is_transcript,
    read_transcripts,
    scan_split,
    separate,
)
from tools import bar_options, corpora, locked
from tools.demo import make_demo

# ------------------------------------------------------------------ LibriSpeech: published archives

OPENSLR = "https://www.openslr.org/resources"  # redirects to a mirror


class Archive(NamedTuple):
    """A split as it is published: <OPENSLR>/<resource>/<split>.tar.gz has LibriSpeech/<split>."""

    resource: int
    num_bytes: int
    md5: str
    utterances: int


# Resource 12: librispeech.csv of NVIDIA/DeepLearningExamples (Jasper) and librispeech.py of
# PaddlePaddle/PaddleSpeech agree on the MD5; the sizes are in url_checksums/librispeech.txt of
# tensorflow/datasets. Resource 31: md5sum.txt of danpovey/openslr (the source of that site, since
# commit f56e651) and mini_librispeech.py of PaddleSpeech agree on the MD5; the sizes are in
# egs/mini_librispeech/s5/local/download_and_untar.sh of kaldi-asr/kaldi.
ARCHIVES = {
    "train-clean-5": Archive(31, 332954390, "5df7d4e78065366204ca6845bb08f490", 1519),
    "dev-clean-2": Archive(31, 126046265, "6d7ab67ac6a1d2c993d050e16d61080d", 1089),
    "train-clean-100": Archive(12, 6387309499, "2a93770f6d5c6c964bc36631d331a522", 28539),
    "train-clean-360": Archive(12, 23049477885, "c0e676e450a7ff2f54aeade5171606fa", 104014),
    "train-other-500": Archive(12, 30593501606, "d1a0fd59409feb2c614ce4d30c387708", 148688),
    "dev-clean": Archive(12, 337926286, "42e2234ba48799c1f50f24a7926300a1", 2703),
    "dev-other": Archive(12, 314305928, "c8d0bcc9cca99d4f8b62fcc847357931", 2864),
    "test-clean": Archive(12, 346663984, "32fa31d27d2e1cad72775fee3f4849a9", 2620),
    "test-other": Archive(12, 328757843, "fb5a50374b501bb3bac4815ee91d3135", 2939),
}
DOWNLOADS = {
    "mini-librispeech": ("train-clean-5", "dev-clean-2"),
    "librispeech-100": ("train-clean-100", "dev-clean", "test-clean"),
    "librispeech-960": (
        "train-clean-100", "train-clean-360", "train-other-500",
        "dev-clean", "dev-other", "test-clean", "test-other",
    ),
}


# ------------------------------------------------------------------------- LibriSpeech: downloading

CHUNK_BYTES = 2**20
TIMEOUT_S = 60  # a server that sends no byte for so long is asked again
ATTEMPTS = 20  # failed requests for one file, in one call
LONGEST_WAIT_S = 60  # before the next request; the wait doubles from 2 s


def progress(stream: BinaryIO, method: str, label: str, num_bytes: int,
             start: int = 0) -> contextlib.AbstractContextManager[BinaryIO]:
    """Wraps a stream: a tqdm bar counts, from `start`, the bytes that "read" or "write" moves."""
    return tqdm.wrapattr(stream, method, num_bytes, bytes=False, desc=label, initial=start,
                         unit="B", unit_scale=True, **bar_options())


def request_rest(url: str, path: Path, num_bytes: int) -> None:
    """Requests the bytes that `path` lacks and appends them.

    A server that does not know ranges sends the whole file, which then replaces `path`.

    Raises:
        requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError: the next request
            may succeed; `path` keeps every byte that arrived.
        requests.HTTPError: the server refuses the request.
        ValueError: the server announces a size other than `num_bytes`.
    """
    start = path.stat().st_size
    headers = {"Range": f"bytes={start}-", "User-Agent": "rnnt-cpu"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise requests.ConnectionError(f"HTTP status {response.status_code} {response.reason}")
        response.raise_for_status()
        name, expected = "Content-Range", f"bytes {start}-{num_bytes - 1}/{num_bytes}"
        if response.status_code != requests.codes.partial_content:
            start, name, expected = 0, "Content-Length", str(num_bytes)
        announced = response.headers.get(name, expected)  # servers may leave it out
        if announced != expected:
            raise ValueError(f"{url}: {name} is {announced!r}, expected {expected!r}")
        with (
            open(path, "ab" if start else "wb") as file,
            progress(file, "write", f"download {path.name}", num_bytes, start) as counted,
        ):
            # `raw` does not decode: some servers call a .tar.gz a gzip-encoded .tar. `read1`
            # returns what has arrived; `read` would lose it when the connection breaks.
            while chunk := response.raw.read1(min(CHUNK_BYTES, num_bytes - start)):
                counted.write(chunk)
                start += len(chunk)
    if start < num_bytes:
        raise requests.ConnectionError(f"connection closed after byte {start:,} of {num_bytes:,}")


def download(url: str, path: Path, num_bytes: int) -> None:
    """Appends to `path` the bytes that it lacks of the `num_bytes` at `url`.

    Raises:
        ConnectionError: the last attempt failed; the next call continues `path`.
        requests.HTTPError, ValueError: as of `request_rest`, without another attempt.
    """
    path.touch()
    attempt = 0
    while path.stat().st_size < num_bytes:
        try:
            request_rest(url, path, num_bytes)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            attempt += 1
            problem = f"{url}: {error.args[0]}; attempt {attempt} of {ATTEMPTS}"
            if attempt == ATTEMPTS:
                raise ConnectionError(f"{problem}; call again to continue") from error
            wait_s = min(2**attempt, LONGEST_WAIT_S)
            print(f"{problem}, next in {wait_s} s", file=sys.stderr, flush=True)
            time.sleep(wait_s)


def verify(path: Path, archive: Archive) -> None:
    """Raises ValueError if the file does not have the published size and MD5."""
    size = path.stat().st_size
    if size != archive.num_bytes:
        raise ValueError(f"{path}: {size:,} bytes, expected {archive.num_bytes:,}")
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, progress(file, "read", f"verify {path.name}", size) as counted:
        while chunk := counted.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        raise ValueError(f"{path}: MD5 is {digest.hexdigest()}, expected {archive.md5}")


# -------------------------------------------------------------------------- LibriSpeech: unpacking

# An unpacked utterance takes this much more than its share of the archive: 8.3 kB of zeros in the
# FLAC header, which gzip compresses to nothing (dataset_size of openslr/librispeech_asr), half a
# block of the file system and a share of the folders.
UNPACKED_BYTES = 2**14


def partial_path(root: Path, split: str) -> Path:
    """Returns the path of an archive while it is downloaded, verified and unpacked."""
    return root / f"{split}.tar.gz.partial"


def check_space(root: Path, missing: Sequence[str], local: Mapping[str, Path]) -> None:
    """Raises OSError if the disk cannot hold all `missing` splits and the largest archive."""
    needed = sum(ARCHIVES[s].num_bytes + UNPACKED_BYTES * ARCHIVES[s].utterances for s in missing)
    partials = {s: partial_path(root, s) for s in missing if s not in local}
    done = {s: path.stat().st_size for s, path in partials.items() if path.exists()}
    needed += max((ARCHIVES[s].num_bytes - done.get(s, 0) for s in partials), default=0)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(f"{root}: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed for "
                      f"{', '.join(missing)}")


def count_utterances(folder: Path) -> int:
    """Counts the utterances in the split `folder` that have a transcript and a FLAC file."""
    count = 0
    for transcript in folder.glob("*/*/*.trans.txt"):
        lines, _ = separate(read_transcripts(transcript))
        ids = {line.id for line in lines}
        count += len(ids & {path.stem for path in transcript.parent.glob("*.flac")})
    return count


def unpack(archive: Path, root: Path, split: str) -> None:
    """Unpacks an archive to `root`/`split`, whole or not at all; SPEAKERS.TXT etc. go to `root`.

    Raises:
        ValueError: the archive lacks utterances, or tarfile's data filter refuses a member.
    """
    unpacking = root / f".{split}.unpacking"  # on the disk of `root`: the last step is one rename
    unpacking.mkdir()
    size = archive.stat().st_size
    try:
        with (
            open(archive, "rb") as file,
            progress(file, "read", f"unpack {archive.name}", size) as counted,
            tarfile.open(fileobj=counted, mode="r:gz") as members,
        ):
            members.extractall(unpacking, filter="data")
        top = unpacking / "LibriSpeech"
        found, expected = count_utterances(top / split), ARCHIVES[split].utterances
        if found != expected:
            raise ValueError(f"{archive}: {found:,} utterances, expected {expected:,}")
        for text in top.glob("*.TXT"):
            text.replace(root / text.name)
        (top / split).rename(root / split)
    except tarfile.TarError as error:
        raise ValueError(f"{archive}: {error}") from error
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def find_missing(root: Path, splits: Sequence[str]) -> list[str]:
    """Lists the splits that are not in `root`; raises ValueError if one is incomplete."""
    missing = []
    for split in splits:
        folder, expected = root / split, ARCHIVES[split].utterances
        if not folder.exists():
            missing.append(split)
        elif (found := count_utterances(folder)) != expected:
            raise ValueError(f"{folder}: {found:,} utterances, expected {expected:,}; remove it "
                             "and call again")
    return missing


def match_archives(files: Sequence[Path], splits: Sequence[str]) -> dict[str, Path]:
    """Maps splits to local archives, which must have their published names, <split>.tar.gz."""
    split_of = {f"{split}.tar.gz": split for split in splits}
    for path in files:
        if path.name not in split_of:
            raise ValueError(f"{path}: expected the name {' or '.join(split_of)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
    return {split_of[path.name]: path for path in files}


def fetch(root: Path, split: str, mirror: str) -> Path:
    """Downloads what is missing of a split's archive; removes the file if its MD5 is wrong."""
    path, archive = partial_path(root, split), ARCHIVES[split]
    download(f"{mirror.rstrip('/')}/{archive.resource}/{split}.tar.gz", path, archive.num_bytes)
    try:
        verify(path, archive)
    except ValueError:
        path.unlink()
        raise
    return path


def make_librispeech(root: Path, corpus: str, mirror: str, files: Sequence[Path]) -> None:
    """Brings the missing splits of a corpus to `root`.

    They are downloaded from `mirror`, a copy of OPENSLR, unless there are local archives, `files`.
    Downloaded archives are removed, local ones are kept.
    """
    local = match_archives(files, DOWNLOADS[corpus])
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("unpacking needs Python 3.10.12, 3.11.4 or 3.12, or a later one: "
                           f"{sys.version.split()[0]} does not refuse members that lead outside")
    root.mkdir(parents=True, exist_ok=True)
    # A complete corpus may lie on a disk that nobody can write to.
    lock = locked(root) if find_missing(root, DOWNLOADS[corpus]) else contextlib.nullcontext()
    with lock:
        missing = find_missing(root, DOWNLOADS[corpus])
        if files and (lacking := [f"{split}.tar.gz" for split in missing if split not in local]):
            raise ValueError(f"--archive lacks {', '.join(lacking)}")
        for abandoned in root.glob(".*.unpacking"):  # by a call that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        if missing:
            check_space(root, missing, local)
        for split in missing:
            if split in local:
                verify(local[split], ARCHIVES[split])
                unpack(local[split], root, split)
            else:
                archive = fetch(root, split, mirror)
                unpack(archive, root, split)
                archive.unlink()
    count = sum(ARCHIVES[split].utterances for split in DOWNLOADS[corpus])
    print(f"{root}: {corpus} is complete, {count:,} utterances")


# ------------------------------------------------------------------------------------------- check


def find_splits(root: Path) -> list[str]:
    """Lists the folders in `root` that have audio or a transcript at LibriSpeech's depth."""
    return sorted({path.parents[2].name for path in root.glob("*/*/*/*")
                   if is_audio(path.name) or is_transcript(path.name)})


def check(root: Path, splits: Sequence[str]) -> bool:
    """Prints size and problems of the splits, or of all in `root`; returns True without errors."""
    splits = splits or find_splits(root)
    if not splits:
        raise FileNotFoundError(f"{root}: no audio in it as <split>/<speaker>/<chapter>/*.flac; "
                                f"{describe_layout(root)}")
    num_errors = 0
    for split in splits:
        utterances, problems = separate(scan_split(root, split, decode=True))
        words = [word for utterance in utterances for word in utterance.text.split()]
        hours = sum(utterance.duration_s for utterance in utterances) / 3600
        speakers = {utterance.id.split("-")[0] for utterance in utterances}
        print(f"{split}: {len(utterances)} utterances, {hours:.2f} h, {len(words)} words, "
              f"{len(set(words))} distinct words, {len(speakers)} speakers")
        for line in describe_problems(problems):
            print(f"  {line}")
        num_errors += sum(problem.level == "error" for problem in problems)
    return num_errors == 0


# ------------------------------------------------------------------------------------ command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line: a subcommand for each corpus, and `check`."""
    parser = argparse.ArgumentParser(prog="python -m tools.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser("demo", help="speak the demo corpus", allow_abbrev=False)
    demo.add_argument("root", metavar="ROOT", type=Path, help="new folder")
    for corpus, splits in DOWNLOADS.items():
        libri = commands.add_parser(corpus, help=", ".join(splits), allow_abbrev=False)
        libri.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
        source = libri.add_mutually_exclusive_group()
        source.add_argument("--mirror", metavar="URL", default=OPENSLR, help="%(default)s")
        source.add_argument("--archive", metavar="FILE", type=Path, nargs="+", default=[],
                            help="local files <split>.tar.gz of all splits, instead of downloading")
    imports = commands.add_parser("import", help="bring a corpus of another form into the tree",
                                  allow_abbrev=False)
    imports.add_argument("source", metavar="SOURCE", type=Path,
                         help="NeMo's JSON lines, Common Voice's .tsv or Kaldi's data folder")
    imports.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
    imports.add_argument("split", metavar="SPLIT", help="name of the new split")
    imports.add_argument("--keep-case", action="store_true", help="do not write in capitals")
    imports.add_argument("--keep-punctuation", action="store_true",
                         help="do not turn punctuation and symbols into spaces")
    checks = commands.add_parser("check", help="list the problems of a corpus", allow_abbrev=False)
    checks.add_argument("root", metavar="ROOT", type=Path, help="folder of the splits")
    checks.add_argument("splits", metavar="SPLIT", nargs="*", help="default: all splits in ROOT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit status."""
    args = parse_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        if args.command == "check":
            return 0 if check(args.root, args.splits) else 1
        if args.command == "import":
            rule = corpora.TextRule(args.keep_case, args.keep_punctuation)
            corpora.read_source(args.source)  # before a folder is made for a source without a file
            args.root.mkdir(parents=True, exist_ok=True)
            with locked(args.root):
                is_whole = corpora.import_split(args.source, args.root, args.split, rule)
            return 0 if is_whole else 1
        if args.command == "demo":
            make_demo(args.root)
        else:
            make_librispeech(args.root, args.command, args.mirror, args.archive)
    except BrokenPipeError:
        raise  # tools/__init__.py ends the process
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"tools.prepare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
