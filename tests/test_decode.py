# SPDX-License-Identifier: Apache-2.0
"""decode.py walks the most likely path, counts word errors, and its command line reports both:

    python -m pytest tests/test_decode.py

Greedy search on lattices written by hand, against a decoder of one utterance that computes
everything anew, and where ../shared exists against the original's; WER against published
vectors and a search over edits; the command line on tones and a model with random weights.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import seedrun
import soundfile
import torch
from tones import REPO, write_tones
from torch import nn

import data
import decode
import features
import train
from checkpoint import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint
from data import Tokenizer
from features import FeatureConfig
from model import ModelConfig, Transducer

MISC = REPO.parent / "shared" / "oracles" / "misc_oracles.json"
needs_misc = pytest.mark.skipif(not MISC.is_file(), reason="../shared/oracles is not here")


# ---------------------------------------------------------------------------- lattices by hand


class CountingPredictor(nn.Module):
    """Its output is the number of labels so far; it writes down the labels it was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def start(self, batch):
        return torch.zeros(batch, 1), (torch.zeros(1, batch, 1), torch.zeros(1, batch, 1))

    def step(self, labels, state):
        self.given.append(labels.tolist())
        assert torch.equal(state[0], state[1])
        return state[0][0] + 1, (state[0] + 1, state[1] + 1)


class Lattice(nn.Module):
    """Stands for a Transducer: at frame t, after u labels, arcs[b][t, u] is the likeliest class.

    Where arcs[b] has no entry, that is blank.
    """

    def __init__(self, arcs):
        super().__init__()
        self.arcs, self.cfg = arcs, ModelConfig(vocab_size=9)
        self.predictor = CountingPredictor()
        self.joint_network = lambda encoded, predicted: self.joint(encoded, predicted)
        self.joint_network.predictor_projection = nn.Identity()

    def encode(self, feats, feat_lens):
        """The encoder output of a frame is its (b, t)."""
        b, t = (torch.arange(n) for n in feats.shape[:2])
        return torch.stack(torch.meshgrid(b, t, indexing="ij"), -1), feat_lens

    def joint(self, encoded, predicted):
        nodes = zip(encoded.tolist(), predicted.int().tolist(), strict=True)
        likeliest = [self.arcs[b].get((t, u), self.cfg.blank) for (b, t), (u,) in nodes]
        return nn.functional.one_hot(torch.tensor(likeliest), self.cfg.vocab_size).float()


def walk(arcs, lens, **caps):
    """Hypotheses and what the predictor was given."""
    model = Lattice(arcs).eval()
    feats = torch.zeros(len(lens), max(lens), 1)
    return decode.greedy_decode(model, feats, torch.tensor(lens), **caps), model.predictor.given


def test_an_utterance_without_frames_has_no_labels():
    arcs = [{(0, 0): 1}, {(0, 0): 2}]
    assert walk(arcs, [0, 1])[0] == [[], [2]]
    assert walk(arcs[:1], [0])[0] == [[]]


def never_blank(frames, most=400):
    return {(t, u): 3 for t in range(frames) for u in range(most)}


def test_the_path_of_a_hand_made_lattice_is_followed():
    arcs = [{(0, 0): 1, (0, 1): 2, (2, 2): 3}, {(1, 0): 4}, {}]
    assert walk(arcs, [3, 2, 3])[0] == [[1, 2, 3], [4], []]


def test_label_0_is_emitted_and_blank_is_not():
    assert walk([{(0, 0): 0, (1, 1): 8, (2, 1): 7}], [3])[0] == [[0, 7]]


def test_the_predictor_takes_emitted_labels_alone():
    # Were its state to move on blank, (3, 1) and (4, 2) would not be reached.
    assert walk([{(0, 0): 5, (3, 1): 0, (4, 2): 6}], [5]) == ([[5, 0, 6]], [[5], [0], [6]])


def test_frames_past_an_utterances_length_are_not_read():
    arcs = [{(0, 0): 1, (2, 1): 7}, {(2, 0): 2}]
    assert walk(arcs, [2, 3])[0] == [[1], [2]]


@pytest.mark.parametrize("cap", [1, 2, 3, 30])
def test_a_frame_emits_exactly_its_cap_of_symbols(cap):
    assert walk([never_blank(4)], [4], max_symbols_per_frame=cap)[0] == [[3] * (4 * cap)]


def test_every_frame_has_the_whole_cap_whatever_earlier_frames_emitted():
    arcs = {(0, 0): 1, (0, 1): 1} | {(1, u): 2 for u in range(50)}  # two labels and a blank
    assert walk([arcs], [2], max_symbols_per_frame=3)[0] == [[1, 1, 2, 2, 2]]


# misc_oracles.json, decoder.never_blank_lengths; the rule is in rnnt/decoder.py:309-349 of the
# original: the cap on all symbols counts when a frame starts, and more than the cap is too many.
@pytest.mark.parametrize(
    ("per_frame", "cap", "lengths"),
    [(30, 300, [240, 150, 240]), (30, 100, [120, 120, 120]), (2, 3, [4, 4, 4])],
)
def test_no_frame_starts_with_more_symbols_than_the_cap(per_frame, cap, lengths):
    hypotheses, _ = walk([never_blank(8)] * 3, [8, 5, 8], max_symbols_per_frame=per_frame,
                         max_symbols=cap)
    assert [len(h) for h in hypotheses] == lengths


def test_exactly_the_cap_of_symbols_lets_one_more_frame_start():
    assert len(walk([never_blank(9)], [9], max_symbols_per_frame=2, max_symbols=4)[0][0]) == 6


def test_the_default_caps_are_the_originals():
    assert [len(h) for h in walk([never_blank(14), never_blank(2)], [14, 2])[0]] == [330, 60]


def test_one_frame_is_enough():
    assert walk([{(0, 0): 1, (0, 1): 2}, {}], [1, 1])[0] == [[1, 2], []]


def test_the_path_is_handed_over_arc_by_arc():
    model = Lattice([{(0, 0): 1, (0, 1): 2, (2, 2): 3}, {}]).eval()
    paths = []
    decode.greedy_decode(model, torch.zeros(2, 3, 1), torch.tensor([3, 1]), arcs=paths)
    blank = model.cfg.blank
    taken = [(0, 1), (0, 2), (0, blank), (1, blank), (2, 3), (2, blank)]
    assert [[(a.frame, a.label) for a in path] for path in paths] == [taken, [(0, blank)]]
    # The likeliest of 9 classes has logit 1, the others 0.
    likeliest, other = 1 - math.log(math.e + 8), -math.log(math.e + 8)
    for arc in paths[0]:
        assert arc.log_prob == pytest.approx(likeliest)
        assert arc.blank_log_prob == pytest.approx(likeliest if arc.label == blank else other)


# ---------------------------------------------------------------------------------- random models


def random_model(seed, **sizes):
    """Weights so large that the likeliest class changes from frame to frame and label to label."""
    cfg = ModelConfig(**{**dict(
        feature_size=5, vocab_size=6, enc_hidden=8, pre_layers=1, stack=2, post_layers=1,
        pred_hidden=6, pred_layers=2, joint_hidden=8, normalization=seed % 2 == 0,
    ), **sizes})
    generator = torch.Generator().manual_seed(seed)
    model = Transducer(cfg).eval()
    joint = model.joint_network
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0 if "bias" in name else 2 if "layers" in name else 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        joint.encoder_projection.weight.mul_(6)
        joint.output.bias[cfg.blank] = 6
    return model


def random_batch(seed, B=5, size=5):
    generator = torch.Generator().manual_seed(1000 + seed)
    lens = torch.randint(1, 30, (B,), generator=generator)
    return torch.randn(B, int(lens.max()), size, generator=generator), lens


@torch.no_grad()
def decode_alone(model, feats, max_per_frame=30, max_symbols=300):
    """Graves' decoder with the caps, one utterance (T_in, D), no state kept: all labels anew."""
    encoded, _ = model.encode(feats[None], torch.tensor([len(feats)]))
    labels = []
    for frame in encoded[0]:
        if len(labels) > max_symbols:
            break
        for _ in range(max_per_frame):
            predicted = model.predict(torch.tensor([labels], dtype=torch.int64))[0, -1]
            label = model.joint(frame[None, None], predicted[None, None]).argmax().item()
            if label == model.cfg.blank:
                break
            labels.append(label)
    return labels


SEEDS = range(24)


@cache
def batch_hypotheses(seed):
    return decode.greedy_decode(random_model(seed), *random_batch(seed), max_symbols_per_frame=4)


def test_random_models_emit_labels_and_blanks():
    """Lest the two tests below compare empty or endless hypotheses."""
    all_lens = [random_batch(seed)[1].tolist() for seed in SEEDS]
    hypotheses = [h for seed in SEEDS for h in batch_hypotheses(seed)]
    frames = [-(-n // 2) for lens in all_lens for n in lens]
    partly = [0 < len(h) < 4 * n for h, n in zip(hypotheses, frames, strict=True)]
    assert sum(partly) > 60
    assert sum(len(h) > n for h, n in zip(hypotheses, frames, strict=True)) > 60
    assert sum(len(set(h)) > 1 for h in hypotheses) > 60


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_gives_exactly_what_each_utterance_gives_alone(seed):
    model, (feats, lens) = random_model(seed), random_batch(seed)
    alone = [
        decode.greedy_decode(model, feats[b : b + 1, :n], lens[b : b + 1], max_symbols_per_frame=4)
        for b, n in enumerate(lens)
    ]
    assert batch_hypotheses(seed) == [hypothesis for (hypothesis,) in alone]


@pytest.mark.parametrize("seed", SEEDS)
def test_decoder_agrees_with_one_that_computes_everything_anew(seed):
    model, (feats, lens) = random_model(seed), random_batch(seed)
    expected = [decode_alone(model, feats[b, :n], max_per_frame=4) for b, n in enumerate(lens)]
    assert batch_hypotheses(seed) == expected


def test_an_utterance_shorter_than_the_stack_is_one_frame():
    model = random_model(1, stack=8)
    feats, _ = random_batch(1)
    lens = torch.tensor([1, 5, 8, 9, 16][: len(feats)]).clamp_max(feats.shape[1])
    expected = [decode_alone(model, feats[b, :n]) for b, n in enumerate(lens)]
    assert decode.greedy_decode(model, feats, lens) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_of_the_path_are_the_hypothesis(seed):
    model, batch, paths = random_model(seed), random_batch(seed), []
    hypotheses = decode.greedy_decode(model, *batch, max_symbols_per_frame=4, arcs=paths)
    assert hypotheses == batch_hypotheses(seed)
    for path, hypothesis, frames in zip(paths, hypotheses, (batch[1] + 1) // 2, strict=True):
        assert [arc.label for arc in path if arc.label != model.cfg.blank] == hypothesis
        assert sorted({arc.frame for arc in path}) == list(range(frames))
        assert all(arc.log_prob >= arc.blank_log_prob for arc in path)


def test_decoding_records_no_gradient(monkeypatch):
    model, batch = random_model(0), random_batch(0)
    encode, encoded = model.encode, []

    def record(*args):
        encoded.append(encode(*args))
        return encoded[-1]

    monkeypatch.setattr(model, "encode", record)
    decode.greedy_decode(model, *batch)
    assert not encoded[0][0].requires_grad
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------- against the original's numbers


@pytest.fixture(scope="module")
def decode_model():
    return seedrun.model("dec/w/")


@seedrun.needs_seedrun
@pytest.mark.parametrize("case", range(6))
def test_hypotheses_are_the_originals(decode_model, case):
    entry = seedrun.facts()["decode"][case]
    caps = {"max_symbols_per_frame": entry["max_symbols_per_step"]}
    # The original takes None for no cap on all symbols.
    caps["max_symbols"] = entry["max_symbol_per_sample"] or 10**9
    hypotheses = decode.greedy_decode(decode_model, *seedrun.features("dec/", 3), **caps)
    assert hypotheses == entry["reference"]


@seedrun.needs_seedrun
@pytest.mark.parametrize("case", range(3))
def test_never_blank_lengths_are_the_originals(case):
    entry = seedrun.facts()["decode_never_blank"][case]
    model = seedrun.model("dec/w/")
    with torch.no_grad():
        model.joint_network.output.bias[model.cfg.blank] = -1e4
    hypotheses = decode.greedy_decode(
        model, *seedrun.features("dec/", 3), max_symbols_per_frame=entry["max_symbols_per_step"],
        max_symbols=entry["max_symbol_per_sample"],
    )
    assert [len(h) for h in hypotheses] == entry["reference_lengths"]


@needs_misc
def test_every_never_blank_vector_holds():
    for vector in json.loads(MISC.read_text(encoding="utf-8"))["decoder"]["never_blank_lengths"]:
        lens = vector["enc_lens"]
        hypotheses, _ = walk([never_blank(max(lens))] * len(lens), lens, max_symbols=vector["cap"],
                             max_symbols_per_frame=vector["max_symbols_per_step"])
        assert [len(h) for h in hypotheses] == vector["reference"]


# --------------------------------------------------------------------------------- word error rate


def wer(hypotheses, references):
    return decode.word_error_rate(*decode.word_errors(hypotheses, references))


# NVIDIA/NeMo tests/collections/asr/test_asr_metrics.py, and the last two from
# Lightning-AI/torchmetrics tests: (hypothesis, reference, WER).
PUBLISHED = [
    ("cat", "cot", 1.0), ("GPU", "G P U", 1.0), ("G P U", "GPU", 3.0),
    ("ducati motorcycle", "motorcycle", 1.0), ("ducati motorcycle", "ducuti motorcycle", 0.5),
    ("a B c", "a b c", 1 / 3), ("hello world", "hello world", 0.0), ("Firwww", "hello world", 1.0),
]


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), PUBLISHED)
def test_wer_of_published_pairs(hypothesis, reference, expected):
    assert wer([hypothesis], [reference]) == expected


def test_errors_and_words_are_summed_over_utterances():
    assert decode.word_errors(["a b", "c", ""], ["a x", "c d", "e f g"]) == (5, 7)


def test_wer_counts_words_between_any_white_space():
    assert decode.word_errors(["  the  cat\tsat "], ["the cat sat"]) == (0, 3)


def test_wer_without_reference_words_is_infinite():
    assert decode.word_errors(["one two"], [""]) == (2, 0)
    assert wer(["one two"], [""]) == wer([], []) == math.inf


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), (["a", "b"], ["a"])])
def test_unequal_counts_are_an_error_with_both(hypotheses, references):
    message = f"{len(hypotheses)} hypotheses for {len(references)} references"
    with pytest.raises(ValueError, match=message):
        decode.word_errors(hypotheses, references)


def test_wer_of_the_originals_demo():
    # The original logs 20.484347826086957 for its 1150-word demo: 23557 errors, insertions most.
    assert decode.word_error_rate(23557, 1150) == 20.484347826086957


@needs_misc
def test_every_recorded_wer_vector_holds():
    oracle = json.loads(MISC.read_text(encoding="utf-8"))["wer"]
    for vector in oracle["seed_executed"]:
        if len(vector["hyp"]) != len(vector["ref"]):  # the original drops surplus hypotheses
            with pytest.raises(ValueError, match="hypotheses for"):
                decode.word_errors(vector["hyp"], vector["ref"])
        else:
            assert wer(vector["hyp"], vector["ref"]) == float(vector["wer"])
            counts = decode.word_errors(vector["hyp"], vector["ref"])
            assert counts == (vector["edits"], vector["words"])
    for source in ("nemo_published", "torchmetrics_published"):
        for hypothesis, reference, expected in oracle[source]["vectors"]:
            assert wer([hypothesis], [reference]) == expected
    demo = oracle["seed_demo"]
    assert decode.word_error_rate(demo["edits"], demo["words"]) == demo["eval_accuracy"]


def edits_by_search(start, longest=4):
    """Breadth first: string -> least number of one-letter edits from `start`."""
    found, frontier = {start: 0}, [start]
    while frontier:
        word = frontier.pop(0)
        near = {word[:i] + word[i + 1 :] for i in range(len(word))}
        near |= {word[:i] + x + word[i + 1 :] for i in range(len(word)) for x in "ab"}
        near |= {word[:i] + x + word[i:] for i in range(len(word) + 1) for x in "ab"}
        for other in near - found.keys():
            if len(other) <= longest:
                found[other] = found[word] + 1
                frontier.append(other)
    return found


def test_levenshtein_is_the_least_number_of_edits():
    words = ["".join(letters) for n in range(5) for letters in product("ab", repeat=n)]
    for start in words:
        distance = edits_by_search(start)
        assert {word: decode.levenshtein(start, word) for word in words} == distance


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("a b c", "a b c", ["a a", "b b", "c c"]),
        ("a x c", "a b c", ["a a", "x b", "c c"]),
        ("a c", "a b c", ["a a", "- b", "c c"]),
        ("a b x c", "a b c", ["a a", "b b", "x -", "c c"]),
        ("", "a b", ["- a", "- b"]),
        ("a", "", ["a -"]),
    ],
)
def test_alignment_names_the_words_that_stand_for_each_other(hypothesis, reference, expected):
    pairs = decode.align(hypothesis.split(), reference.split())
    assert [" ".join(word or "-" for word in pair) for pair in pairs] == expected


def test_alignment_keeps_both_sides_in_order():
    for a, b in product(["".join(x) for x in product("ab", repeat=4)], repeat=2):
        pairs = decode.align(a, b)
        assert "".join(x for x, _ in pairs if x) == a
        assert "".join(y for _, y in pairs if y) == b


def test_the_most_frequent_errors_are_counted():
    hypotheses = ["ON THE SIX", "ON THE SIX", "A CAT", "SIX"]
    references = ["ON THE SEX", "ON A SEX", "CAT", "SIX OF"]
    assert decode.describe_errors(hypotheses, references) == [
        "substitutions: 3: SEX -> SIX (2), A -> THE (1)",
        "insertions: 1: A (1)",
        "deletions: 1: OF (1)",
    ]
    assert decode.describe_errors(hypotheses, references, most=1)[0].endswith("SEX -> SIX (2)")
    assert decode.describe_errors(["A"], ["A"])[1] == "insertions: 0"


def test_a_model_of_blanks_is_told_in_words():
    assert decode.describe_blanks(300, 100, 50) == ["blank ratio: 0.750, 0.333 symbols a frame"]
    _, line = decode.describe_blanks(300, 4, 50)
    assert line == "the model emits (almost) only blanks: 4 symbols for 50 words"


def test_evaluation_batches_hold_every_utterance_once_longest_first():
    lengths = [3.0, 9.0, 1.0, 7.0, 5.0]
    utterances = [data.Utterance(str(i), "", s, "") for i, s in enumerate(lengths)]
    assert decode.evaluation_batches(utterances, 2) == [[1, 3], [4, 0], [2]]


# ------------------------------------------------------------------------------------ command line

TEXTS = ["ONE TWO THREE", "TWO", "THREE ONE", "FOUR FIVE SIX"]


class Scene:
    """A corpus of tones, a checkpoint, and what its averaged weights make of each tone."""

    def __init__(self, root):
        self.root, self.checkpoint = root, root / "run" / "best.pt"
        self.checkpoint.parent.mkdir()
        self.audio = write_tones(root, "dev", TEXTS, [0.25, 0.44, 0.63, 0.81])
        tokenizer = Tokenizer(data.train_tokenizer(TEXTS, 16))
        model = random_model(
            3, feature_size=256, vocab_size=tokenizer.vocab_size, normalization=False
        )
        torch.manual_seed(4)
        other = Transducer(model.cfg)  # the weights that training goes on with
        self.contents = {
            "format": CHECKPOINT_FORMAT,
            "model": other.state_dict(), "ema": model.state_dict(),
            "model_config": asdict(model.cfg), "feature_config": asdict(FeatureConfig()),
            "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
        }
        save_checkpoint(self.checkpoint, self.contents)
        self.model, self.tokenizer = model, tokenizer
        self.feats = [features.features(features.load_audio(path)) for path in self.audio]
        alone = [(f[None], torch.tensor([len(f)])) for f in self.feats]
        self.texts = [
            tokenizer.decode(decode.greedy_decode(model, *x, max_symbols=10**9)[0]) for x in alone
        ]
        # Evaluation has a limit.
        self.labels = [decode.greedy_decode(model, *x)[0] for x in alone]
        self.scored = [tokenizer.decode(labels) for labels in self.labels]
        assert self.texts[:3] == self.scored[:3]
        assert len(self.texts[3]) > len(self.scored[3]) > decode.MAX_SYMBOLS
        assert len(set(self.texts)) == len(TEXTS), self.texts
        assert all(self.texts)

    def run(self, *words, checkpoint=None):
        command = [sys.executable, str(REPO / "decode.py"), "--checkpoint",
                   str(checkpoint or self.checkpoint), *map(str, words)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("decode"))


@pytest.fixture
def main(monkeypatch, capsys):
    """The command line in this process: words -> status, standard output, standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["decode.py", *map(str, words)])
        return decode.main(), *capsys.readouterr()

    yield run
    torch.set_flush_denormal(False)  # main turns it on for good


def test_files_are_transcribed_in_the_order_given_by_the_averaged_weights(scene):
    order = [2, 0, 3, 1]
    done = scene.run(*(scene.audio[i] for i in order), "--batch-size", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{scene.audio[i]}\t{scene.texts[i]}\n" for i in order)


def test_bad_files_are_reported_and_good_ones_transcribed_all_the_same(scene, tmp_path):
    text, empty, absent = (tmp_path / name for name in ("text.flac", "empty.wav", "absent.flac"))
    text.write_text("this is not audio")
    soundfile.write(empty, np.zeros(0, np.float32), 16000)
    done = scene.run(text, scene.audio[0], absent, empty, scene.audio[1])
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{scene.audio[i]}\t{scene.texts[i]}" for i in (0, 1)]
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(text), str(absent), str(empty)]


def test_a_folder_of_good_and_bad_files_is_transcribed(scene, main, tmp_path):
    folder = tmp_path / "calls" / "monday"
    folder.mkdir(parents=True)
    for name, source in (("b.flac", scene.audio[0]), ("d.flac", scene.audio[2])):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "a.wav").write_bytes(b"")
    (folder / "c.flac").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "notes.txt").write_text("no audio")
    status, printed, errors = main("--checkpoint", scene.checkpoint, tmp_path / "calls")
    assert status == 1
    expected = [f"{folder}/{name}\t{scene.texts[i]}" for name, i in (("b.flac", 0), ("d.flac", 2))]
    assert printed.splitlines() == expected
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        f"{folder}/a.wav", f"{folder}/c.flac",
    ]


def test_folders_are_searched_through_links_and_what_cannot_be_read_is_named(
    scene, main, tmp_path, monkeypatch
):
    real, calls = tmp_path / "real", tmp_path / "calls"
    for folder in (real, calls / "x.flac", calls / "shut"):
        folder.mkdir(parents=True)
    sound = scene.audio[0].read_bytes()
    for path in (real / "b.flac", calls / "a.flac", calls / "._a.flac", calls / "x.flac" / "c.wav"):
        path.write_bytes(sound if path.suffix == ".flac" else b"")
    (calls / "sub").symlink_to(real)
    (real / "above").symlink_to(calls)
    (calls / "sub_again").symlink_to(real)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    long = "n" * 300 + ".flac"
    status, printed, errors = main("--checkpoint", scene.checkpoint, calls, long)
    assert status == 1
    expected = [f"{calls}/a.flac\t{scene.texts[0]}", f"{calls}/sub/b.flac\t{scene.texts[0]}"]
    assert printed.splitlines() == expected
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        f"{calls}/shut", f"{calls}/x.flac/c.wav", long,
    ]


def test_long_files_are_decoded_in_smaller_batches_in_their_order():
    feats = [torch.zeros(n, 1) for n in (4, 9, 2, 30, 1, 1, 5)]
    grouped = decode.padded_groups(feats, most_frames=20)
    assert [[len(f) for f in group] for group in grouped] == [[4, 9], [2], [30], [1, 1, 5]]


@pytest.mark.parametrize("flag", ["--ctm", "--json", "--plot"])
def test_what_cannot_be_written_is_seen_before_anything_is_decoded(scene, main, tmp_path, flag):
    status, printed, errors = main(
        "--checkpoint", scene.checkpoint, scene.audio[0], flag, tmp_path / "no" / "file"
    )
    assert (status, printed) == (1, "")
    assert f"{tmp_path}/no/file" in errors


def test_hypotheses_that_cannot_be_written_are_seen_before_anything_is_decoded(
    scene, main, tmp_path, monkeypatch
):
    monkeypatch.setattr(decode, "greedy_decode", None)
    status, _, errors = main("--checkpoint", scene.checkpoint, "--data", scene.root, "--split",
                             "dev/", "--hypotheses", tmp_path / "no" / "a.tsv")
    assert status == 1
    assert f"{tmp_path}/no/a.tsv" in errors


def test_a_folder_without_audio_is_an_error(scene, main, tmp_path):
    status, printed, errors = main("--checkpoint", scene.checkpoint, tmp_path, scene.audio[0])
    assert status == 1
    assert printed == f"{scene.audio[0]}\t{scene.texts[0]}\n"
    assert f"{tmp_path}: Is a directory" in errors


def test_names_of_all_kinds(scene, main, tmp_path):
    """A file given twice, capital suffixes, a name that is not UTF-8, raw samples."""
    odd = tmp_path / os.fsdecode(b"caf\xe9.flac")
    names = [odd, tmp_path / "A.FLAC", tmp_path / "a.raw"]
    for path in names:
        path.write_bytes(scene.audio[0].read_bytes())
    first = scene.audio[0]
    status, printed, errors = main("--checkpoint", scene.checkpoint, first, first, *names)
    assert status == 1
    shown = [first, first, f"{tmp_path}/caf\\udce9.flac", tmp_path / "A.FLAC"]
    assert printed == "".join(f"{name}\t{scene.texts[0]}\n" for name in shown)
    assert f"{tmp_path}/a.raw: not readable as audio" in errors
    status, printed, _ = main("--checkpoint", scene.checkpoint, tmp_path)
    assert status == 0
    assert len(printed.splitlines()) == 2  # .raw is no suffix of audio


def test_references_are_found_by_relative_paths_too(scene, monkeypatch):
    monkeypatch.chdir(scene.audio[0].parent)
    assert decode.find_reference(scene.audio[0].name) == TEXTS[0]
    monkeypatch.chdir(scene.audio[0].parents[1])
    assert decode.find_reference(f"2/{scene.audio[0].name}") == TEXTS[0]


def test_scoring_a_split_prints_wer_and_writes_the_hypotheses(scene):
    done = scene.run("--data", scene.root, "--split", "dev")
    assert done.returncode == 0, done.stderr
    errors, words = decode.word_errors(scene.scored, TEXTS)
    rate = 100 * errors / words
    expected = f"dev: WER {rate:.2f} % ({errors:,} errors in {words:,} words), real-time factor "
    assert done.stdout.startswith(expected)
    factor = float(re.search(r"real-time factor ([0-9.]+)", done.stdout)[1])
    seconds = float(re.search(r"([0-9.]+) s, hypotheses", done.stdout)[1])
    audio_s = sum(soundfile.info(path).duration for path in scene.audio)
    assert factor == pytest.approx(seconds / audio_s, abs=0.06 / audio_s)  # seconds have a decimal
    table = (scene.checkpoint.parent / "dev.tsv").read_text(encoding="utf-8")
    rows = [
        f"{p.stem}\t{h}\t{r}\n" for p, h, r in zip(scene.audio, scene.scored, TEXTS, strict=True)
    ]
    assert "\n1 hypotheses end after 300 symbols" in done.stdout
    assert table == "id\thypothesis\treference\n" + "".join(rows)


def test_hypotheses_go_where_the_flag_says(scene, main, tmp_path):
    table = tmp_path / "elsewhere.tsv"
    status, out, _ = main("--checkpoint", scene.checkpoint, "--data", scene.root, "--split", "dev",
                          "--hypotheses", table)
    assert status == 0
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + len(TEXTS)
    assert str(table) in out


def test_a_split_with_errors_is_not_scored(scene, main):
    status, out, err = main("--checkpoint", scene.checkpoint, "--data", scene.root, "--split", "no")
    assert (status, out) == (1, "")
    assert "no such folder" in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data", "corpus"],
        ["--split", "dev"],
        ["a.flac", "--data", "corpus", "--split", "dev"],
        ["a.flac", "--split", "dev"],
        ["a.flac", "--batch-size", "0"],
        ["a.flac", "--batch-size", "two"],
        ["--data", "corpus", "--split", "dev", "--ctm", "c.ctm"],
        ["a.flac", "--beam", "4"],
        ["a.flac", "--batch", "4"],  # no abbreviations
    ],
)
def test_wrong_flags_end_with_status_2(words, main, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main("--checkpoint", "none.pt", *words)
    assert "error:" in capsys.readouterr().err


def test_the_checkpoint_flag_is_required(main, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main("a.flac")
    assert "--checkpoint" in capsys.readouterr().err


def test_a_score_says_what_the_errors_are(scene, main):
    status, out, _ = main("--checkpoint", scene.checkpoint, "--data", scene.root, "--split", "dev")
    assert status == 0
    lines = decode.describe_errors(scene.scored, TEXTS)
    assert out.splitlines()[1:4] == lines
    shares = re.fullmatch(r"blank ratio: ([0-9.]+), ([0-9.]+) symbols a frame", out.splitlines()[4])
    frames = sum(-(-len(f) // scene.model.cfg.stack) for f in scene.feats)
    symbols = sum(map(len, scene.labels))
    assert shares[1] == f"{frames / (frames + symbols):.3f}"
    assert shares[2] == f"{symbols / frames:.3f}"


# ------------------------------------------------------------------------------ what was heard when


def emission(frame, label, confidence):
    return decode.Arc(frame, label, math.log(confidence), math.log(0.001))


def test_words_begin_at_their_first_piece_and_end_after_the_frame_of_the_last(scene):
    tokenizer = scene.tokenizer
    pieces = [tokenizer.encode(word) for word in ("ONE", "SIX")]
    path, frames, chances = [], iter(range(2, 99, 2)), iter(np.linspace(0.9, 0.1, 50))
    expected = []
    for word, ids in zip(("ONE", "SIX"), pieces, strict=True):
        arcs = []
        for label in ids:
            t = next(frames)
            arcs += [emission(t, label, next(chances)), emission(t, tokenizer.blank, 0.8)]
        path += arcs
        lowest = min(math.exp(a.log_prob) for a in arcs if a.label != tokenizer.blank)
        expected.append((word, 5 + 0.12 * arcs[0].frame, 5 + 0.12 * (arcs[-1].frame + 1), lowest))
    assert len(pieces[0]) > 1  # else the test says nothing of pieces
    words = decode.words_of(path, tokenizer, 0.12, 5.0)
    assert [w.text for w in words] == ["ONE", "SIX"]
    assert [tuple(w)[1:] for w in words] == [pytest.approx(e[1:]) for e in expected]


def test_a_frame_of_the_democratized_model_has_240_ms():
    cfg = train.PRESETS["democratized"]
    assert (
        decode.frame_seconds(train.Transducer(replace(cfg, enc_hidden=1)), FeatureConfig()) == 0.24
    )


def read_ctm(path):
    comment, *rows = path.read_text(encoding="utf-8").splitlines()
    assert comment == ";; times are those of emissions, in frames of 0.060 s"
    return [row.split() for row in rows]


@pytest.fixture
def heard(scene, main, tmp_path):
    """Words by ctm and by JSON of all files."""
    status, *_ = main("--checkpoint", scene.checkpoint, *scene.audio, "--batch-size", 3,
                      "--ctm", tmp_path / "a.ctm", "--json", tmp_path / "a.json")
    assert status == 0
    return read_ctm(tmp_path / "a.ctm"), json.loads((tmp_path / "a.json").read_text())


def test_word_times_are_written_for_all_files(scene, heard):
    _, as_json = heard
    assert as_json["precision_s"] == 0.06  # stack 2
    assert [f["path"] for f in as_json["files"]] == list(map(str, scene.audio))
    assert [f["text"] for f in as_json["files"]] == scene.texts
    for path, file, feats in zip(scene.audio, as_json["files"], scene.feats, strict=True):
        assert " ".join(w["text"] for w in file["words"]) == " ".join(file["text"].split())
        starts = [w["start_s"] for w in file["words"]]
        assert starts == sorted(starts)
        assert file["words"], path
        for w in file["words"]:
            assert 0 <= w["start_s"] < w["end_s"] <= 0.06 * -(-len(feats) // 2) + 1e-9
            assert 1 / 20 < w["confidence"] <= 1


def test_ctm_and_json_say_the_same(scene, heard):
    rows, as_json = heard
    expected = [
        [path.stem, "1", f"{w['start_s']:.3f}", f"{w['end_s'] - w['start_s']:.3f}", w["text"],
         f"{w['confidence']:.3f}"]
        for path, file in zip(scene.audio, as_json["files"], strict=True)
        for w in file["words"]
    ]
    assert rows == expected


def test_names_in_ctm_have_no_white_space_and_differ(scene, main, tmp_path):
    paths = [tmp_path / name for name in ("my call 1.flac", "a/x.flac", "b/x.flac")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(scene.audio[0].read_bytes())
    main("--checkpoint", scene.checkpoint, *paths, "--ctm", tmp_path / "a.ctm")
    rows = read_ctm(tmp_path / "a.ctm")
    assert {len(row) for row in rows} == {6}
    assert list(dict.fromkeys(row[0] for row in rows)) == ["my_call_1", *map(str, paths[1:])]


def test_times_count_from_the_start_of_the_file(scene, main, tmp_path):
    """Silence is cut off before decoding; it is in the times all the same."""
    sound, starts = features.load_audio(scene.audio[0]), []
    for silence in (4_000, 12_345):  # longer than trimming leaves
        path = tmp_path / f"{silence}.wav"
        soundfile.write(path, np.concatenate([np.zeros(silence), sound]), 16000, "FLOAT")
        main("--checkpoint", scene.checkpoint, path, "--json", tmp_path / "a.json")
        (file,) = json.loads((tmp_path / "a.json").read_text())["files"]
        starts.append(np.array([w["start_s"] for w in file["words"]]))
    assert starts[1] - starts[0] == pytest.approx((12_345 - 4_000) / 16000)
    assert starts[0].min() > (4_000 - 2_048) / 16000  # a window of 2048 that reaches the sound


def test_words_of_a_picture_are_labelled_with_what_was_said():
    words = [decode.Word(text, t, t + 0.5, 0.9) for t, text in enumerate(["A", "X", "C", "D"])]
    heard = decode.Heard("", "A X C D", words, [], -0.25)
    assert decode.label_words(heard, "A B C") == [
        (0, "A", "black"), (1, "X (B)", "red"), (2, "C", "black"), (3, "+D", "red"),
    ]
    assert decode.label_words(heard, "A M X C D")[1] == (0.5, "-M", "red")
    assert decode.label_words(heard, "M A X C D")[0] == (-0.25, "-M", "red")
    assert {colour for _, _, colour in decode.label_words(heard, None)} == {"black"}


def test_a_reference_is_looked_for_beside_the_file(scene, tmp_path):
    assert [decode.find_reference(str(path)) for path in scene.audio] == TEXTS
    assert decode.find_reference(str(tmp_path / "a.flac")) is None


def test_a_picture_is_drawn(scene, main, tmp_path):
    picture = tmp_path / "heard.png"
    status, *_ = main("--checkpoint", scene.checkpoint, scene.audio[3], "--plot", picture)
    assert status == 0
    assert main("--checkpoint", scene.checkpoint, *scene.audio, "--plot", picture)[::2] == (
        1, f"--plot: {len(TEXTS)} audio files, expected 1\n"
    )
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (500, 800)
    red = (pixels[..., 0] > 0.9) & (pixels[..., 1:3].max(-1) < 0.2)
    assert red.sum() > 100  # random weights make errors


# ------------------------------------------------------------------------------------- checkpoints


class Code:
    """What a pickle may do when it is loaded: here, make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_holds_code_is_refused_and_the_code_not_run(scene, tmp_path):
    path, made = tmp_path / "evil.pt", tmp_path / "made"
    torch.save({**scene.contents, "extra": Code(made)}, path)
    done = scene.run(scene.audio[0], checkpoint=path)
    assert done.returncode == 1
    assert f"{path}: not readable as a checkpoint" in done.stderr
    assert done.stdout == ""
    assert not made.exists()


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("what", ["text", "half", "other"])
def test_what_is_not_a_checkpoint_is_named(scene, tmp_path, what):
    path = tmp_path / "bad.pt"
    if what == "text":
        path.write_text("nothing to load")
    elif what == "half":  # a copy that broke off
        whole = scene.checkpoint.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="bad.pt: not .* checkpoint"):
        load_checkpoint(path)


def test_a_checkpoint_restores_configs_and_tokenizer(scene):
    model, tokenizer, features = decode.restore(load_checkpoint(scene.checkpoint))
    assert asdict(model.cfg) == scene.contents["model_config"]
    assert asdict(features) == scene.contents["feature_config"]
    assert tokenizer.decode(tokenizer.encode("TWO THREE")) == "TWO THREE"
    assert not model.training
