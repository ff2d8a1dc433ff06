# SPDX-License-Identifier: Apache-2.0
"""From a corpus to batches: read and check splits, tokenize, bucket, load in worker processes.

    utterances = read_split("corpora", "train-clean-5")
    tokenizer = Tokenizer(train_tokenizer((u.text for u in utterances), vocab_size=256))
    dataset = SpeechDataset(utterances, tokenizer, DEFAULT, seed=1, epoch=1)
    order = bucket_batches(dataset.durations_s(), 32, DEFAULT.num_buckets, np.random.default_rng(1))
    for batch in batch_loader(dataset, order, num_workers=1): ...

Corpora have LibriSpeech's form (docs/corpora.md):
    <root>/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac
    <root>/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt    lines `<id> <TEXT>`
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from features import (
    DEFAULT,
    FeatureConfig,
    Layout,
    count_samples,
    draw_layout,
    features,
    is_audio,
    load_audio,
    open_audio,
    read_audio,
)

# ----------------------------------------------------------------------------------------- corpora


class Utterance(NamedTuple):
    """One recording of a split and its text."""

    id: str
    path: str
    duration_s: float  # from the file's header
    text: str


class Line(NamedTuple):
    """One good line of a transcript file."""

    where: str  # "file:line"
    id: str
    text: str


class Problem(NamedTuple):
    """A defect of a corpus. Training does not start on a split with errors."""

    level: str  # "error" or "warning"
    kind: str  # problems are counted by kind
    where: str  # "file:line", a file, a folder or an utterance id
    message: str


def separate(found: Iterable) -> tuple[list, list[Problem]]:
    """Splits a mixed sequence into its good items and its problems, both in order."""
    good, problems = [], []
    for item in found:
        (problems if isinstance(item, Problem) else good).append(item)
    return good, problems


def is_transcript(name: str) -> bool:
    return name.endswith(".trans.txt") and not name.startswith("._")


# Editors and other systems leave these characters: their names and the command that removes them.
REPAIRS = {
    "\r": ("a carriage return (CRLF), expected LF alone", r"sed -i 's/\r$//'"),
    "\t": ("a tab, expected a space", r"sed -i 's/\t/ /g'"),
    "\ufeff": ("a byte order mark, expected none", r"sed -i '1s/^\xEF\xBB\xBF//'"),
}
IMPORT_HINT = "docs/corpora.md tells how to import other forms"


def line_error(line: str, path: Path) -> tuple[str, str] | None:
    """Kind and message of the error in a line of the transcript `path`, if it has one."""
    for character, (name, command) in REPAIRS.items():
        if character in line:
            remedy = f"{command} {shlex.quote(str(path))}"
            return "control character", f"{line!r} has {name}; remedy: {remedy}"
    if any(unicodedata.category(c) == "Cc" for c in line):
        return "control character", f"{line!r} has a control character; remove it"
    utterance_id, _, text = line.partition(" ")
    if not text.strip():
        return "no text", f"{line!r} has no text after an id and a space"
    if {"<s>", "</s>", "<unk>", "#0"} & set(text.split()) or "\u2581" in text:
        return "reserved word", f"{line!r} has a word that sentencepiece reserves"
    prefix = f"{path.parent.parent.name}-{path.parent.name}-"
    if not utterance_id.startswith(prefix):
        return "id not of its folder", f"{utterance_id!r} does not begin with {prefix}"
    return None


def read_transcripts(path: Path) -> Iterator[Line | Problem]:
    """Lines of a .trans.txt, each good or a problem.

    Texts are in Unicode's form NFC, so that an accented letter has one spelling.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        yield Problem("error", "transcript not readable", str(path), str(error))
        return
    if lines[-1] == "":  # the last line ends in a newline
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        error = line_error(line, path)
        if error is not None:
            kind, message = error
            yield Problem("error", kind, where, message)
            continue
        utterance_id, _, text = line.partition(" ")
        if any(c.isdigit() for c in text):
            yield Problem("warning", "digits", where, f"{line!r} is not written out")
        yield Line(where, utterance_id, unicodedata.normalize("NFC", " ".join(text.split())))


def list_files(split: Path) -> Iterator[Path | Problem]:
    """Audio and transcripts in the chapters of a split; such files elsewhere are problems."""
    errors: list[OSError] = []
    for parent, folders, names in os.walk(split, onerror=errors.append, followlinks=True):
        ignored = wanted = [name for name in names if is_audio(name) or is_transcript(name)]
        if len(Path(parent).relative_to(split).parts) == 2:  # <speaker>/<chapter>
            yield from (Path(parent, name) for name in wanted)
            ignored = folders.copy()
            folders.clear()  # os.walk does not enter them, so that a loop of links ends
        for name in sorted(ignored):
            where = str(Path(parent, name))
            yield Problem("warning", "not a file of a chapter", where, "it is ignored")
    for error in errors:
        yield Problem("error", "folder not readable", error.filename, error.strerror)


def find_duplicates(audio: Iterable[Path]) -> Iterator[Problem]:
    """An error for every further recording of one utterance id."""
    first: dict[str, Path] = {}
    for path in audio:
        other = first.setdefault(path.stem, path)
        if other != path:
            message = f"{other} and {path} have one id"
            yield Problem("error", "duplicate recording", path.stem, message)


def match_texts(audio: Sequence[Path],
                transcripts: Sequence[Path]) -> Iterator[Utterance | Problem]:
    """Joins audio files with the lines of their chapters' transcripts; durations are 0 as yet."""
    for chapter in sorted({path.parent for path in audio} - {path.parent for path in transcripts}):
        others = sorted(path.name for path in chapter.iterdir() if not is_audio(path.name))
        transcript = f"{chapter.parent.name}-{chapter.name}.trans.txt"
        found = " and ".join(["audio", *others[:1]])
        message = f"found {found}, expected {transcript}; {IMPORT_HINT}"
        yield Problem("error", "transcript file missing", str(chapter), message)
    recordings = {path.with_suffix(""): path for path in reversed(audio)}  # the first file wins
    seen: set[str] = set()
    for transcript in transcripts:
        for line in read_transcripts(transcript):
            if isinstance(line, Problem):
                yield line
            elif line.id in seen:
                yield Problem("error", "duplicate id", line.where, f"{line.id} has a line already")
            elif (key := transcript.parent / line.id) not in recordings:
                yield Problem("error", "audio missing", line.where, f"{key}.flac does not exist")
            else:
                seen.add(line.id)
                yield Utterance(line.id, str(recordings[key]), 0.0, line.text)
    for path in audio:
        if path.stem not in seen:
            message = f"{path} has no transcript"
            yield Problem("warning", "transcript missing", path.stem, message)


def verify_md5(path: str) -> None:
    """Raises ValueError if the samples of a FLAC file do not have the MD5 that its header states.

    libsndfile decodes some damaged frames without an error. The header holds the MD5 of the
    interleaved samples, little-endian integers of whole bytes; zeros mean that it is not set
    (RFC 9639, section 8.2).
    """
    with open(path, "rb") as file:
        head = file.read(42)  # "fLaC", 4 bytes before the block STREAMINFO, its 34 bytes
    stated = head[26:]
    if not head.startswith(b"fLaC") or not any(stated):
        return
    bits = ((head[20] & 1) << 4 | head[21] >> 4) + 1  # bits of a sample
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with open_audio(path) as audio:
            # libsndfile shifts samples to the most significant bits of int32.
            while len(block := audio.read(2**16, dtype="int32", always_2d=True)):
                octets = (block >> 32 - bits).astype("<i4").view(np.uint8).reshape(-1, 4)
                digest.update(octets[:, : -(-bits // 8)].tobytes())
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: damaged audio: {error.error_string}") from error
    if digest.digest() != stated:
        raise ValueError(f"{path}: damaged audio: the MD5 of its samples is {digest.hexdigest()}, "
                         f"its header states {stated.hex()}")


SHORTEST_S = 0.1  # a shorter recording holds no word


def probe_audio(utterance: Utterance, cfg: FeatureConfig,
                decode: bool) -> list[Utterance | Problem]:
    """The utterance with its duration, if its file can be used, and the problems of the file.

    Reads the header and the last sample; with `decode`, every sample, and verifies FLAC's MD5.
    """
    path = utterance.path
    try:
        with open_audio(path) as audio:
            frames, rate, channels = count_samples(audio), audio.samplerate, audio.channels
        samples = read_audio(path)[0] if decode else np.zeros(0)
        if decode:
            verify_md5(path)
    except (OSError, ValueError) as error:
        return [Problem("error", "audio not readable", utterance.id, str(error))]
    warned = []
    if len(samples) > 1 and samples.min() == samples.max():
        warned.append(("constant audio", f"{path}: every sample is {samples.max():g}"))
    if frames < SHORTEST_S * rate:
        warned.append(("short recording", f"{path}: {frames / rate:.3f} s"))
    if rate != cfg.sample_rate_hz:
        message = f"{path}: {rate} Hz, will be resampled to {cfg.sample_rate_hz}"
        warned.append(("sample rate", message))
    if channels != 1:
        warned.append(("channels", f"{path}: {channels} channels, will be averaged"))
    problems = [Problem("warning", kind, utterance.id, message) for kind, message in warned]
    return [utterance._replace(duration_s=frames / rate), *problems]


SEARCHED_FOLDERS = 1000  # describe_layout lists this many at most: slow disks answer soon


def describe_layout(folder: Path) -> str:
    """Says what lies below a folder that should hold a split, and the remedy.

    A corpus may have been named one level too high or too low, or it has another form.
    """
    if not folder.is_dir():
        return f"there is no folder {folder}"
    walk = itertools.islice(os.walk(folder.absolute(), followlinks=True), SEARCHED_FOLDERS)
    files = sorted(Path(parent, name) for parent, _, names in walk for name in names)
    splits = {path.parents[2] for path in files if len(path.parents) > 2
              and path.name == f"{path.parts[-3]}-{path.parts[-2]}.trans.txt"}
    if splits:
        corpus = min(splits).parent
        names = ", ".join(sorted(split.name for split in splits if split.parent == corpus))
        return f"the corpus to name is {corpus}, with the splits {names}"
    audio = [str(path) for path in files if is_audio(path.name)]
    if not audio:
        return f"found no audio below {folder}"
    texts = [str(path) for path in files if path.suffix in (".txt", ".tsv", ".csv", ".json")]
    found = " and ".join((*audio[:1], *texts[:1]))
    return f"found {found}, expected <split>/<speaker>/<chapter>/*.trans.txt; {IMPORT_HINT}"


def scan_split(root: str | Path, split: str, cfg: FeatureConfig = DEFAULT,
               decode: bool = False) -> Iterator[Utterance | Problem]:
    """All good utterances of a split, ordered by id, and all its problems.

    Reads transcripts and audio headers at every call; with `decode`, all audio.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        message = f"no such folder; {describe_layout(Path(root))}"
        yield Problem("error", "split missing", str(folder), message)
        return
    files, problems = separate(list_files(folder))
    audio = sorted(path for path in files if is_audio(path.name))
    transcripts = sorted(path for path in files if is_transcript(path.name))
    problems += find_duplicates(audio)
    recordings, unmatched = separate(match_texts(audio, transcripts))
    problems += unmatched
    if not recordings and not any(p.level == "error" for p in problems):
        message = "it has no utterance in */*/*.trans.txt"
        if not transcripts:
            message += f"; {describe_layout(folder)}"
        problems.append(Problem("error", "split empty", str(folder), message))
    yield from problems
    utterances: list[Utterance] = []
    with (
        ThreadPoolExecutor() as pool,  # threads hide the latency of network file systems
        # Ctrl-C closes the iterator, which cancels what no thread has begun.
        contextlib.closing(pool.map(lambda u: probe_audio(u, cfg, decode), sorted(recordings)))
        as probes,
    ):
        for found in tqdm(probes, desc=split, unit="file", total=len(recordings), disable=None,
                          leave=False):
            utterances += (item for item in found if isinstance(item, Utterance))
            yield from found
    small = [u for u in utterances if u.text != u.text.upper()]
    if len(small) < len(utterances):  # a corpus in small letters throughout is consistent
        yield from (Problem("warning", "small letters", u.id, u.text) for u in small)


def describe_problems(problems: Sequence[Problem], most: int = 10) -> list[str]:
    """Lines for people: every kind with its count, and the first `most` problems of each kind."""
    lines = []
    for (level, kind), count in Counter((p.level, p.kind) for p in problems).items():
        lines.append(f"{level}: {kind}: {count}")
        chosen = [p for p in problems if (p.level, p.kind) == (level, kind)]
        lines += [f"    {p.where}: {p.message}" for p in chosen[:most]]
        if count > most:
            lines.append(f"    ... and {count - most} more")
    return lines


def read_split(root: str | Path, split: str, cfg: FeatureConfig = DEFAULT,
               skip_bad: bool = False) -> list[Utterance]:
    """Utterances of a split that has no errors; problems that are warnings are warned of.

    With `skip_bad`, errors are warned of too, and the utterances they concern are left out.

    Raises:
        ValueError: with every kind of error, counted, and the first ten of each; with `skip_bad`
            only if no utterance is left.
    """
    utterances, problems = separate(scan_split(root, split, cfg))
    errors = [p for p in problems if p.level == "error"]
    if errors and not (skip_bad and utterances):
        raise ValueError("\n".join([f"{root}/{split} cannot be used:", *describe_problems(errors)]))
    if errors:
        warnings.warn(f"{split}: {len(errors)} errors; the utterances they concern are left out",
                      stacklevel=2)
    for line in describe_problems(problems, most=1):
        message = line.strip().removeprefix("warning: ")
        warnings.warn(f"{split}: {message}", stacklevel=2)
    return utterances


def drop_long(utterances: Sequence[Utterance],
              cfg: FeatureConfig = DEFAULT) -> tuple[list[Utterance], str]:
    """The utterances of at most `max_utterance_s`, and a line that counts the others."""
    kept = [u for u in utterances if u.duration_s <= cfg.max_utterance_s]
    hours = (sum(u.duration_s for u in utterances) - sum(u.duration_s for u in kept)) / 3600
    dropped = len(utterances) - len(kept)
    note = f"{dropped:,} of {len(utterances):,} dropped, {hours:.1f} h"
    if not kept:
        raise ValueError(f"no training utterance of at most {cfg.max_utterance_s} s: {note}")
    return kept, note


def load_corpus(root: str | Path, train_splits: Sequence[str], dev_split: str, cfg: FeatureConfig,
                skip_bad: bool,
                say: Callable[[str], None]) -> tuple[list[Utterance], list[Utterance]]:
    """Training utterances of all splits without those that are too long, and the dev split.

    Args:
        skip_bad: leave bad utterances of the training splits out. The dev split must be whole: a
            WER without some utterances is another measure.
        say: prints a line.
    Raises:
        ValueError: with the errors of all splits.
    """
    found, errors = [], []
    for split in (*train_splits, dev_split):
        try:
            found.append(read_split(root, split, cfg, skip_bad and split != dev_split))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("\n".join(errors))
    *parts, dev = found
    train, note = drop_long([u for part in parts for u in part], cfg)
    for name, utterances in (("train", train), ("dev", dev)):
        hours = sum(u.duration_s for u in utterances) / 3600
        say(f"{name}: {len(utterances):,} utterances, {hours:.2f} h")
    say(f"train: longer than {cfg.max_utterance_s} s: {note}")
    return train, dev


def describe_corpus(utterances: Iterable[Utterance]) -> str:
    """Number and checksum of the utterances: equal for equal corpora."""
    facts = sorted((u.id, u.duration_s, u.text) for u in utterances)
    return f"{len(facts)} utterances, sha256 {hashlib.sha256(repr(facts).encode()).hexdigest()}"


# --------------------------------------------------------------------------------------- tokenizer


SPACE = "\u2581"  # sentencepiece's sign for the space before a word


class Tokenizer:
    """Sentencepiece unigram model (arXiv:1808.06226) with one more class, the last, for blank.

    Args:
        model: the serialised sentencepiece model, as `train_tokenizer` returns it.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.pieces.get_piece_size() + 1
        self.blank = self.vocab_size - 1

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for characters that the training transcripts did not have."""
        ids = self.pieces.encode(text)
        if self.pieces.unk_id() in ids:
            unknown = [p for p, i in zip(self.pieces.encode(text, out_type=str), ids, strict=True)
                       if i == self.pieces.unk_id()]
            raise ValueError(f"{text!r}: the tokenizer has no piece for {''.join(unknown)!r}")
        return ids

    def encode_characters(self, text: str) -> list[int]:
        """One label for every character, and one for the space before every word."""
        return [self.pieces.piece_to_id(c) for word in text.split() for c in SPACE + word]

    def decode(self, ids: Sequence[int]) -> str:
        return self.pieces.decode(list(ids))

    def starts_word(self, id_: int) -> bool:
        return self.pieces.id_to_piece(id_).startswith(SPACE)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Sentencepiece model of `vocab_size - 1` pieces, or of fewer if the texts hold no more.

    Raises:
        ValueError: there are more characters than pieces, and each character needs one.
    """
    texts = list(texts)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
            vocab_size=vocab_size - 1, hard_vocab_limit=False, character_coverage=1.0,
            bos_id=-1, eos_id=-1, num_threads=1, minloglevel=2,
            normalization_rule_name="identity",  # pieces of a text spell that text
            max_sentence_length=max(10, *(len(t.encode()) + 1 for t in texts)),
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size: {vocab_size}, blank included: {error}") from error
    return model.getvalue()


def check_texts(train: Sequence[Utterance], dev: Sequence[Utterance], tokenizer: Tokenizer,
                frame_s: float, say: Callable[[str], None]) -> None:
    """Refuses training texts that the tokenizer cannot spell.

    Warns of texts with more labels than encoder frames, and of characters of the dev texts that the
    tokenizer does not know.

    Args:
        frame_s: seconds of an encoder frame.
        say: prints a line.
    Raises:
        ValueError: with the ids of the utterances that the tokenizer cannot express.
    """
    crowded, problems = 0, []
    for utterance in train:
        try:
            crowded += len(tokenizer.encode(utterance.text)) > utterance.duration_s / frame_s
        except ValueError as error:
            problems.append(Problem("error", "text", utterance.id, str(error)))
    if problems:
        raise ValueError("\n".join(["texts cannot be used:", *describe_problems(problems)]))
    if crowded:
        say(f"warning: {crowded:,} of {len(train):,} training utterances have more labels than "
            f"encoder frames of {1000 * frame_s:.0f} ms")
    pieces = tokenizer.pieces
    unknown = [c for c in sorted(set().union(*(u.text for u in dev)))
               if pieces.unk_id() in pieces.encode(c)]
    if unknown:
        say(f"warning: the tokenizer does not know the characters {''.join(unknown)!r} of the dev "
            "texts: words with them will be errors")


# ---------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Features and labels of B utterances, padded with zeros."""

    feats: Tensor  # (B, T_in, D)
    feat_lens: Tensor  # (B,)
    targets: Tensor  # (B, U)
    target_lens: Tensor  # (B,)
    chars: Tensor  # (B, chars) the same texts, a label for every character
    char_lens: Tensor  # (B,)
    ids: list[str]
    num_requested: int  # utterances of the batch before `skip_bad` left any out


def bucket_batches(durations_s: Sequence[float], global_batch: int, num_buckets: int,
                   rng: np.random.Generator) -> np.ndarray:
    """One epoch's order: (batches, global_batch) distinct indices.

    Utterances are sorted by duration, split into buckets and shuffled inside; a batch at the border
    of two buckets holds utterances of both. A random remainder that does not fill a batch is
    dropped, then the batches are shuffled. Rank r of W takes columns
    r, r + W, ... of every row, so all ranks have equally many batches. The sampler is the
    original's (common/data/dali/sampler.py); the remainder is as in mlcommons/training #460.
    """
    buckets = np.array_split(np.argsort(durations_s, kind="stable"), num_buckets)
    order = np.concatenate([rng.permutation(bucket) for bucket in buckets])
    if len(order) < global_batch:
        raise ValueError(f"{len(order)} training utterances, fewer than a batch of {global_batch}")
    remainder = rng.choice(len(order), len(order) % global_batch, replace=False)
    batches = np.delete(order, remainder).reshape(-1, global_batch)
    return rng.permutation(batches, axis=0)


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances to (features, label ids, utterance), augmented if `seed` is given.

    Without a tokenizer they have no labels. `strength`, from 0 to 1, is that of the augmentation.
    With `skip_bad` an utterance that cannot be read is left out of its batch.

    The random numbers of an utterance depend on (seed, epoch, index) alone, so they are the
    same for any number of ranks, workers and restarts. An utterance whose recording becomes empty
    has no labels in that epoch.
    """

    def __init__(self, utterances: Sequence[Utterance], tokenizer: Tokenizer | None,
                 cfg: FeatureConfig, seed: int | None = None, epoch: int = 0,
                 skip_bad: bool = False, strength: float = 1.0) -> None:
        self.utterances, self.tokenizer, self.cfg = utterances, tokenizer, cfg
        self.seed, self.epoch, self.skip_bad = seed, epoch, skip_bad
        self.strength = strength

    def __len__(self) -> int:
        return len(self.utterances)

    def rng(self, index: int) -> np.random.Generator | None:
        if self.seed is None:
            return None
        return np.random.default_rng((self.seed, self.epoch, index))

    def layout(self, index: int) -> Layout:
        if self.seed is None:
            return Layout()
        return draw_layout(self.rng(index), self.cfg, self.strength)

    def durations_s(self) -> list[float]:
        """Durations with this epoch's speed perturbation and added background, before trimming.

        Buckets of similar perturbed durations need less padding than those of recorded ones.
        """
        layouts = map(self.layout, range(len(self)))
        return [layout.speed * u.duration_s + layout.before_s + layout.after_s
                for u, layout in zip(self.utterances, layouts, strict=True)]

    def labels(self, index: int) -> tuple[list[int], list[int]]:
        """Label ids of the pieces and of the characters of an utterance's text."""
        tokenizer, text = self.tokenizer, self.utterances[index].text
        if tokenizer is None or self.layout(index).is_empty:
            return [], []
        return tokenizer.encode(text), tokenizer.encode_characters(text)

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], list[int], Utterance] | None:
        """Features, labels and utterance; None for a file that `skip_bad` leaves out."""
        utterance = self.utterances[index]
        try:
            samples = load_audio(utterance.path, self.cfg)
            feats = features(samples, self.cfg, self.rng(index), self.strength)
        except (OSError, ValueError) as error:
            if not self.skip_bad:
                raise
            warnings.warn(f"left out: {error}", stacklevel=1)
            return None
        return feats, *self.labels(index), utterance


def pad_labels(labels: Sequence[list[int]], cfg: FeatureConfig) -> tuple[Tensor, Tensor]:
    """B lists of label ids -> (B, U) padded, (B,) their lengths."""
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in labels]
    padded = pad_sequence(rows, batch_first=True)
    padded = F.pad(padded, (0, -padded.shape[1] % cfg.round_labels))
    return padded, torch.tensor([len(ids) for ids in labels])


def collate(items: Sequence[tuple | None], cfg: FeatureConfig = DEFAULT) -> Batch:
    """Pads to the longest item, rounded up: oneDNN builds its kernels once per shape."""
    good = [item for item in items if item is not None]
    if not good:
        raise ValueError("none of the utterances of a batch can be read, as the warnings say; "
                         "python -m tools.prepare check finds all such files")
    feats, labels, chars, utterances = zip(*good, strict=True)
    feat_lens = torch.tensor([len(f) for f in feats])
    padded = pad_sequence(feats, batch_first=True)
    padded = F.pad(padded, (0, 0, 0, -padded.shape[1] % cfg.round_frames))
    return Batch(padded, feat_lens, *pad_labels(labels, cfg), *pad_labels(chars, cfg),
                 [u.id for u in utterances], len(items))


# ------------------------------------------------------------------------------- worker processes


def keep_memory() -> None:
    """Makes glibc keep freed memory: returning it costs page faults at the next utterance. Other
    allocators do not have the function or ignore it."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest value


def start_worker(_worker: int) -> None:
    """Gives a worker process the lowest priority and its parent's CPUs; signals that stop a run do
    not reach it."""
    # A worker that takes a core for a moment keeps all threads of the training process waiting at
    # their next OpenMP barrier; an LSTM has one barrier per frame.
    os.nice(19)
    keep_memory()
    if hasattr(os, "sched_setaffinity"):
        # A worker inherits the CPUs of the thread that starts it, and OpenMP may have bound that
        # thread to one CPU. The worker takes those of all threads of the training process.
        cpus = os.sched_getaffinity(0)
        for thread in os.listdir(f"/proc/{os.getppid()}/task"):
            with contextlib.suppress(ProcessLookupError):  # the thread has just ended
                cpus |= os.sched_getaffinity(int(thread))
        os.sched_setaffinity(0, cpus)
    # Batch systems signal all processes of a job; training still needs workers for its last step.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # read_split has already warned of channels and rates: silence the repeats from workers.
    warnings.filterwarnings("ignore", message="audio of ")


def error_message(error: Exception) -> str:
    """The message of an error. A worker's error quotes a traceback that ends in the message."""
    text = str(error).strip()
    return text.splitlines()[-1] if text.startswith("Caught ") else text


def warning_line(message: Warning | str, *_place: object) -> str:
    """A warning as scripts print it: Python's own line also quotes the source."""
    return f"warning: {message}\n"


@atexit.register
def end_workers() -> None:
    """Kills workers at exit; multiprocessing would send SIGTERM, which they ignore, and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


POLL_S = 5  # timeout of the DataLoader, so that a dead worker is noticed


def next_batch(loader: Iterator[Batch], timeout_s: float) -> Batch:
    """The next batch of a DataLoader that times out every POLL_S; raises as batch_loader does."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return next(loader)
        except (RuntimeError, ConnectionError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader "):
                raise  # the dataset raised it
            timed_out = str(error).startswith("DataLoader timed out")
            if timed_out and time.monotonic() < until:
                continue
            why = f"none came for {timeout_s:g} s" if timed_out else "a worker process was killed"
            raise OSError(f"no batch: {why}. Memory or /dev/shm may be full (docker run "
                          "--shm-size), or the disk does not answer; train.py --loader-workers 0 "
                          "prepares batches without worker processes") from error


def batch_loader(dataset: SpeechDataset, batches: Sequence[Sequence[int]], num_workers: int,
                 timeout_s: float = 600.0) -> Iterator[Batch]:
    """Batches in the given order, prepared ahead of time by worker processes.

    Raises:
        OSError: a worker was killed, or no batch came for `timeout_s`.
    """
    on_child = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL  # None: not set from Python
    with warnings.catch_warnings():
        # torch advises against more workers than cores, but they have the lowest priority.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = iter(torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            # start_worker and make_tables rely on a copy of this process, as Python made it before
            # version 3.14.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            prefetch_factor=4 if num_workers else None,
            timeout=POLL_S if num_workers else 0,
            collate_fn=functools.partial(collate, cfg=dataset.cfg),
            worker_init_fn=start_worker,
        ))
    if threading.current_thread() is threading.main_thread():
        # Undo torch's handler: it raises in the middle of a step when a worker is killed.
        signal.signal(signal.SIGCHLD, on_child)
    for _ in batches:
        yield next_batch(loader, timeout_s)
