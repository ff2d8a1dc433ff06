# SPDX-License-Identifier: Apache-2.0
"""Greedy transducer decoding and word error rate.

    python decode.py --checkpoint out/demo/best.pt a.flac b.wav      # prints `path<TAB>text`
    python decode.py --checkpoint out/demo/best.pt --data data/demo --split dev-demo

The second form prints WER, errors and real-time factor, and writes hypotheses beside their
references. Architecture, front end and tokenizer come from the checkpoint; the weights are the
exponential moving average that training evaluates.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import data
from data import Batch, FeatureConfig, Tokenizer
from model import ModelConfig, Transducer

MAX_SYMBOLS_PER_FRAME = 30  # of the original (rnnt/decoder.py:309); one frame is 240 ms
CHECKPOINT_FORMAT = 2
MAX_SYMBOLS = 300  # likewise (--max_symbol_per_sample); checked when a new frame starts


# -------------------------------------------------------------------------------- greedy search


@torch.no_grad()
def greedy_decode(model: Transducer, feats: Tensor, feat_lens: Tensor,
                  max_symbols_per_frame: int = MAX_SYMBOLS_PER_FRAME,
                  max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:  # fmt: skip
    """Most likely class at every lattice node on one path: (B, T_in, D) -> B label lists.

    At its frame t an utterance emits labels until blank is the most likely class or
    `max_symbols_per_frame` are out; then t advances. The prediction network's state moves on
    emitted labels alone. No frame is started with more than `max_symbols` labels. Every
    utterance walks its own path: one iteration takes one arc in each utterance that is not at
    its end, so a batch gives what each utterance gives alone.
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
    rows = torch.arange(len(feats), device=feats.device)  # utterances not at their end
    while len(rows):
        label = joint(encoded[rows, frame[rows]], predicted[rows]).argmax(-1)  # (rows,)
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
    return hypotheses


# ------------------------------------------------------------------------------ word error rate


def levenshtein(a: Sequence, b: Sequence) -> int:
    """Least number of insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


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


class DamagedCheckpoint(ValueError):
    """Not what was written: truncated, or a bit of it flipped."""


def digest(value: object) -> str:
    """SHA-256 of everything in a checkpoint. torch.load checks no sums of its own."""
    sha = hashlib.sha256()

    def feed(item: object) -> None:
        if isinstance(item, Tensor):
            sha.update(f"{item.dtype} {tuple(item.shape)}".encode())
            sha.update(item.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(item, Mapping):
            for key, inner in item.items():
                feed(key)
                feed(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                feed(inner)
        else:
            sha.update(repr(item).encode())

    feed(value)
    return sha.hexdigest()


def load_checkpoint(path: str | Path) -> dict:
    """What train.save_checkpoint wrote; no code in it is run.

    Raises:
        OSError: missing, or cannot be read.
        DamagedCheckpoint: not readable, or its checksum is wrong.
        ValueError: of another program or another version of this one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with open(path, "rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - zipfile, pickle and torch raise all kinds here
            raise DamagedCheckpoint(f"{path}: not readable as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path}: not a checkpoint of train.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{path}: format {checkpoint['format']}, this version reads {CHECKPOINT_FORMAT}"
        )
    if checkpoint.pop("sha256", None) != digest(checkpoint):
        raise DamagedCheckpoint(f"{path}: damaged: the checksum is wrong")
    return checkpoint


def restore(checkpoint: dict) -> tuple[Transducer, Tokenizer, FeatureConfig]:
    """Model with averaged weights in evaluation mode, tokenizer and front end."""
    model = Transducer(ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["ema"])
    tokenizer = Tokenizer(checkpoint["tokenizer"].numpy().tobytes())
    return model.eval(), tokenizer, FeatureConfig(**checkpoint["feature_config"])


# ------------------------------------------------------------------------------------ evaluation


def decode_batches(model: Transducer, tokenizer: Tokenizer,
                   batches: Iterable[Batch]) -> dict[str, str]:  # fmt: skip
    """Utterance id -> hypothesis."""
    texts = {}
    for batch in batches:
        labels = greedy_decode(model, batch.feats, batch.feat_lens)
        texts.update(zip(batch.ids, map(tokenizer.decode, labels), strict=True))
    return texts


def evaluation_batches(utterances: Sequence[data.Utterance], batch_size: int) -> list[list[int]]:
    """Indices by falling duration: little padding, and the largest batch comes first."""
    order = sorted(range(len(utterances)), key=lambda i: -utterances[i].duration_s)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def score_split(args: argparse.Namespace, checkpoint: dict) -> None:
    model, tokenizer, features = restore(checkpoint)
    utterances = data.read_split(args.data, args.split, features)
    started = time.perf_counter()
    dataset = data.SpeechDataset(utterances, None, features)
    batches = evaluation_batches(utterances, args.batch_size)
    texts = decode_batches(model, tokenizer, data.batch_loader(dataset, batches, num_workers=1))
    seconds = time.perf_counter() - started
    errors, words = word_errors([texts[u.id] for u in utterances], [u.text for u in utterances])
    rtf = seconds / sum(u.duration_s for u in utterances)
    out = Path(args.hypotheses or Path(args.checkpoint).parent / f"{args.split}.tsv")
    rows = [f"{u.id}\t{texts[u.id]}\t{u.text}\n" for u in utterances]
    out.write_text("".join(["id\thypothesis\treference\n", *rows]), encoding="utf-8")
    wer = 100 * word_error_rate(errors, words)
    print(f"{args.split}: WER {wer:.2f} % ({errors:,} errors in {words:,} words), "
          f"real-time factor {rtf:.4f}, {seconds:.1f} s, hypotheses in {out}")  # fmt: skip


def list_audio(words: Sequence[str]) -> list[str]:
    """Files as given; of a folder all audio in it and below, by name."""
    paths: list[str] = []
    for word in words:
        if Path(word).is_dir():
            inside = sorted(p for p in Path(word).rglob("*") if p.suffix in data.FORMATS)
            if not inside:
                raise ValueError(f"{word}: no {', '.join(data.FORMATS)} files in this folder")
            paths += map(str, inside)
        else:
            paths.append(word)
    return paths


def transcribe(args: argparse.Namespace, checkpoint: dict) -> int:
    """Prints a line for every readable file; returns how many were not."""
    model, tokenizer, cfg = restore(checkpoint)
    failed = 0
    paths = list_audio(args.audio)
    for start in range(0, len(paths), args.batch_size):
        feats = {}
        for path in paths[start : start + args.batch_size]:
            try:
                feats[path] = data.features(data.load_audio(path, cfg), cfg)
            except (OSError, ValueError) as error:
                print(error, file=sys.stderr)
                failed += 1
        if feats:
            lens = torch.tensor([len(f) for f in feats.values()])
            padded = torch.nn.utils.rnn.pad_sequence(list(feats.values()), batch_first=True)
            labels = greedy_decode(model, padded, lens)
            for path, ids in zip(feats, labels, strict=True):
                print(f"{path}\t{tokenizer.decode(ids)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("audio", nargs="*", help="audio files, or folders of them, to transcribe")
    parser.add_argument("--checkpoint", required=True, help="best.pt or checkpoint-*.pt")
    parser.add_argument("--data", help="corpus root; with --split: score that split")
    parser.add_argument("--split", help="folder below --data, e.g. dev-clean")
    parser.add_argument("--hypotheses", help="where --split writes; default beside the checkpoint")
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    if bool(args.data) != bool(args.split) or bool(args.audio) == bool(args.data):
        parser.error("give either audio files, or --data and --split")
    if args.batch_size < 1:
        parser.error(f"--batch-size: {args.batch_size}, expected at least 1")
    torch.set_flush_denormal(True)
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        if args.data:
            score_split(args, checkpoint)
        elif transcribe(args, checkpoint):
            return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
