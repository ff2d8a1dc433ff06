# SPDX-License-Identifier: Apache-2.0
"""Greedy transducer decoding, word error rate, word times, and streams.

    python decode.py --checkpoint out/demo/best.pt a.flac calls/ -   # prints `path<TAB>text`
    python decode.py --checkpoint out/demo/best.pt a.flac --srt a.srt --plot a.png --json a.json
    python decode.py --checkpoint out/demo/best.pt --data data/demo --split dev-demo
    arecord -q -f S16_LE -r 16000 -c 1 -t raw | python decode.py --checkpoint C --stream

The second form writes subtitles and draws one file with its words; --ctm and --json write the
times and confidences of words for any number of files. The third prints WER, CER, real-time factor
and the kinds of errors, and writes hypotheses beside their references. The fourth prints words
while they are spoken. Architecture, front end and tokenizer come from the checkpoint; the weights
are the exponential moving average that training evaluates.

Graves (2012), arXiv:1211.3711. Shape letters are those of model.py.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

if __name__ == "__main__":
    # main() ends quietly at Ctrl-C; until the libraries below are imported, this hook does.
    sys.excepthook = lambda kind, *rest: (
        os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest))

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import writers
from checkpoint import load_checkpoint
from data import Batch, Tokenizer
from features import (
    FeatureConfig,
    dither,
    features,
    is_audio,
    log_mel,
    nonsilent_region,
    scale_fixed,
    splice,
)
from model import ModelConfig, Transducer
from segment import BLOCK_S, Piece, decibels, list_audio, read_pieces, thresholds
from writers import Segment, Transcription, Word

# The limits are those of rnnt/decoder.py:309 in the original and of its --max_symbol_per_sample.
# LibriSpeech's longest utterances, 35 s, have fewer than 300 sentencepieces.
MAX_SYMBOLS_PER_FRAME = 30
MAX_SYMBOLS = 300
BATCH_SIZE = 32  # recordings, or pieces of them
MAX_FRAMES = 2**15  # padded input frames of one batch; 32 pieces of 30 s at 30 ms a frame


# -------------------------------------------------------------------------------- greedy search


class Arc(NamedTuple):
    """One arc of a path through the lattice. Probabilities are natural logarithms."""

    frame: int  # t
    label: int  # or blank
    log_prob: float
    blank_log_prob: float  # at the node that the arc leaves


class SearchState(NamedTuple):
    """State of a greedy search of B utterances between two encoder frames."""

    predictor: tuple[Tensor, Tensor]  # (layers, B, H) each: LSTM state of the prediction network
    predicted: Tensor  # (B, J) its output after the last label, projected
    num_labels: Tensor  # (B,) emitted so far
    num_frames: Tensor  # (B,) searched so far


def start_search(model: Transducer, batch: int) -> SearchState:
    output, predictor = model.predictor.start(batch)  # (B, H), (layers, B, H) twice
    predicted = model.joint_network.predictor_projection(output)  # (B, J)
    zeros = torch.zeros(batch, dtype=torch.int64)
    return SearchState(predictor, predicted, zeros, zeros)


@torch.no_grad()
def greedy_search(model: Transducer, encoded: Tensor, enc_lens: Tensor,
                  state: SearchState | None = None,
                  max_symbols_per_frame: int = MAX_SYMBOLS_PER_FRAME,
                  max_symbols: int = MAX_SYMBOLS,
                  paths: Sequence[list[Arc]] | None = None,
                  ) -> tuple[list[list[int]], SearchState]:
    """Takes the most likely class at every lattice node on one path.

    At each encoder frame an utterance emits labels until blank is the most likely class or
    `max_symbols_per_frame` labels are out. For one utterance, from `labels = []`, that is:

        for frame in encoded:  # (J,)
            for _ in range(max_symbols_per_frame):
                predicted = model.predict(torch.tensor([labels]).long())[0, -1]  # (J,)
                label = model.joint_network(frame, predicted).argmax().item()
                if label == model.cfg.blank: break
                labels.append(label)

    The code below keeps the prediction network's state, which moves on labels and never on blank.
    Every utterance walks its own path: one iteration takes one arc in each utterance that has
    frames left, so a batch gives the labels that each utterance gives alone. Frames may come in
    chunks: where each call continues from the state of the call before, the labels are the same.

    Args:
        encoded: (B, T, J) encoder output.
        enc_lens: (B,) valid frames, 0 <= n <= T.
        state: state after the frames before these, None at the start; it is left unchanged.
        max_symbols: an utterance with more labels than this starts no further frame.
        paths: B lists; the arcs of each utterance are appended to its list.
    Returns:
        The labels that each utterance emits in these frames, and the state after them.
    """
    state = start_search(model, len(encoded)) if state is None else state
    lstm_state = tuple(s.clone() for s in state.predictor)  # (layers, B, H) each
    predicted, num_labels = state.predicted.clone(), state.num_labels.clone()  # (B, J), (B,)
    labels: list[list[int]] = [[] for _ in range(len(encoded))]
    frame = torch.zeros_like(enc_lens)  # (B,) t of each utterance
    emitted = torch.zeros_like(enc_lens)  # (B,) labels at frame t
    while True:
        may_go_on = (emitted > 0) | (num_labels <= max_symbols)  # (B,)
        rows = ((frame < enc_lens) & may_go_on).nonzero()[:, 0]  # utterances that take an arc
        if len(rows) == 0:
            num_frames = state.num_frames + enc_lens
            return labels, SearchState(lstm_state, predicted, num_labels, num_frames)
        logits = model.joint_network(encoded[rows, frame[rows]], predicted[rows])  # (rows, V)
        label = logits.argmax(-1)  # (rows,)
        if paths is not None:
            log_probs = logits.log_softmax(-1)  # (rows, V)
            columns = (rows, state.num_frames[rows] + frame[rows], label,
                       log_probs.gather(1, label[:, None])[:, 0], log_probs[:, model.cfg.blank])
            for b, *arc in zip(*(c.tolist() for c in columns), strict=True):
                paths[b].append(Arc(*arc))
        is_blank = label == model.cfg.blank
        emit, label = rows[~is_blank], label[~is_blank]
        if len(emit):
            for b, k in zip(emit.tolist(), label.tolist(), strict=True):
                labels[b].append(k)
            before = tuple(s[:, emit].contiguous() for s in lstm_state)
            output, after = model.predictor.step(label, before)
            predicted[emit] = model.joint_network.predictor_projection(output)
            for old, new in zip(lstm_state, after, strict=True):
                old[:, emit] = new
            emitted[emit] += 1
            num_labels[emit] += 1
        advance = torch.cat([rows[is_blank], emit[emitted[emit] == max_symbols_per_frame]])
        frame[advance] += 1
        emitted[advance] = 0


@torch.no_grad()
def greedy_decode(model: Transducer, feats: Tensor, feat_lens: Tensor,
                  max_symbols_per_frame: int = MAX_SYMBOLS_PER_FRAME,
                  max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """Encodes and searches: (B, T_in, D), (B,) -> B label lists; limits as in greedy_search."""
    assert not model.training
    encoded, enc_lens = model.encode(feats, feat_lens)  # (B, T, J), (B,)
    return greedy_search(model, encoded, enc_lens, None, max_symbols_per_frame, max_symbols)[0]


# ------------------------------------------------------------------------------- words and times


def words_of(path: Sequence[Arc], tokenizer: Tokenizer, frame_s: float,
             start_s: float) -> list[Word]:
    """Words of one path whose frame 0 is at `start_s`.

    Times are those of emissions, exact to one frame. They are no word boundaries: a transducer
    may wait with a piece until it has heard enough.
    """
    arcs_of_words: list[list[Arc]] = []
    for arc in path:
        if arc.label != tokenizer.blank:
            if not arcs_of_words or tokenizer.starts_word(arc.label):
                arcs_of_words.append([])
            arcs_of_words[-1].append(arc)
    words = []
    for arcs in arcs_of_words:
        text = tokenizer.decode([arc.label for arc in arcs])
        start, end = (start_s + frame_s * t for t in (arcs[0].frame, arcs[-1].frame + 1))
        if text:  # the label that starts a word may hold no letter
            words.append(Word(text, start, end, math.exp(min(arc.log_prob for arc in arcs))))
    return words


def segment_of(path: Sequence[Arc], tokenizer: Tokenizer, frame_s: float, start_s: float,
               samples: np.ndarray | None = None) -> Segment:
    """The decoded part of a recording whose frame 0 is at `start_s`."""
    text = tokenizer.decode([arc.label for arc in path if arc.label != tokenizer.blank])
    end_s = start_s + frame_s * (path[-1].frame + 1 if path else 0)
    return Segment(start_s, end_s, text, words_of(path, tokenizer, frame_s, start_s), list(path),
                   samples)


# ---------------------------------------------------------------- word and character error rates


def align(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> list[tuple]:
    """Levenshtein alignment: pairs (item of hypothesis, item of reference) with the fewest edits.

    An insertion has None for the reference, a deletion None for the hypothesis.
    """
    table = [list(range(len(reference) + 1))]  # [i][j]: edits of hypothesis[:i], reference[:j]
    for i, x in enumerate(hypothesis, 1):
        above, row = table[-1], [i]
        for j, y in enumerate(reference, 1):
            row.append(min(above[j - 1] + (x != y), above[j] + 1, row[j - 1] + 1))
        table.append(row)
    pairs, i, j = [], len(hypothesis), len(reference)
    while i or j:
        x, y = hypothesis[i - 1] if i else None, reference[j - 1] if j else None
        if i and j and table[i][j] == table[i - 1][j - 1] + (x != y):
            i, j = i - 1, j - 1
            pairs.append((x, y))
        elif i and table[i][j] == table[i - 1][j] + 1:
            i -= 1
            pairs.append((x, None))
        else:
            j -= 1
            pairs.append((None, y))
    return pairs[::-1]


def edit_distance(hypothesis: Sequence[Hashable], reference: Sequence[Hashable]) -> int:
    """The fewest edits between two sequences; `align` finds the same number, but more slowly.

    The table of `align` has a row for each reference item and a column for each hypothesis item.
    Neighbours in it differ by one at most, so the differences of a column are bits of integers and
    a column takes a few operations: Myers (1999), doi:10.1145/316542.316550, as in Hyyrö (2003).
    """
    if not reference:
        return len(hypothesis)
    places: dict[Hashable, int] = {}  # item -> bits of the rows where the reference has it
    for row, item in enumerate(reference):
        places[item] = places.get(item, 0) | 1 << row
    rows, distance = (1 << len(reference)) - 1, len(reference)
    more, less = rows, 0  # rows with one edit more, or one less, than the row above
    for item in hypothesis:
        same = places.get(item, 0)
        # `diagonal` has the bits of rows with as many edits as their neighbour above to the left.
        diagonal = (((same & more) + more) ^ more) | same | less
        rises, falls = less | rows & ~(diagonal | more), diagonal & more  # from left to right
        distance += (rises >> len(reference) - 1) - (falls >> len(reference) - 1)
        rises = rises << 1 | 1
        more, less = (falls << 1 | ~(diagonal | rises)) & rows, diagonal & rises & rows
    return distance


def word_errors(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[int, int]:
    """Word edits and reference words, summed over utterances.

    Words are separated by white space; upper and lower case differ.
    """
    pairs = [(h.split(), r.split()) for h, r in zip(hypotheses, references, strict=True)]
    return sum(edit_distance(h, r) for h, r in pairs), sum(len(r) for _, r in pairs)


def char_errors(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[int, int]:
    """Character edits and reference characters; one space stands between words and counts."""
    pairs = [(" ".join(h.split()), " ".join(r.split()))
             for h, r in zip(hypotheses, references, strict=True)]
    return sum(edit_distance(h, r) for h, r in pairs), sum(len(r) for _, r in pairs)


def error_rate(errors: int, words: int) -> float:
    """Errors per reference word, or character; infinite if there is none."""
    return errors / words if words else math.inf


def describe_errors(hypotheses: Sequence[str], references: Sequence[str]) -> list[str]:
    """One line per kind of word error: its count, and its ten most frequent examples."""
    kinds = {"substitutions": Counter(), "insertions": Counter(), "deletions": Counter()}
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        for heard, said in align(hypothesis.split(), reference.split()):
            if said is None:
                kinds["insertions"][heard] += 1
            elif heard is None:
                kinds["deletions"][said] += 1
            elif heard != said:
                kinds["substitutions"][f"{said} -> {heard}"] += 1
    lines = []
    for kind, errors in kinds.items():
        examples = ", ".join(f"{error} ({n})" for error, n in errors.most_common(10))
        lines.append(f"{kind}: {errors.total():,}" + (f": {examples}" if examples else ""))
    ignoring_case, _ = word_errors(*([text.lower() for text in texts]
                                     for texts in (hypotheses, references)))
    if by_case := sum(map(Counter.total, kinds.values())) - ignoring_case:
        lines.append(f"{by_case:,} of these errors are upper against lower case alone: write the "
                     "references as the training texts are written")
    return lines


# ------------------------------------------------------------------------------- scoring a split


def stored_tokenizer(checkpoint: dict) -> Tokenizer:
    return Tokenizer(checkpoint["tokenizer"].numpy().tobytes())


def restore(checkpoint: dict) -> tuple[Transducer, Tokenizer, FeatureConfig]:
    """Model with averaged weights in evaluation mode, tokenizer and front end of a checkpoint."""
    model = Transducer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["ema"])
    features = FeatureConfig(**checkpoint["feature_config"])
    return model.eval(), stored_tokenizer(checkpoint), features


def evaluation_batches(utterances: Sequence[data.Utterance], batch_size: int) -> list[list[int]]:
    """Batches of indices, longest first: they need little padding, and the largest comes first."""
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


@torch.no_grad()
def ctc_greedy_decode(model: Transducer, feats: Tensor, feat_lens: Tensor) -> list[list[int]]:
    """Most likely class at every label position of the CTC head: (B, T_in, D) -> B label lists.

    Equal neighbours count once and blanks not at all (Graves et al. 2006). It shows what the
    encoder has learnt while the CTC head is trained alone.
    """
    no_targets = feat_lens.new_zeros(len(feats), 0)
    outputs = model(feats, feat_lens, no_targets, ctc_alone=True)
    hypotheses = []
    for classes, n in zip(outputs.ctc_logits.argmax(-1), outputs.ctc_lens.tolist(), strict=True):
        labels = classes[:n].unique_consecutive().tolist()
        hypotheses.append([label for label in labels if label != model.cfg.blank])
    return hypotheses


def decode_batches(model: Transducer, tokenizer: Tokenizer, batches: Iterable[Batch],
                   search: Callable[..., list[list[int]]] = greedy_decode,
                   ) -> tuple[dict[str, str], Counter]:
    """Searches by `greedy_decode` or `ctc_greedy_decode`.

    Returns:
        Utterance id -> hypothesis, and the numbers of encoder "frames", of emitted "labels", and of
        hypotheses that were "cut" at MAX_SYMBOLS.
    """
    texts, counts = {}, Counter()
    for batch in batches:
        labels = search(model, batch.feats, batch.feat_lens)
        texts.update(zip(batch.ids, map(tokenizer.decode, labels), strict=True))
        counts["frames"] += int(model.num_frames(batch.feat_lens).sum())
        counts["labels"] += sum(map(len, labels))
        counts["cut"] += sum(len(ids) > MAX_SYMBOLS for ids in labels)
    return texts, counts


def score_split(args: argparse.Namespace, checkpoint: dict) -> None:
    """Prints the scores of a split and writes its hypotheses."""
    model, tokenizer, cfg = restore(checkpoint)
    utterances = data.read_split(args.data, args.split, cfg)
    out = Path(args.hypotheses or Path(args.checkpoint).parent / f"{Path(args.split).name}.tsv")
    check_outputs([str(out)], [])
    started = time.perf_counter()
    batches = evaluation_batches(utterances, args.batch_size)
    loader = data.batch_loader(data.SpeechDataset(utterances, None, cfg), batches, num_workers=1)
    bar = tqdm(loader, desc=args.split, unit="batch", total=len(batches), disable=None, leave=False)
    texts, counts = decode_batches(model, tokenizer, bar)
    seconds = time.perf_counter() - started
    rows = [f"{u.id}\t{texts[u.id]}\t{u.text}\n" for u in utterances]
    writers.write_text(str(out), "".join(["id\thypothesis\treference\n", *rows]))

    hypotheses, references = [texts[u.id] for u in utterances], [u.text for u in utterances]
    errors, words = word_errors(hypotheses, references)
    wer = 100 * error_rate(errors, words)
    cer = 100 * error_rate(*char_errors(hypotheses, references))
    rtf = seconds / sum(u.duration_s for u in utterances)
    print(f"{args.split}: WER {wer:.2f} % ({errors:,} errors in {words:,} words), "
          f"CER {cer:.2f} %, real-time factor {rtf:.4f}, {seconds:.1f} s, hypotheses in {out}")
    print("\n".join(describe_errors(hypotheses, references)))
    frames, labels = counts["frames"], counts["labels"]  # one blank per frame
    print(f"blank ratio: {frames / (frames + labels):.3f}, {labels / frames:.3f} symbols a frame")
    if labels < words / 10:
        print(f"the model emits (almost) only blanks: {labels:,} symbols for {words:,} words")
    if counts["cut"]:
        print(f"{counts['cut']} hypotheses were cut: after {MAX_SYMBOLS} symbols evaluation "
              "searches no further frame")


# ----------------------------------------------------------------------------- transcribing files


@torch.no_grad()
def find_paths(model: Transducer, feats: list[Tensor]) -> list[list[Arc]]:
    """Searches pieces, (T_in, D) each, without a limit on all symbols; returns their paths.

    A batch of more than MAX_FRAMES padded frames is decoded in halves.
    """
    feat_lens = torch.tensor([len(f) for f in feats])
    half = len(feats) // 2
    if half and len(feats) * feat_lens.max() > MAX_FRAMES:
        return find_paths(model, feats[:half]) + find_paths(model, feats[half:])
    padded = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)  # (B, T_in, D)
    paths: list[list[Arc]] = [[] for _ in feats]
    greedy_search(model, *model.encode(padded, feat_lens), max_symbols=sys.maxsize, paths=paths)
    return paths


def decode_pieces(pieces: Sequence[Piece], model: Transducer, tokenizer: Tokenizer,
                  cfg: FeatureConfig, keep_samples: bool = False) -> list[Segment]:
    """Decodes pieces as one batch; times are those of their recordings."""
    frame_s = model.cfg.reduction * cfg.frame_s
    paths = find_paths(model, [features(piece.samples, cfg) for piece in pieces])
    segments = []
    for piece, path in zip(pieces, paths, strict=True):
        first, end = nonsilent_region(piece.samples, cfg)
        start_s = piece.start_s + first / cfg.sample_rate_hz
        samples = piece.samples[first:end] if keep_samples else None
        segments.append(segment_of(path, tokenizer, frame_s, start_s, samples))
    return segments


def readable_pieces(path: str, cfg: FeatureConfig) -> Iterator[Piece | None]:
    """The pieces of a file; if it cannot be read to its end, names it on stderr and yields None."""
    try:
        yield from read_pieces(path, cfg)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        yield None


def transcribe_files(paths: Sequence[str], model: Transducer, tokenizer: Tokenizer,
                     cfg: FeatureConfig, batch_size: int, keep_samples: bool = False,
                     ) -> Iterator[Transcription | None]:
    """Transcribes files of any length in their order; yields None for one that cannot be read.

    Pieces of several files make a batch, so that many short files are decoded as fast as one long
    file. A progress bar shows the share of the files that is decoded.
    """
    queue: list[tuple[Transcription, Piece]] = []
    complete: list[Transcription] = []  # files read to their end; only pieces in the queue are left
    bar = tqdm(total=len(paths), desc="files", disable=None, leave=False,
               bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")

    def decode_queue() -> Iterator[Transcription]:
        pieces = [piece for _, piece in queue]
        segments = decode_pieces(pieces, model, tokenizer, cfg, keep_samples) if queue else []
        for (transcription, piece), segment in zip(queue, segments, strict=True):
            transcription.segments.append(segment)
            bar.update(piece.share)
        yield from complete
        queue.clear()
        complete.clear()

    with bar:
        for path in paths:
            transcription = Transcription(path, [])
            for piece in readable_pieces(path, cfg):
                if piece is None:
                    yield None
                    break
                queue.append((transcription, piece))
                if len(queue) == batch_size:
                    yield from decode_queue()
            else:
                complete.append(transcription)
        yield from decode_queue()


def find_reference(path: str) -> str | None:
    """Text of an audio file in the .trans.txt beside it, if there is one."""
    file = Path(path).resolve()  # ids must begin with the names of the file's folders
    for transcript in file.parent.glob("*.trans.txt"):
        for line in data.read_transcripts(transcript):
            if isinstance(line, data.Line) and line.id == file.stem:
                return line.text
    return None


def label_words(words: Sequence[Word], reference: str | None,
                start_s: float) -> list[tuple[float, str, str]]:
    """Time, label and colour of each word; errors are red: HEARD (SAID), +inserted, -missing.

    A missing word stands where the word before it ends, or at `start_s`.
    """
    texts = [w.text for w in words]
    labels, end_s, remaining = [], start_s, iter(words)
    for heard, said in align(texts, texts if reference is None else reference.split()):
        if heard is None:
            labels.append((end_s, f"-{said}", "red"))
            continue
        word = next(remaining)
        end_s = word.end_s
        label = heard if heard == said else f"+{heard}" if said is None else f"{heard} ({said})"
        labels.append((word.start_s, label, "black" if heard == said else "red"))
    return labels


def write_files(args: argparse.Namespace, transcriptions: Sequence[Transcription],
                cfg: FeatureConfig, frame_s: float) -> None:
    """Writes the files that the command line asks for."""
    if args.ctm:
        writers.write_ctm(args.ctm, transcriptions, frame_s)
    if args.json:
        writers.write_json(args.json, transcriptions, frame_s)
    for t in transcriptions:  # one at most for these three
        if args.srt:
            writers.write_srt(args.srt, t)
        if args.vtt:
            writers.write_vtt(args.vtt, t)
        if args.plot:
            start_s = t.segments[0].start_s if t.segments else 0.0
            labels = label_words(t.words, find_reference(t.path), start_s)
            writers.plot(args.plot, t.segments, labels, cfg, frame_s)


def check_outputs(outputs: Sequence[str], recordings: Sequence[str]) -> None:
    """Raises ValueError or OSError, before anything is decoded, for a path that is a recording or
    cannot be written.

    The shell may put a recording behind a flag, as in `--json *.m4a`.
    """
    suffixes = {Path(path).suffix.lower() for path in recordings} - {""}
    for path in outputs:
        if is_audio(path) or path in recordings or Path(path).suffix.lower() in suffixes:
            raise ValueError(f"{path}: a recording, expected the file to write behind its flag")
    for path in outputs:
        if not Path(path).is_fifo():  # its reader would take this for the end
            open(path, "a").close()


def transcribe(args: argparse.Namespace, checkpoint: dict) -> bool:
    """Prints a line for every readable file; returns whether everything was readable."""
    model, tokenizer, cfg = restore(checkpoint)
    paths, num_failed = list_audio(args.audio)
    for flag in ("srt", "vtt", "plot"):
        if getattr(args, flag) and len(paths) != 1:
            raise ValueError(f"--{flag}: {len(paths)} audio files, expected 1")
    outputs = list(filter(None, (args.ctm, args.json, args.srt, args.vtt, args.plot)))
    check_outputs(outputs, paths)
    kept: list[Transcription] = []
    frame_s = model.cfg.reduction * cfg.frame_s
    transcribed = transcribe_files(paths, model, tokenizer, cfg, args.batch_size, bool(args.plot))
    try:
        for transcription in transcribed:
            if transcription is None:
                num_failed += 1
                continue
            if outputs:
                kept.append(transcription)
            tqdm.write(f"{transcription.path}\t{transcription.text}")
            sys.stdout.flush()
    except BaseException:  # Ctrl-C, for example, loses only the files that are not done
        if kept:
            with suppress(OSError, ValueError):
                write_files(args, kept, cfg, frame_s)
        raise
    write_files(args, kept, cfg, frame_s)
    return num_failed == 0


# ---------------------------------------------------------------------------------------- streams

PAUSE_S = 1.0  # seconds without speech that end a sentence of a stream


class Stream:
    """Recognises speech while it is spoken: samples in, in pieces of any size, text so far out.

        stream = Stream("out/mine/best.pt")
        for samples in microphone:  # (n,) float32 at the model's rate
            print(stream.accept(samples))
        print(stream.finish())

    Audio is decoded in steps of one encoder frame, so it does not matter in which pieces it
    comes, and the words of a sentence are those that it has as a recording of its own. They come
    as much later as the model looks ahead. A sentence ends when `pause_s` seconds bring neither
    speech nor words. A sentence longer than the longest training utterance ends at a shorter pause,
    and at twice that length without one. Then all states start anew: a stream may run for days.
    `sentences` has the ended sentences, which the caller may clear. Their times are those of their
    first and last word; their arcs count frames from the beginning of the sentence's audio.

    He et al. (2019), arXiv:1811.06621.
    """

    def __init__(self, checkpoint: dict | str | Path, pause_s: float = PAUSE_S) -> None:
        """Takes a checkpoint or its path.

        Raises:
            ValueError: the model needs the whole recording.
        """
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        self.model, self.tokenizer, self.cfg = restore(checkpoint)
        if self.cfg.trim or self.cfg.normalize != "none" or self.model.cfg.bidirectional:
            raise ValueError("this model needs the whole recording: a stream needs a model that "
                             "train.py trained with --no-trim --normalize none --no-bidirectional")
        self.pause_s = pause_s
        self.frame_s = self.model.cfg.reduction * self.cfg.frame_s
        self.step = self.cfg.hop * self.cfg.splice * self.model.cfg.reduction  # samples
        self.reach = -(-self.cfg.window // (2 * self.cfg.hop))  # hops in half a window
        self.sentences: list[Segment] = []
        self.waiting = np.zeros(0, np.float32)  # samples that do not fill a step
        self.levels: deque[float] = deque(maxlen=round(BLOCK_S / self.frame_s))  # of the last steps
        self.begin(0)

    def begin(self, first: int) -> None:
        """Starts a sentence at sample number `first` of the stream."""
        self.first, self.num_samples = first, 0
        self.context = np.zeros(0, np.float32)  # last samples, which later frames need again
        self.mels = torch.zeros(0, self.cfg.num_mels)  # frames that do not fill an encoder frame
        self.encoder_state = self.search_state = None
        self.labels: list[int] = []
        self.arcs: list[Arc] = []
        self.quiet_s = 0.0

    @property
    def current(self) -> str:
        """Text of the sentence that has not ended."""
        return self.tokenizer.decode(self.labels)

    @property
    def text(self) -> str:
        """Text of `sentences` and of the sentence that has not ended."""
        return " ".join(filter(None, [*(s.text for s in self.sentences), self.current]))

    def accept(self, samples: np.ndarray) -> str:
        """Takes (n,) samples, float32 in [-1, 1] at the model's rate; returns the text so far.

        Raises:
            ValueError: the samples have another form, or are not finite.
        """
        samples = np.asarray(samples)
        if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all():
            raise ValueError(f"samples {samples.shape} of {samples.dtype}: expected (n,) finite "
                             "floating-point numbers in [-1, 1]")
        self.waiting = np.concatenate([self.waiting, samples.astype(np.float32)])
        while len(self.waiting) >= self.step:
            samples, self.waiting = self.waiting[: self.step], self.waiting[self.step :]
            self.take_step(samples)
        return self.text

    def finish(self) -> str:
        """Decodes what is left and ends the sentence; returns the text of the stream."""
        self.end(self.waiting)
        self.begin(self.first + self.num_samples)
        self.waiting = self.waiting[:0]
        return self.text

    def take_step(self, samples: np.ndarray) -> None:
        """Decodes (step,) samples and ends the sentence if it is over."""
        num_labels = len(self.labels)
        self.decode(samples)
        level = float(decibels(np.square(samples, dtype=np.float64).mean()))
        self.levels.append(level)
        speech_db, pause_db = thresholds(np.array(self.levels))
        if level > speech_db or len(self.labels) > num_labels:
            self.quiet_s = 0.0
        elif level < pause_db or self.quiet_s > 0:
            self.quiet_s += self.frame_s
        length_s = self.num_samples / self.cfg.sample_rate_hz
        # The pause that ends a sentence shrinks beyond the longest training utterance, to nothing.
        patience = min(1.0, 2 - length_s / self.cfg.max_utterance_s)
        if (self.labels or patience < 1) and self.quiet_s >= self.pause_s * patience:
            # The next word may have begun softly: a quiet step starts the next sentence as well.
            again = samples if self.quiet_s > 0 else samples[:0]
            self.end(samples[:0])
            self.begin(self.first + self.num_samples - len(again))
            self.decode(again)

    def end(self, samples: np.ndarray) -> None:
        """Decodes the last samples of the sentence, and moves it to `sentences` if it has words."""
        self.decode(samples, is_last=True)
        start_s = self.first / self.cfg.sample_rate_hz
        sentence = segment_of(self.arcs, self.tokenizer, self.frame_s, start_s)
        if words := sentence.words:
            self.sentences.append(
                sentence._replace(start_s=words[0].start_s, end_s=words[-1].end_s))

    @torch.no_grad()
    def decode(self, samples: np.ndarray, is_last: bool = False) -> None:
        """Continues the sentence with all encoder frames that (n,) samples complete."""
        start = self.num_samples
        self.num_samples += len(samples)
        if self.num_samples == 0:
            return
        chunk = np.concatenate([self.context, dither(samples, start, self.cfg)])
        mels = scale_fixed(log_mel(chunk, self.cfg))  # (frames, 80)
        # Frames at the chunk's ends would see its mirror image. The frames at its beginning have
        # been decoded; the frames at its end wait for their samples unless the sentence ends there.
        num_decoded = len(self.context) // self.cfg.hop + 1 - self.reach
        mels = mels[max(0, num_decoded) :]
        if not is_last:
            mels = mels[: -self.reach]
        self.context = chunk[-2 * self.reach * self.cfg.hop :]
        self.mels = torch.cat([self.mels, mels])
        group = self.cfg.splice * self.model.cfg.reduction  # log-mel frames of an encoder frame
        end = len(self.mels) if is_last else len(self.mels) // group * group
        if end:
            feats = splice(self.mels[:end], self.cfg)[None]  # (1, T_in, D)
            self.mels = self.mels[end:]
            encoded, self.encoder_state = self.model.encode_chunk(feats, self.encoder_state,
                                                                  is_last)
            (labels,), self.search_state = greedy_search(
                self.model, encoded, torch.tensor([encoded.shape[1]]), self.search_state,
                max_symbols=sys.maxsize, paths=[self.arcs])
            self.labels += labels


# The headers of WAV, FLAC, Ogg, MP3, AIFF, AU, large WAV and CAF begin with these bytes.
HEADERS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"RF64", b"caff")


def read_pcm(file: BinaryIO) -> Iterator[np.ndarray]:
    """(n,) samples in [-1, 1) of raw 16-bit little-endian audio, as soon as they are there.

    Raises:
        ValueError: the audio begins with the header of a file format.
    """
    rest, is_first = b"", True
    while new := file.read1(2**16):
        if is_first and new.startswith(HEADERS):
            raise ValueError("standard input has the header of an audio file, and --stream takes "
                             "raw samples: `arecord -t raw`, or - instead of --stream for a file")
        is_first = False
        received = rest + new
        even = len(received) // 2 * 2
        rest = received[even:]
        yield np.frombuffer(received[:even], "<i2").astype(np.float32) / 32768


def print_new_text(stream: Stream, shown: str) -> str:
    """Prints the text after `shown`, the part of the last line that stands there already.

    Every ended sentence is a line and is dropped from the stream; returns the last line.
    """
    text = "".join(f"{sentence.text}\n" for sentence in stream.sentences) + stream.current
    stream.sentences.clear()
    print(text[len(shown) :], end="", flush=True)
    return text.rpartition("\n")[2]


def print_sentences(stream: Stream, _shown: str) -> str:
    """Prints every ended sentence as a line of JSON and drops it from the stream."""
    for s in stream.sentences:
        words = [word._asdict() for word in s.words]
        print(json.dumps({"start_s": s.start_s, "end_s": s.end_s, "text": s.text, "words": words}),
              flush=True)
    stream.sentences.clear()
    return ""


def transcribe_stream(args: argparse.Namespace, checkpoint: dict) -> None:
    """Prints what is said on standard input, until it ends or the user presses Ctrl-C."""
    stream = Stream(checkpoint, args.pause_s or PAUSE_S)
    if sys.stdin.buffer.isatty():
        raise ValueError("standard input is a terminal; --stream reads raw audio from a pipe")
    print(f"listening: raw audio, 16 bits, one channel, {stream.cfg.sample_rate_hz} Hz",
          file=sys.stderr)
    show, shown = print_sentences if args.json else print_new_text, ""
    try:
        for samples in read_pcm(sys.stdin.buffer):
            stream.accept(samples)
            shown = show(stream, shown)
    finally:
        stream.finish()
        show(stream, shown)


# ----------------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """The command line; a wrong one ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("audio", nargs="*", help="audio files, or folders of them, to transcribe; "
                        "- is standard input")
    parser.add_argument("--checkpoint", required=True, help="best.pt or checkpoint-*.pt")
    parser.add_argument("--data", help="corpus root; with --split: score that split")
    parser.add_argument("--split", help="folder below --data, e.g. dev-clean")
    parser.add_argument("--hypotheses", help="where --split writes; default beside the checkpoint")
    parser.add_argument("--ctm", help="where to write word times and confidences, NIST's form")
    parser.add_argument("--json", nargs="?", const="-", help="where to write words with times as "
                        "JSON; with --stream it has no file and prints an object per sentence")
    parser.add_argument("--srt", help="where to write subtitles of one audio file, SubRip's form")
    parser.add_argument("--vtt", help="where to write subtitles of one audio file, WebVTT's form")
    parser.add_argument("--plot", help="where to draw one audio file with its words")
    parser.add_argument("--stream", action="store_true", help="transcribe raw audio from standard "
                        "input while it comes: 16-bit little-endian, one channel, the model's rate")
    parser.add_argument("--pause-s", type=float, help="seconds without speech that end a line of "
                        f"--stream ({PAUSE_S})")
    parser.add_argument("--batch-size", type=int, help="recordings, or pieces of them, that are "
                        f"decoded at a time ({BATCH_SIZE})")
    args = parser.parse_args()
    num_sources = bool(args.audio) + bool(args.data) + args.stream
    if bool(args.data) != bool(args.split) or num_sources != 1:
        parser.error("give either audio files, or --data and --split, or --stream")
    json_file = args.json != "-" and args.json
    if not args.audio and (args.ctm or json_file or args.srt or args.vtt or args.plot):
        parser.error("--ctm, --json FILE, --srt, --vtt and --plot are for audio files")
    if args.plot and Path(args.plot).suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot: {args.plot}, expected a name that ends in .png, .pdf or .svg")
    if args.json == "-" and not args.stream:
        parser.error("--json needs a file, unless --stream is given")
    if args.hypotheses and not args.data:
        parser.error("--hypotheses is for --data and --split")
    if args.batch_size is None:
        args.batch_size = BATCH_SIZE
    elif args.stream or args.batch_size < 1:
        parser.error(f"--batch-size: {args.batch_size}, expected at least 1, and no --stream")
    if args.pause_s is not None and not (args.stream and args.pause_s > 0):
        parser.error(f"--pause-s: {args.pause_s}, expected more than 0, and --stream")
    return args


def run(args: argparse.Namespace) -> int:
    """Does what the command line asks for; returns 1 if anything could not be read."""
    checkpoint = load_checkpoint(args.checkpoint)
    if args.audio:
        return 0 if transcribe(args, checkpoint) else 1
    if args.stream:
        transcribe_stream(args, checkpoint)
    else:
        score_split(args, checkpoint)
    return 0


def main() -> int:
    """Exit status: 0, 1 if anything could not be read or written, 2 for a wrong command line,
    130 after Ctrl-C, 141 if the reader of standard output has closed it."""
    args = parse_arguments()
    torch.set_flush_denormal(True)  # denormal numbers slow LSTMs down
    for stream in (sys.stdout, sys.stderr):  # file names need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        status = run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes standard output once more at exit and would report the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError) as error:
        print(data.error_message(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    warnings.formatwarning = data.warning_line
    sys.exit(main())
