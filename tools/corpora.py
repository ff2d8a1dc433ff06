# SPDX-License-Identifier: Apache-2.0
"""Imports a corpus of another form, as LibriSpeech's tree: python -m tools.prepare import.

The contents of SOURCE tell its form:
    NeMo            a file of lines {"audio_filepath": ..., "text": ..., "duration": ..., "offset":
                    ..., "speaker": ...}; only the first two are needed
    Common Voice    a file of tab-separated values with the columns path, sentence and perhaps
                    client_id; the recordings are in clips/ beside it, or beside it
    Kaldi           a folder with wav.scp (files, no commands), text, and perhaps segments, utt2spk

Every utterance becomes <ROOT>/<SPLIT>/<speaker>/1/<speaker>-1-<name>_<hash>.flac, 16 kHz, mono,
int16. Speaker and name are those of the source, and the hash is that of path and times, so that
another call finds what is written already. Without speakers in the source there is one, called as
the split.
"""

import hashlib
import io
import itertools
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from data import Problem, describe_problems, line_error, separate
from features import DEFAULT, read_audio, resample
from tools import bar_options

# ------------------------------------------------------------------------------- the three sources


class Row(NamedTuple):
    """An utterance as a source describes it."""

    where: str  # "file:line"
    audio: str  # path
    name: str
    text: str
    speaker: str  # "" if the source does not tell
    start_s: float = 0.0
    duration_s: float = math.inf  # to the end of the recording

    @property
    def times(self) -> str:
        end_s = self.start_s + self.duration_s
        return f"from {self.start_s:g} s" + ("" if end_s == math.inf else f" to {end_s:g} s")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields "file:line" and the text of every line that is not blank.

    A byte order mark and carriage returns are removed. Bytes that are not UTF-8 become surrogates:
    file names may have them.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n")


def read_json_lines(path: Path) -> Iterator[Row | Problem]:
    """Yields the rows of NeMo's manifest; null is as good as no value."""
    for where, line in read_lines(path):
        try:
            item = {key: x for key, x in json.loads(line).items() if x is not None}
            audio, text = item["audio_filepath"], item.get("text", "")
            row = Row(where, audio, Path(audio).stem, text if isinstance(text, str) else "",
                      str(item.get("speaker", "")), float(item.get("offset", 0)),
                      float(item.get("duration", math.inf)))
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            message = f"expected a JSON object with audio_filepath and text: {line[:80]!r}"
            yield Problem("error", "line not readable", where, message)
        else:
            yield row


def read_tsv(path: Path) -> Iterator[Row | Problem]:
    """Yields the rows of Common Voice's table."""
    lines = read_lines(path)
    columns = next(lines)[1].split("\t")
    for where, line in lines:
        cells = line.split("\t")  # Common Voice quotes nothing
        if len(cells) != len(columns):
            message = f"{len(cells)} columns, expected {len(columns)} as in the first line"
            yield Problem("error", "line not readable", where, message)
            continue
        row = dict(zip(columns, cells, strict=True))
        yield Row(where, row["path"], Path(row["path"]).stem, row["sentence"],
                  row.get("client_id", ""))


def read_table(path: Path, problems: list[Problem]) -> dict[str, tuple[str, str]]:
    """Maps the first word of every line of a Kaldi file to "file:line" and the rest of the line."""
    table: dict[str, tuple[str, str]] = {}
    for where, line in read_lines(path) if path.is_file() else ():
        key, *rest = line.split(maxsplit=1)
        if key in table:
            message = f"{key} has a line already"
            problems.append(Problem("error", "duplicate id", where, message))
        else:
            table[key] = where, "".join(rest).strip()
    return table


def read_kaldi(folder: Path) -> Iterator[Row | Problem]:
    """Yields the utterances of Kaldi's data folder, then the problems of its files."""
    problems: list[Problem] = []
    recordings, texts, segments, speakers = (
        read_table(folder / name, problems) for name in ("wav.scp", "text", "segments", "utt2spk"))
    if not segments:  # every recording is an utterance; an end of -1 is that of the recording
        segments = {key: (where, f"{key} 0 -1") for key, (where, _) in recordings.items()}
    for key, (where, segment) in segments.items():
        try:
            recording, start, end = segment.split()
            start_s, end_s = float(start), float(end)
        except ValueError:
            message = f"expected a recording, start and end in seconds: {segment!r}"
            problems.append(Problem("error", "line not readable", where, message))
            continue
        _, audio = recordings.get(recording, ("", ""))
        if not audio or audio.endswith("|"):
            message = (f"{recording}: {audio!r} is a command, expected a file" if audio
                       else f"{recording} has no file in wav.scp")
            problems.append(Problem("error", "audio missing", where, message))
            continue
        _, text = texts.get(key, ("", ""))
        _, speaker = speakers.get(key, ("", ""))
        yield Row(where, audio, key, text, speaker, start_s,
                  math.inf if end_s < 0 else end_s - start_s)
    for key in texts:
        if key not in segments:
            message = f"{key} has no line in segments or wav.scp"
            problems.append(Problem("error", "audio missing", texts[key][0], message))
    yield from problems


def read_source(source: Path) -> tuple[Iterator[Row | Problem], Path]:
    """Returns the rows of a source, and the folder at which its relative paths start.

    Raises:
        ValueError: it has none of the three forms.
    """
    if source.is_dir():
        names = sorted(path.name for path in source.iterdir())
        if {"wav.scp", "text"} <= set(names):
            return read_kaldi(source), source
        found = f"a folder with {', '.join(names[:5]) or 'no file'}"
    else:
        _, first = next(read_lines(source), ("", ""))
        if '"audio_filepath"' in first:
            return read_json_lines(source), source.parent
        if {"path", "sentence"} <= set(first.split("\t")):
            clips = source.parent / "clips"
            return read_tsv(source), clips if clips.is_dir() else source.parent
        found = f"a file that begins with {first[:60]!r}"
    raise ValueError(
        f"{source}: found {found}; looked for JSON lines with audio_filepath (NeMo), tab-separated "
        "values with columns path and sentence (Common Voice), a folder with wav.scp and text "
        "(Kaldi)")


# ------------------------------------------------------------------------- what becomes of a row


class Clip(NamedTuple):
    """An utterance as it is written."""

    row: Row
    audio: Path
    path: Path  # of the FLAC file; its name without suffix is the utterance id
    text: str  # normalised


class TextRule(NamedTuple):
    """How texts are normalised."""

    keep_case: bool
    keep_punctuation: bool

    def __str__(self) -> str:
        case = "case kept" if self.keep_case else "in capitals"
        punctuation = "punctuation kept" if self.keep_punctuation else (
            "punctuation and symbols become spaces, but for apostrophes within words")
        return f"Unicode NFC, one space between words, {case}, {punctuation}"

    def apply(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        text = "".join(" " if unicodedata.category(c) == "Cc" or c == "\ufeff" else c for c in text)
        if not self.keep_punctuation:
            text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text.replace("\u2019", "'"))
            text = "".join(" " if c != "'" and unicodedata.category(c)[0] in "PS" else c
                           for c in text)
        if not self.keep_case:
            text = unicodedata.normalize("NFC", text.upper())
        return " ".join(text.split())


def safe(name: str) -> str:
    """Reduces a name to letters, digits and `_`: no path leads outside, and ids split at `-`."""
    return re.sub(r"\W+", "_", unicodedata.normalize("NFC", name))[:28]  # names have 255 bytes


def locate(audio: str, folder: Path) -> Path:
    """Returns the path of a recording; a relative one starts at `folder`.

    Raises:
        ValueError: a relative path leads outside, or there is no such file.
    """
    path = Path(os.path.normpath(audio))
    if path.parts[:1] == ("..",):
        raise ValueError(f"{audio!r} leads outside of {folder}")
    path = folder / path
    if not os.path.isfile(path):  # a pipe or device would be read for ever
        raise ValueError(f"{str(path)!r} is not there, or no file")
    return path


def plan(row: Row, folder: Path, split: Path, rule: TextRule) -> Clip | Problem:
    """Finds the recording of a row, and its id and text in the split; a problem leaves it out."""
    try:
        audio = locate(row.audio, folder)
    except ValueError as error:
        return Problem("error", "audio missing", row.where, str(error))
    if not (0 <= row.start_s < math.inf and row.duration_s > 0):
        return Problem("error", "times not valid", row.where, row.times)
    text = rule.apply(row.text)
    if not text:
        return Problem("error", "no text", row.where, f"no word in {row.text!r}")
    if any(unicodedata.category(c) == "Cs" for c in text):
        return Problem("error", "text not UTF-8", row.where, repr(text))
    speaker = safe(row.speaker) or safe(split.name)
    key = repr((row.audio, row.name, row.start_s, row.duration_s)).encode()
    name = f"{safe(row.name)}_{hashlib.sha256(key).hexdigest()[:8]}"
    path = split / speaker / "1" / f"{speaker}-1-{name}.flac"
    error = line_error(f"{path.stem} {text}", path)
    if error is not None:
        kind, message = error
        return Problem("error", kind, row.where, message)
    return Clip(row, audio, path, text)


def plan_all(rows: Iterator[Row | Problem], folder: Path, split: Path,
             rule: TextRule) -> Iterator[Clip | Problem]:
    """Plans every row; a row that repeats an earlier one is a problem."""
    first: dict[Path, str] = {}
    for row in rows:
        item = row if isinstance(row, Problem) else plan(row, folder, split, rule)
        if isinstance(item, Clip):
            where = first.setdefault(item.path, item.row.where)
            if where != item.row.where:
                item = Problem("error", "duplicate id", item.row.where, f"{where} is the same")
        yield item


# ------------------------------------------------------------------------------------- the writing

OVERSHOOT_S = 0.5  # an end may lie beyond that of the recording by so much, as in Kaldi


def write_whole(path: Path, contents: bytes) -> None:
    """Writes a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(contents)
    os.replace(part, path)


def cut(samples: np.ndarray, rate: int, row: Row) -> np.ndarray:
    """Cuts the samples of a row out of its recording: (n,) at `rate` -> int16 (m,) at 16 kHz.

    Raises:
        ValueError: the row lies beyond the end of the recording.
    """
    end_s, row_end_s = len(samples) / rate, row.start_s + row.duration_s
    if row.start_s >= end_s or end_s + OVERSHOOT_S < row_end_s < math.inf:
        raise ValueError(f"{row.times}, but the recording ends at {end_s:.2f} s")
    piece = samples[round(row.start_s * rate) : round(min(row_end_s, end_s) * rate)]
    if len(piece) == 0:
        raise ValueError(f"no sample {row.times}")
    if rate != DEFAULT.sample_rate_hz:
        piece = resample(piece, rate, DEFAULT.sample_rate_hz)
    return np.clip(np.rint(piece * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def write_clips(clips: Sequence[Clip]) -> Iterator[Clip | Problem]:
    """Writes the clips of one recording that are not there yet; yields each, or its problem."""
    missing = []
    for clip in clips:
        if clip.path.exists():
            yield clip
        else:
            missing.append(clip)
    if not missing:
        return
    try:
        samples, rate = read_audio(missing[0].audio)
    except (OSError, ValueError) as error:
        for clip in missing:
            yield Problem("error", "audio not readable", clip.row.where, str(error))
        return
    if samples.ndim == 2:
        samples = samples.mean(1)
    for clip in missing:
        try:
            piece = cut(samples, rate, clip.row)
        except ValueError as error:
            message = f"{clip.audio}: {error}"
            yield Problem("error", "times not valid", clip.row.where, message)
            continue
        flac = io.BytesIO()
        soundfile.write(flac, piece, DEFAULT.sample_rate_hz, format="FLAC")
        write_whole(clip.path, flac.getvalue())
        yield clip


def write_transcripts(split: Path, clips: Sequence[Clip]) -> None:
    """Writes the transcript of every chapter anew; that of a chapter without a clip is empty."""
    texts = {path: "" for path in split.glob("*/*/*.trans.txt")}  # of an earlier import
    for clip in sorted(clips, key=lambda clip: clip.path.name):
        chapter = clip.path.parent
        path = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        texts[path] = texts.get(path, "") + f"{clip.path.stem} {clip.text}\n"
    for path, text in texts.items():
        write_whole(path, text.encode())


def claim(split: Path, source: Path) -> None:
    """Makes the folder of a split, with the path of its source in source.txt.

    Raises:
        FileExistsError: it holds something other than an import of `source`.
    """
    note, line = split / "source.txt", os.fsencode(f"{source.absolute()}\n")
    split.mkdir(parents=True, exist_ok=True)
    if any(split.iterdir()) and not (note.is_file() and note.read_bytes() == line):
        raise FileExistsError(f"{split}: holds something other than an import of {source}; choose "
                              "another split")
    note.write_bytes(line)


def import_split(source: Path, root: Path, split: str, rule: TextRule) -> bool:
    """Writes the utterances of a source to `root`/`split`; returns True if none is left out.

    Raises:
        ValueError: the source has none of the three forms, or no utterance.
        FileExistsError: the split holds something else.
        OSError: a file cannot be read or written.
    """
    if split in ("", "..") or split != Path(split).name:
        raise ValueError(f"split {split!r}, expected the name of one folder")
    rows, folder = read_source(source)
    print(f"text: {rule}")
    clips, problems = separate(plan_all(rows, folder, root / split, rule))
    if not clips and not problems:
        raise ValueError(f"{source}: no utterance in it")
    claim(root / split, source)
    recordings = [list(group) for _, group in itertools.groupby(clips, key=lambda c: c.audio)]
    written: list[Clip] = []
    with (
        ThreadPoolExecutor() as pool,
        # Ctrl-C closes the iterator, which cancels what no thread has begun.
        closing(pool.map(lambda clips: list(write_clips(clips)), recordings)) as results,
        tqdm(desc=split, unit="utterance", total=len(clips), **bar_options()) as bar,
    ):
        for result in results:
            done, failed = separate(result)
            written += done
            problems += failed
            bar.update(len(result))
    write_transcripts(root / split, written)
    for line in describe_problems(problems, most=len(problems)):
        print(line)
    print(f"{root / split}: {len(written):,} utterances, {len(problems):,} left out")
    return not problems
