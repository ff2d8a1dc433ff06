# SPDX-License-Identifier: Apache-2.0
"""From audio files to batches: decode, trim, log-mel, normalise, splice, augment, tokenize, bucket.

    samples = load_audio("1272-128104-0000.flac")        # float32, 16 kHz
    feats = features(samples)                            # (T_in, 256) float32
    feats = features(samples, rng=np.random.default_rng(7))   # the same, augmented for training

The front end is that of the MLPerf Training v1.0 RNN-T (NVIDIA DALI graph of intel/e2eAIOK,
modelzoo/rnnt/pytorch/common/data/dali/pipeline.py). Corpora have LibriSpeech's form:
    <root>/<split>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac
    <root>/<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt    lines `<id> <TEXT>`
"""

import atexit
import contextlib
import ctypes
import functools
import io
import multiprocessing
import os
import signal
import threading
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from tqdm import tqdm

from features import (
    DEFAULT,
    FeatureConfig,
    draw_speed,
    features,
    is_audio,
    load_audio,
    open_audio,
    read_audio,
)

# ------------------------------------------------------------------------- audio file to samples


# ---------------------------------------------------------------------------- samples to features


# -------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Sentencepiece unigram model (arXiv:1808.06226); one more class, the last, is blank.

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

    def decode(self, ids: Sequence[int]) -> str:
        return self.pieces.decode(list(ids))

    def starts_word(self, id_: int) -> bool:
        return self.pieces.id_to_piece(id_).startswith("\u2581")  # sentencepiece's space


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Sentencepiece model of `vocab_size - 1` pieces, fewer if the texts do not hold as many.

    Raises:
        ValueError: there are more characters than pieces, and each needs one.
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


# --------------------------------------------------------------------------------------- corpora


class Utterance(NamedTuple):
    """One recording of a split."""

    id: str
    path: str
    duration_s: float  # from the file's header
    text: str


class Problem(NamedTuple):
    """Something wrong with a corpus. An error keeps training from starting."""

    level: str  # "error" or "warning"
    kind: str  # problems of one kind are counted together
    where: str  # "file:line" or utterance id
    message: str


def text_error(line: str, folder: str) -> tuple[str, str] | None:
    """Kind and message of what is wrong with a line of the chapter `folder` (speaker-chapter)."""
    utterance_id, _, text = line.partition(" ")
    if not text.strip():
        return "no text", f"{line!r} has an id but no text"
    if any(c == "\ufeff" or unicodedata.category(c) == "Cc" for c in line):
        # Carriage return, tab, byte order mark: what editors and other systems leave behind.
        return "control character", f"{line!r}"
    if {"<s>", "</s>", "<unk>", "#0"} & set(text.split()) or "\u2581" in text:
        return "reserved word", f"{line!r}"
    if not utterance_id.startswith(f"{folder}-"):
        return "id not of its folder", f"{utterance_id!r} does not begin with {folder}-"
    return None


def read_transcripts(path: Path, problems: list[Problem]) -> Iterator[tuple[str, str, str]]:
    """Yields (where, id, text) for each good line of a .trans.txt; others become problems.

    Unicode has two ways to write many accented letters: texts are in its form NFC.
    """
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("error", "transcript not readable", str(path), str(error)))
        return
    folder = f"{path.parent.parent.name}-{path.parent.name}"
    if lines[-1] == "":  # behind the last line's end
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        wrong = text_error(line, folder)
        if wrong is not None:
            problems.append(Problem("error", wrong[0], where, wrong[1]))
            continue
        utterance_id, _, text = line.partition(" ")
        if any(c.isdigit() for c in text):
            problems.append(Problem("warning", "digits", where, f"{line!r} is not written out"))
        yield where, utterance_id, unicodedata.normalize("NFC", " ".join(text.split()))


def probe_audio(utterance_id: str, path: Path, cfg: FeatureConfig,
                decode: bool) -> tuple[float, list[Problem]]:
    """Duration in seconds, 0 if the file cannot be used, and what is wrong with it.

    Reads the header and the last sample; with `decode`, every sample.
    """
    problems = []
    try:
        with open_audio(path) as audio:
            frames, rate, channels = audio.frames, audio.samplerate, audio.channels
        if decode:
            samples, _ = read_audio(path)
            if frames > 1 and samples.min() == samples.max():
                message = f"{path}: every sample is {samples.max():g}"
                problems.append(Problem("warning", "constant audio", utterance_id, message))
    except (OSError, ValueError) as error:
        return 0.0, [Problem("error", "audio not readable", utterance_id, str(error))]
    if rate != cfg.sample_rate_hz:
        message = f"{path}: {rate} Hz, will be resampled to {cfg.sample_rate_hz}"
        problems.append(Problem("warning", "sample rate", utterance_id, message))
    if channels != 1:
        message = f"{path}: {channels} channels, will be averaged"
        problems.append(Problem("warning", "channels", utterance_id, message))
    return frames / rate, problems


def is_transcript(name: str) -> bool:
    return name.endswith(".trans.txt") and not name.startswith("._")


def list_files(split: Path, problems: list[Problem]) -> list[Path]:
    """Audio and transcripts in the chapters of a split, by name. Folders that cannot be read are
    problems, and so is what lies elsewhere in the split."""

    def note(error: OSError) -> None:
        problems.append(Problem("error", "folder not readable", error.filename, error.strerror))

    files: list[Path] = []
    for parent, folders, names in os.walk(split, onerror=note, followlinks=True):
        ours = [n for n in (*names, *folders) if is_audio(n) or is_transcript(n)]
        depth = len(Path(parent).relative_to(split).parts)
        if depth == 2:  # split/speaker/chapter
            files += (Path(parent, name) for name in ours)
            elsewhere = sorted(set(folders) - set(ours))
            folders.clear()
        else:
            elsewhere = sorted(set(ours) - set(folders))
        for name in elsewhere:
            where = str(Path(parent, name))
            problems.append(Problem("warning", "not a file of a chapter", where, "not looked at"))
    return sorted(files)


def find_audio(files: Sequence[Path], problems: list[Problem]) -> dict[Path, Path]:
    """Chapter folder / utterance id -> audio file; two files of one id are a problem."""
    audio: dict[Path, Path] = {}
    first: dict[str, Path] = {}
    for path in files:
        if is_audio(path.name):
            audio.setdefault(path.with_suffix(""), path)
            other = first.setdefault(path.stem, path)
            if other != path:
                message = f"{other} and {path}"
                problems.append(Problem("error", "duplicate recording", path.stem, message))
    return audio


def find_texts(files: Sequence[Path], audio: dict[Path, Path],
               problems: list[Problem]) -> dict[str, tuple[Path, str]]:
    """Utterance id -> audio file and text, in the order of the ids."""
    texts: dict[str, tuple[Path, str]] = {}
    transcripts = [path for path in files if is_transcript(path.name)]
    for chapter in sorted({key.parent for key in audio} - {path.parent for path in transcripts}):
        message = "there is audio, but no .trans.txt"
        problems.append(Problem("error", "transcript file missing", str(chapter), message))
    for transcript in transcripts:
        for where, utterance_id, text in read_transcripts(transcript, problems):
            path = audio.get(transcript.parent / utterance_id)
            if utterance_id in texts:
                problems.append(Problem("error", "duplicate id", where, utterance_id))
            elif path is None:
                message = f"{transcript.parent}/{utterance_id}.flac does not exist"
                problems.append(Problem("error", "audio missing", where, message))
            else:
                texts[utterance_id] = path, text
    named = {p.where for p in problems}
    for key, path in audio.items():
        if key.name not in texts and key.name not in named:
            message = f"{path} has no transcript"
            problems.append(Problem("warning", "transcript missing", key.name, message))
    return dict(sorted(texts.items()))


def scan_split(root: str | Path, split: str, cfg: FeatureConfig = DEFAULT,
               decode: bool = False) -> tuple[list[Utterance], list[Problem]]:
    """Good utterances of one split by id, and all problems.

    Reads transcripts and audio headers; with `decode`, all audio. Nothing is remembered from
    one call to the next, so no list of a corpus can be stale (0.2 ms a file).
    """
    folder = Path(root) / split
    problems: list[Problem] = []
    if not folder.is_dir():
        return [], [Problem("error", "split missing", str(folder), "no such folder")]
    files = list_files(folder, problems)
    texts = find_texts(files, find_audio(files, problems), problems)
    found = []
    with ThreadPoolExecutor() as pool:  # corpora often lie across a network
        probes = pool.map(lambda i: probe_audio(i, texts[i][0], cfg, decode), texts)
        bar = tqdm(probes, desc=split, unit="file", total=len(texts), disable=None, leave=False)
        for (utterance_id, (path, text)), (duration_s, wrong) in zip(
            texts.items(), bar, strict=True
        ):
            problems += wrong
            if duration_s > 0:
                found.append(Utterance(utterance_id, str(path), duration_s, text))
    small = [u for u in found if u.text != u.text.upper()]
    if len(small) < len(found):
        problems += [Problem("warning", "small letters", u.id, u.text) for u in small]
    if not found and not any(p.level == "error" for p in problems):
        problems.append(Problem("error", "split empty", str(folder), "no */*/*.trans.txt in it"))
    return found, problems


def describe(problems: Sequence[Problem], most: int = 10) -> list[str]:
    """Lines for people: every kind with its count, the first `most` of each kind."""
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
    """Utterances of a split that has no errors; warnings are passed on as such.

    With `skip_bad` errors are warnings too, and what they concern is left out.

    Raises:
        ValueError: with every kind of error, counted, and the first ten of each.
    """
    utterances, problems = scan_split(root, split, cfg)
    errors = [p for p in problems if p.level == "error"]
    if errors and not (skip_bad and utterances):
        raise ValueError("\n".join([f"{root}/{split} cannot be used:", *describe(errors)]))
    if errors:
        warnings.warn(f"{split}: {len(errors)} problems, what they concern is left out",
                      stacklevel=2)
    for line in describe(problems, most=1):
        warnings.warn(f"{split}: {line.strip()}", stacklevel=2)
    return utterances


def drop_long(utterances: Sequence[Utterance],
              cfg: FeatureConfig = DEFAULT) -> tuple[list[Utterance], str]:
    """Those of at most `max_utterance_s`, and a line that counts the others."""
    kept = [u for u in utterances if u.duration_s <= cfg.max_utterance_s]
    hours = (sum(u.duration_s for u in utterances) - sum(u.duration_s for u in kept)) / 3600
    dropped = len(utterances) - len(kept)
    note = f"{dropped:,} of {len(utterances):,} dropped, {hours:.1f} h"
    if not kept:
        raise ValueError(f"no training utterance of at most {cfg.max_utterance_s} s: {note}")
    return kept, note


# ---------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Padded with zeros."""

    feats: Tensor  # (B, T_in, D)
    feat_lens: Tensor  # (B,)
    targets: Tensor  # (B, U)
    target_lens: Tensor  # (B,)
    ids: list[str]
    audio_s: float  # of all of them together, as recorded
    asked: int  # utterances asked for: more than there are, if skip_bad left some out


def bucket_batches(durations_s: Sequence[float], global_batch: int, num_buckets: int,
                   rng: np.random.Generator) -> np.ndarray:
    """One epoch's order: (batches, global_batch) indices, none twice.

    Utterances are sorted by duration, split into buckets and shuffled inside; what is left over
    from whole batches is dropped at random; then the batches are shuffled. A rank r of W takes
    columns r, r + W, ... of every row, so all ranks have equally many batches. Plain sampler of
    the original (common/data/dali/sampler.py), its dropping as in mlcommons/training #460.
    """
    buckets = np.array_split(np.argsort(durations_s, kind="stable"), num_buckets)
    order = np.concatenate([rng.permutation(bucket) for bucket in buckets])
    if len(order) < global_batch:
        raise ValueError(f"{len(order)} training utterances, fewer than a batch of {global_batch}")
    left_over = rng.choice(len(order), len(order) % global_batch, replace=False)
    batches = np.delete(order, left_over).reshape(-1, global_batch)
    return rng.permutation(batches, axis=0)


class SpeechDataset(torch.utils.data.Dataset):
    """Utterances to (features, label ids, utterance), augmented if `seed` is given.

    The random numbers of an utterance depend on (seed, epoch, index) alone, so they are the
    same for any number of ranks, workers and restarts.
    """

    def __init__(self, utterances: Sequence[Utterance], tokenizer: Tokenizer | None,
                 cfg: FeatureConfig, seed: int | None = None, epoch: int = 0,
                 skip_bad: bool = False) -> None:
        self.utterances, self.tokenizer, self.cfg = utterances, tokenizer, cfg
        self.seed, self.epoch, self.skip_bad = seed, epoch, skip_bad

    def __len__(self) -> int:
        return len(self.utterances)

    def rng(self, index: int) -> np.random.Generator | None:
        if self.seed is None:
            return None
        return np.random.default_rng((self.seed, self.epoch, index))

    def durations_s(self) -> list[float]:
        """Of all utterances, after this epoch's speed perturbation and before trimming.

        Batches of what is equally long by then need less padding: bucketed by recorded durations,
        they would differ by up to 15 % each way more.
        """
        if self.seed is None:
            return [u.duration_s for u in self.utterances]
        return [draw_speed(self.rng(i), self.cfg) * u.duration_s
                for i, u in enumerate(self.utterances)]

    def __getitem__(self, index: int) -> tuple[Tensor, list[int], Utterance] | None:
        """None, with a warning, for a file that went bad, if `skip_bad`."""
        utterance = self.utterances[index]
        try:
            feats = features(load_audio(utterance.path, self.cfg), self.cfg, self.rng(index))
        except (OSError, ValueError) as error:
            if not self.skip_bad:
                raise
            warnings.warn(f"left out: {error}", stacklevel=1)
            return None
        labels = [] if self.tokenizer is None else self.tokenizer.encode(utterance.text)
        return feats, labels, utterance


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def collate(items: Sequence[tuple | None], cfg: FeatureConfig = DEFAULT) -> Batch:
    """Pads to the longest item, rounded up: oneDNN builds its kernels once per shape."""
    good = [item for item in items if item is not None]
    if not good:
        raise ValueError("none of the utterances of a batch can be read")
    feats, labels, utterances = zip(*good, strict=True)
    feat_lens = torch.tensor([len(f) for f in feats])
    target_lens = torch.tensor([len(ids) for ids in labels])
    padded = feats[0].new_zeros(
        len(feats), round_up(int(feat_lens.max()), cfg.round_frames), cfg.feature_size
    )
    targets = torch.zeros(
        len(labels), round_up(int(target_lens.max()), cfg.round_labels), dtype=torch.int64
    )
    for row, (f, ids) in enumerate(zip(feats, labels, strict=True)):
        padded[row, : len(f)] = f
        targets[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    ids = [u.id for u in utterances]
    audio_s = sum(u.duration_s for u in utterances)
    return Batch(padded, feat_lens, targets, target_lens, ids, audio_s, len(items))


def keep_memory() -> None:
    """Tells glibc not to give memory back after every utterance: faulting it in again takes 1 ms
    that its features need not take. Other allocators do not have the function or ignore it."""
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD, bytes
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at most this


def start_worker(_worker: int) -> None:
    """Lowest priority for a worker process, on its parent's CPUs, without its parent's signals.

    A worker at normal priority that takes a core for a moment leaves all other threads of the
    training process spinning at their next barrier, of which an LSTM has one per frame: the
    step becomes 4.5 times longer (two cores). At priority 19 it costs nothing measurable.

    OpenMP may have bound the thread that starts workers to one CPU, and others to the rest.

    Batch systems signal all processes of a job. Training then still needs its workers.
    """
    os.nice(19)
    keep_memory()
    if hasattr(os, "sched_setaffinity"):
        cpus = os.sched_getaffinity(0)
        for thread in os.listdir(f"/proc/{os.getppid()}/task"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                cpus |= os.sched_getaffinity(int(thread))
        os.sched_setaffinity(0, cpus)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Of the whole split read_split has said so; every worker of every epoch would again.
    warnings.filterwarnings("ignore", message="audio of ")


def reason(error: Exception) -> str:
    """What an error says. One from a worker process brings its traceback, which ends in that."""
    text = str(error).strip()
    return text.splitlines()[-1] if text.startswith("Caught ") else text


def end_workers() -> None:
    """At the end of a program that an error ended: multiprocessing would send SIGTERM and wait."""
    for worker in multiprocessing.active_children():
        worker.kill()


LOOK_EVERY_S = 5  # while there is no batch: are the workers alive?


def next_batch(loader: Iterator[Batch], timeout_s: float) -> Batch:
    """Of a torch DataLoader that looks every LOOK_EVERY_S; errors as of batch_loader."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return next(loader)
        except (RuntimeError, ConnectionError) as error:
            said = str(error)
            if isinstance(error, RuntimeError) and not said.startswith("DataLoader "):
                raise  # not torch's own
            if not said.startswith("DataLoader timed out"):
                why = f"a worker process was killed ({said}), perhaps for want of memory"
            elif time.monotonic() < until:
                continue
            else:
                why = (f"none for {timeout_s:g} s: the disk of the recordings does not answer, or "
                       "/dev/shm is full (docker run --shm-size)")
            raise OSError(f"no batch: {why}; train.py --loader-workers 0 prepares batches "
                          "without worker processes") from error


def batch_loader(dataset: SpeechDataset, batches: Sequence[Sequence[int]], num_workers: int,
                 timeout_s: float = 600.0) -> Iterator[Batch]:
    """Batches in the given order, prepared ahead of time by worker processes.

    Raises:
        OSError: a worker was killed, or no batch came for `timeout_s`.
    """
    atexit.unregister(end_workers)  # once is enough
    atexit.register(end_workers)
    on_child = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL  # None: not Python's
    loader = iter(torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        timeout=LOOK_EVERY_S if num_workers else 0,
        collate_fn=functools.partial(collate, cfg=dataset.cfg),
        worker_init_fn=start_worker,
    ))
    if threading.current_thread() is threading.main_thread():
        # Torch's own handler raises in the middle of whatever is done when a worker is killed.
        signal.signal(signal.SIGCHLD, on_child)
    for _ in batches:
        yield next_batch(loader, timeout_s)
