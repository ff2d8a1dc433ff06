# SPDX-License-Identifier: Apache-2.0
"""Greedy transducer decoding and word error rate.

    python decode.py --checkpoint out/demo/best.pt a.flac b.wav      # prints `path<TAB>text`
    python decode.py --checkpoint out/demo/best.pt a.flac --plot a.png --ctm a.ctm --json a.json
    python decode.py --checkpoint out/demo/best.pt --data data/demo --split dev-demo

The second form shows what the model heard when: a picture of one file, word times and confidence
of any number. The third prints WER, real-time factor and what the errors are, and writes
hypotheses beside their references. Architecture, front end and tokenizer come from the
checkpoint; the weights are the exponential moving average that training evaluates.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import data
from checkpoint import load_checkpoint
from data import Batch, Tokenizer
from features import (
    FeatureConfig,
    features,
    is_audio,
    load_audio,
    log_mel,
    nonsilent_region,
    trim_silence,
)
from model import ModelConfig, Transducer

MAX_SYMBOLS_PER_FRAME = 30  # of the original (rnnt/decoder.py:309), whose frames last 240 ms
# Likewise (--max_symbol_per_sample), for utterances of up to 35 s; looked at when a frame starts.
MAX_SYMBOLS = 300


# -------------------------------------------------------------------------------- greedy search


class Arc(NamedTuple):
    """One arc of a path through the lattice. Probabilities are natural logarithms."""

    frame: int  # t
    label: int  # or blank
    log_prob: float
    blank_log_prob: float  # at the node that the arc leaves


@torch.no_grad()
def greedy_decode(model: Transducer, feats: Tensor, feat_lens: Tensor,
                  max_symbols_per_frame: int = MAX_SYMBOLS_PER_FRAME,
                  max_symbols: int = MAX_SYMBOLS,
                  arcs: list[list[Arc]] | None = None) -> list[list[int]]:
    """Most likely class at every lattice node on one path: (B, T_in, D) -> B label lists.

    At its frame t an utterance emits labels until blank is the most likely class or
    `max_symbols_per_frame` are out; then t advances. The prediction network's state moves on
    emitted labels alone. No frame is started with more than `max_symbols` labels. Every
    utterance walks its own path: one iteration takes one arc in each utterance that is not at
    its end, so a batch gives what each utterance gives alone. To `arcs`, if given, every
    utterance's path is appended.
    """
    assert not model.training
    encoded, enc_lens = model.encode(feats, feat_lens)  # (B, T, J), (B,)
    joint, predictor = model.joint_network, model.predictor
    output, state = predictor.start(len(feats))  # (B, H), (layers, B, H) twice
    predicted = joint.predictor_projection(output)  # (B, J)
    hypotheses: list[list[int]] = [[] for _ in range(len(feats))]
    frame = torch.zeros_like(enc_lens)  # (B,) t of each utterance
    emitted = torch.zeros_like(enc_lens)  # (B,) labels at this frame
    total = torch.zeros_like(enc_lens)  # (B,) labels so far
    rows = enc_lens.nonzero()[:, 0]  # utterances not at their end
    paths: list[list[Arc]] = [[] for _ in range(len(feats))]
    while len(rows):
        logits = joint(encoded[rows, frame[rows]], predicted[rows])  # (rows, V)
        label = logits.argmax(-1)  # (rows,)
        if arcs is not None:
            log_probs = logits.log_softmax(-1)
            best = log_probs.gather(1, label[:, None])[:, 0]  # (rows,)
            columns = (frame[rows], label, best, log_probs[:, model.cfg.blank])
            for b, *arc in zip(rows.tolist(), *(c.tolist() for c in columns), strict=True):
                paths[b].append(Arc(*arc))
        is_blank = label == model.cfg.blank
        emit, label = rows[~is_blank], label[~is_blank]
        if len(emit):
            for b, k in zip(emit.tolist(), label.tolist(), strict=True):
                hypotheses[b].append(k)
            output, moved = predictor.step(label, tuple(s[:, emit].contiguous() for s in state))
            predicted[emit] = joint.predictor_projection(output)
            for old, new in zip(state, moved, strict=True):
                old[:, emit] = new
            emitted[emit] += 1
            total[emit] += 1
        advance = torch.cat([rows[is_blank], emit[emitted[emit] == max_symbols_per_frame]])
        frame[advance] += 1
        emitted[advance] = 0
        at_end = (frame >= enc_lens) | ((emitted == 0) & (total > max_symbols))
        rows = rows[~at_end[rows]]
    if arcs is not None:
        arcs += paths
    return hypotheses


class Word(NamedTuple):
    """A word of a hypothesis, from its first piece's frame to the end of its last one's."""

    text: str
    start_s: float
    end_s: float
    confidence: float  # posterior of the piece that is least certain


def words_of(path: Sequence[Arc], tokenizer: Tokenizer, frame_s: float,
             start_s: float) -> list[Word]:
    """Words of one path; its frame 0 is at `start_s`. A frame is as exact as times can be.

    An emission is no boundary: a transducer may wait with a piece until it has heard enough.
    """
    pieces: list[list[Arc]] = []
    for arc in path:
        if arc.label != tokenizer.blank:
            if not pieces or tokenizer.starts_word(arc.label):
                pieces.append([])
            pieces[-1].append(arc)
    words = []
    for word in pieces:
        text = tokenizer.decode([arc.label for arc in word])
        start, end = (start_s + frame_s * t for t in (word[0].frame, word[-1].frame + 1))
        if text:  # the mark of a word's start may be all there is
            words.append(Word(text, start, end, math.exp(min(arc.log_prob for arc in word))))
    return words


# ------------------------------------------------------------------------------ word error rate


def align(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple]:
    """Pairs of what stands for each other in `a` and `b`, None for nothing, with least edits."""
    table = [list(range(len(b) + 1))]  # table[i][j]: edits between a[:i] and b[:j]
    for i, x in enumerate(a, 1):
        above, row = table[-1], [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[j - 1] + 1))
        table.append(row)
    pairs, i, j = [], len(a), len(b)
    while i or j:
        if i and j and table[i][j] == table[i - 1][j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((a[i], b[j]))
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
            pairs.append((a[i], None))
        else:
            j -= 1
            pairs.append((None, b[j]))
    return pairs[::-1]


def levenshtein(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Least number of insertions, deletions and substitutions that turn `a` into `b`."""
    return sum(x != y for x, y in align(a, b))


def word_errors(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[int, int]:
    """Word edits and reference words, summed; case counts, words are what white space parts."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    pairs = [(h.split(), r.split()) for h, r in zip(hypotheses, references, strict=True)]
    return sum(levenshtein(h, r) for h, r in pairs), sum(len(r) for _, r in pairs)


def word_error_rate(errors: int, words: int) -> float:
    """Infinite without reference words."""
    return errors / words if words else math.inf


# ----------------------------------------------------------------------------------- checkpoints


def restore(checkpoint: dict) -> tuple[Transducer, Tokenizer, FeatureConfig]:
    """Model with averaged weights in evaluation mode, tokenizer and front end."""
    model = Transducer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["ema"])
    tokenizer = Tokenizer(checkpoint["tokenizer"].numpy().tobytes())
    return model.eval(), tokenizer, FeatureConfig(**checkpoint["feature_config"])


# ------------------------------------------------------------------------------------ evaluation


def decode_batches(model: Transducer, tokenizer: Tokenizer, batches: Iterable[Batch],
                   counts: Counter | None = None) -> dict[str, str]:
    """Utterance id -> hypothesis. Adds up encoder frames, emitted labels and utterances that ended
    at MAX_SYMBOLS in `counts`."""
    texts = {}
    counts = Counter() if counts is None else counts
    for batch in batches:
        labels = greedy_decode(model, batch.feats, batch.feat_lens)
        texts.update(zip(batch.ids, map(tokenizer.decode, labels), strict=True))
        counts["frames"] += int((-(-batch.feat_lens // model.cfg.stack)).sum())
        counts["labels"] += sum(map(len, labels))
        counts["cut"] += sum(len(ids) > MAX_SYMBOLS for ids in labels)
    return texts


def evaluation_batches(utterances: Sequence[data.Utterance], batch_size: int) -> list[list[int]]:
    """Indices by falling duration: little padding, and the largest batch comes first."""
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def describe_errors(hypotheses: Sequence[str], references: Sequence[str],
                    most: int = 10) -> list[str]:
    """A line for each kind of word error: its number, and the most frequent ones."""
    kinds = {"substitutions": Counter(), "insertions": Counter(), "deletions": Counter()}
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for word, right in align(hypothesis.split(), reference.split()):
            if right is None:
                kinds["insertions"][word] += 1
            elif word is None:
                kinds["deletions"][right] += 1
            elif word != right:
                kinds["substitutions"][f"{right} -> {word}"] += 1
    return [
        f"{kind}: {errors.total():,}{': ' if errors else ''}"
        + ", ".join(f"{what} ({n})" for what, n in errors.most_common(most))
        for kind, errors in kinds.items()
    ]


def describe_blanks(frames: int, labels: int, words: int) -> list[str]:
    """How often a model said nothing, as if one blank ended every frame; a second line if that is
    (almost) all it said."""
    lines = [
        f"blank ratio: {frames / (frames + labels):.3f}, {labels / frames:.3f} symbols a frame"
    ]
    if labels < words / 10:
        lines.append(
            f"the model emits (almost) only blanks: {labels:,} symbols for {words:,} words"
        )
    return lines


def score_split(args: argparse.Namespace, checkpoint: dict) -> None:
    model, tokenizer, features = restore(checkpoint)
    utterances = data.read_split(args.data, args.split, features)
    out = Path(args.hypotheses or Path(args.checkpoint).parent / f"{Path(args.split).name}.tsv")
    out.open("a").close()  # what cannot be written is seen now
    started = time.perf_counter()
    dataset = data.SpeechDataset(utterances, None, features)
    batches = evaluation_batches(utterances, args.batch_size)
    loader = data.batch_loader(dataset, batches, num_workers=1)
    counts = Counter()
    bar = tqdm(loader, desc=args.split, unit="batch", total=len(batches), disable=None, leave=False)
    texts = decode_batches(model, tokenizer, bar, counts)
    seconds = time.perf_counter() - started
    hypotheses, references = [texts[u.id] for u in utterances], [u.text for u in utterances]
    errors, words = word_errors(hypotheses, references)
    rtf = seconds / sum(u.duration_s for u in utterances)
    rows = [f"{u.id}\t{texts[u.id]}\t{u.text}\n" for u in utterances]
    out.write_text("".join(["id\thypothesis\treference\n", *rows]), encoding="utf-8")
    wer = 100 * word_error_rate(errors, words)
    print(f"{args.split}: WER {wer:.2f} % ({errors:,} errors in {words:,} words), "
          f"real-time factor {rtf:.4f}, {seconds:.1f} s, hypotheses in {out}")
    lines = describe_errors(hypotheses, references)
    lines += describe_blanks(counts["frames"], counts["labels"], words)
    if counts["cut"]:
        lines.append(f"{counts['cut']} hypotheses end after {MAX_SYMBOLS} symbols, the most that "
                     "evaluation allows")
    print("\n".join(lines))


# ----------------------------------------------------------------------------- what the model hears


class Heard(NamedTuple):
    """One file, decoded."""

    path: str
    text: str
    words: list[Word]
    arcs: list[Arc]
    start_s: float  # of frame 0: the silence before it is cut off


def find_reference(path: str) -> str | None:
    """What a .trans.txt beside the file says it is."""
    file = Path(path).resolve()  # the names of its folders are part of the ids
    for transcript in file.parent.glob("*.trans.txt"):
        for line in data.read_transcripts(transcript):
            if isinstance(line, data.Line) and line.id == file.stem:
                return line.text
    return None


def write_ctm(path: str, heard: Sequence[Heard], frame_s: float) -> None:
    """NIST's form: file, channel, start, duration, word, confidence; times are in seconds.

    A file is its name, or its path if another one has that name; white space parts columns.
    """
    names = Counter(Path(h.path).stem for h in heard)
    lines = [f";; times are those of emissions, in frames of {frame_s:.3f} s\n"]
    for h in heard:
        stem = Path(h.path).stem
        name = re.sub(r"\s", "_", stem if names[stem] == 1 else h.path)
        for w in h.words:
            lines.append(f"{name} 1 {w.start_s:.3f} {w.end_s - w.start_s:.3f} "
                         f"{w.text} {w.confidence:.3f}\n")
    Path(path).write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def write_json(path: str, heard: Sequence[Heard], frame_s: float) -> None:
    files = [{"path": h.path, "text": h.text, "words": [w._asdict() for w in h.words]}
             for h in heard]
    text = json.dumps({"precision_s": frame_s, "files": files}, indent=1)
    Path(path).write_text(text + "\n", encoding="utf-8")


def label_words(heard: Heard, reference: str | None) -> list[tuple[float, str, str]]:
    """Time, label and colour of each word, errors in red: HEARD (SAID), +inserted, -missing."""
    texts = [w.text for w in heard.words]
    said = texts if reference is None else reference.split()
    labels, time_s, words = [], heard.start_s, iter(heard.words)
    for word, right in align(texts, said):
        if word is None:  # stands where the word before it ends
            labels.append((time_s, f"-{right}", "red"))
            continue
        _, start_s, time_s, _ = next(words)
        label = word if word == right else f"+{word}" if right is None else f"{word} ({right})"
        labels.append((start_s, label, "black" if word == right else "red"))
    return labels


def plot(png: str, heard: Heard, cfg: FeatureConfig, frame_s: float) -> None:
    """Log-mel picture with the words where they were emitted, and the posterior of blank below.

    A frame may emit several labels: what is drawn is blank's posterior before the first.
    """
    samples = trim_silence(load_audio(heard.path, cfg), cfg)
    start_s, seconds = heard.start_s, len(samples) / cfg.sample_rate_hz
    figure = Figure(figsize=(max(8.0, seconds), 5), dpi=100, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.imshow(log_mel(samples, cfg).T, origin="lower", aspect="auto",
                 extent=(start_s, start_s + seconds, 0, cfg.num_mels))
    x = -math.inf
    for time_s, label, colour in label_words(heard, find_reference(heard.path)):
        x = max(time_s, x + seconds / 40)  # one frame may emit several words
        upper.axvline(time_s, color="white", linewidth=0.8, linestyle="--")
        upper.text(x, cfg.num_mels + 1, label, color=colour, rotation=45)
    upper.set(ylabel="mel bin", xlim=(start_s, start_s + seconds))
    first = {arc.frame: arc for arc in reversed(heard.arcs)}
    edges = [start_s + frame_s * t for t in range(len(first) + 1)]
    lower.stairs([math.exp(first[t].blank_log_prob) for t in sorted(first)], edges)
    lower.set(xlabel="seconds", ylabel="P(blank)", ylim=(0, 1.05))
    figure.savefig(png)


def padded_groups(feats: Sequence[Tensor], most_frames: int = 2**15) -> Iterator[list[Tensor]]:
    """Features in their order, in groups that take at most so many frames when they are padded to
    their longest, or one file: 2^15 are 32 files of half a minute."""
    group: list[Tensor] = []
    for f in feats:
        longest = max(len(x) for x in [*group, f])
        if group and longest * (len(group) + 1) > most_frames:
            yield group
            group = []
        group.append(f)
    yield group


def hear(paths: Sequence[str], model: Transducer, tokenizer: Tokenizer,
         cfg: FeatureConfig) -> tuple[list[Heard], int]:
    """One batch of files: those that can be read, and how many could not.

    Long files are decoded in smaller batches, and to their end, however many labels they have.
    """
    samples, failed = [], 0
    for path in paths:
        try:
            samples.append((path, load_audio(path, cfg)))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            failed += 1
    if not samples:
        return [], failed
    labels: list[list[int]] = []
    arcs: list[list[Arc]] = []
    for feats in padded_groups([features(x, cfg) for _, x in samples]):
        padded = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)  # (B, T_in, D)
        labels += greedy_decode(
            model, padded, torch.tensor([len(f) for f in feats]), max_symbols=sys.maxsize,
            arcs=arcs,
        )
    heard = []
    for (path, x), ids, taken in zip(samples, labels, arcs, strict=True):
        start_s = nonsilent_region(x, cfg)[0] / cfg.sample_rate_hz
        words = words_of(taken, tokenizer, frame_seconds(model, cfg), start_s)
        heard.append(Heard(path, tokenizer.decode(ids), words, taken, start_s))
    return heard, failed


def frame_seconds(model: Transducer, cfg: FeatureConfig) -> float:
    """Length of an encoder frame: 240 ms for a stack of 8."""
    return model.cfg.stack * cfg.splice * cfg.hop / cfg.sample_rate_hz


def list_audio(words: Sequence[str]) -> tuple[list[str], int]:
    """Files as given; of a folder all audio in it and below, by name, or it, if it has none. Also
    how many folders could not be read; a line of each goes to stderr."""
    paths: list[str] = []
    unreadable: list[OSError] = []
    for word in words:
        inside, seen = [], set()
        for parent, folders, names in os.walk(word, onerror=unreadable.append, followlinks=True):
            if os.path.realpath(parent) in seen:  # by another link, or one to a folder above
                folders.clear()
                continue
            seen.add(os.path.realpath(parent))
            folders.sort()
            inside += (str(Path(parent, name)) for name in names if is_audio(name))
        paths += sorted(inside) or [word]
    unreadable = [error for error in unreadable if os.path.isdir(error.filename)]
    for error in unreadable:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return paths, len(unreadable)


def transcribe(args: argparse.Namespace, checkpoint: dict) -> int:
    """Prints a line for every readable file; returns how many files and folders were not."""
    model, tokenizer, cfg = restore(checkpoint)
    everything = []
    paths, failed = list_audio(args.audio)
    if args.plot and len(paths) != 1:
        raise ValueError(f"--plot: {len(paths)} audio files, expected 1")
    for path in filter(None, (args.ctm, args.json, args.plot)):
        open(path, "a").close()  # what cannot be written is seen now
    starts = range(0, len(paths), args.batch_size)
    for start in tqdm(starts, desc="files", unit="batch", disable=None, leave=False):
        heard, bad = hear(paths[start : start + args.batch_size], model, tokenizer, cfg)
        failed += bad
        for h in heard:
            tqdm.write(f"{h.path}\t{h.text}")
        sys.stdout.flush()
        if args.ctm or args.json or args.plot:
            everything += heard
    frame_s = frame_seconds(model, cfg)
    if args.ctm:
        write_ctm(args.ctm, everything, frame_s)
    if args.json:
        write_json(args.json, everything, frame_s)
    if args.plot and everything:
        plot(args.plot, everything[0], cfg, frame_s)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("audio", nargs="*", help="audio files, or folders of them, to transcribe")
    parser.add_argument("--checkpoint", required=True, help="best.pt or checkpoint-*.pt")
    parser.add_argument("--data", help="corpus root; with --split: score that split")
    parser.add_argument("--split", help="folder below --data, e.g. dev-clean")
    parser.add_argument("--hypotheses", help="where --split writes; default beside the checkpoint")
    parser.add_argument("--ctm", help="where to write word times and confidences, NIST's form")
    parser.add_argument("--json", help="likewise as JSON")
    parser.add_argument("--plot", help="where to draw what the model heard in one audio file")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if bool(args.data) != bool(args.split) or bool(args.audio) == bool(args.data):
        parser.error("give either audio files, or --data and --split")
    if args.data and (args.ctm or args.json or args.plot):
        parser.error("--ctm, --json and --plot are for audio files")
    if args.audio and args.hypotheses:
        parser.error("--hypotheses is for --data and --split")
    if args.batch_size < 1:
        parser.error(f"--batch-size: {args.batch_size}, expected at least 1")
    torch.set_flush_denormal(True)
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.data:
            score_split(args, checkpoint)
        elif transcribe(args, checkpoint):
            return 1
    except (OSError, ValueError) as error:
        print(data.reason(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
