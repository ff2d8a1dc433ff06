# SPDX-License-Identifier: Apache-2.0
"""decode.py walks the most likely path, counts word errors, and its command line reports both:

    python -m pytest tests/test_decode.py

Greedy search is compared with hand-made lattices, with the code for one utterance in its
docstring and with itself in chunks. WER is compared with published vectors and with a search over
edits. The command line runs on tones and a model with random weights.
"""

import json
import math
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import soundfile
import torch
from tones import REPO, write_tones
from torch import nn

import data
import decode
import features
from checkpoint import CHECKPOINT_FORMAT, load_checkpoint, save_checkpoint
from data import Tokenizer
from features import FeatureConfig
from model import ModelConfig, Transducer
from writers import Transcription

# ---------------------------------------------------------------------------- lattices by hand


class CountingPredictor(nn.Module):
    """A prediction network whose output is the number of labels."""

    def start(self, batch):
        return torch.zeros(batch, 1), (torch.zeros(1, batch, 1), torch.zeros(1, batch, 1))

    def step(self, labels, state):
        assert torch.equal(state[0], state[1])
        return state[0][0] + 1, (state[0] + 1, state[1] + 1)


class Lattice(nn.Module):
    """Stands for a Transducer: at frame t, after u labels, arcs[b][t, u] is the likeliest class.

    Nodes that arcs[b] does not name have blank.
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


def walk(arcs, lens, **limits):
    feats = torch.zeros(len(lens), max(lens), 1)
    return decode.greedy_decode(Lattice(arcs).eval(), feats, torch.tensor(lens), **limits)


def never_blank(frames, labels=400):
    return {(t, u): 3 for t in range(frames) for u in range(labels)}


def test_search_follows_the_path_of_a_hand_made_lattice():
    arcs = [
        {(0, 0): 1, (0, 1): 2, (2, 2): 3},
        {(1, 0): 4, (2, 1): 7},  # its length is 2, so its frame 2 is not read
        {(0, 0): 5, (3, 1): 0, (4, 2): 6},  # a predictor that stepped on blank would miss 0 and 6
        {},
        {(0, 0): 1},  # it has no frame
    ]
    assert walk(arcs, [3, 2, 5, 3, 0]) == [[1, 2, 3], [4], [5, 0, 6], [], []]
    assert walk(arcs[-1:], [0]) == [[]]


@pytest.mark.parametrize("limit", [1, 2, 3, 30])
def test_a_frame_emits_exactly_its_limit_of_labels(limit):
    assert walk([never_blank(4)], [4], max_symbols_per_frame=limit) == [[3] * (4 * limit)]


# Recorded lengths of the original, whose rnnt/decoder.py:309-349 applies the limit on all symbols
# when a frame starts, to utterances with more symbols than the limit.
@pytest.mark.parametrize(
    ("per_frame", "limit", "lengths"),
    [(30, 300, [240, 150, 240]), (30, 100, [120, 120, 120]), (2, 3, [4, 4, 4]), (2, 4, [6, 6, 6])],
)
def test_no_frame_starts_with_more_symbols_than_the_limit(per_frame, limit, lengths):
    hypotheses = walk([never_blank(8)] * 3, [8, 5, 8], max_symbols_per_frame=per_frame,
                      max_symbols=limit)
    assert [len(h) for h in hypotheses] == lengths


def test_the_default_limits_are_the_originals():
    assert [len(h) for h in walk([never_blank(14), never_blank(2)], [14, 2])] == [330, 60]


def test_a_path_has_every_arc_with_its_probabilities():
    model, paths = Lattice([{(0, 0): 1, (0, 1): 2, (2, 2): 3}, {}]).eval(), [[], []]
    decode.greedy_search(model, *model.encode(torch.zeros(2, 3, 1), torch.tensor([3, 1])),
                         paths=paths)
    blank = model.cfg.blank
    taken = [(0, 1), (0, 2), (0, blank), (1, blank), (2, 3), (2, blank)]
    assert [[(a.frame, a.label) for a in path] for path in paths] == [taken, [(0, blank)]]
    # The likeliest of 9 classes has logit 1, the others have 0.
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
def decode_alone(model, feats, max_symbols_per_frame):
    """Labels of one utterance (T_in, D) by the code in the docstring of greedy_search."""
    (code,) = [part for part in decode.greedy_search.__doc__.split("\n\n")
               if part.lstrip().startswith("for frame in encoded")]
    (encoded,), _ = model.encode(feats[None], torch.tensor([len(feats)]))
    names = {"torch": torch, "model": model, "encoded": encoded, "labels": [],
             "max_symbols_per_frame": max_symbols_per_frame}
    exec(textwrap.dedent(code), names)
    return names["labels"]


SEEDS = range(24)


@cache
def batch_hypotheses(seed):
    return decode.greedy_decode(random_model(seed), *random_batch(seed), max_symbols_per_frame=4)


def test_random_models_emit_labels_and_blanks():
    """The tests below would prove nothing on hypotheses that are empty or endless."""
    hypotheses = [h for seed in SEEDS for h in batch_hypotheses(seed)]
    frames = [-(-n // 2) for seed in SEEDS for n in random_batch(seed)[1].tolist()]
    partly = [0 < len(h) < 4 * n for h, n in zip(hypotheses, frames, strict=True)]
    assert sum(partly) > 60
    assert sum(len(set(h)) > 1 for h in hypotheses) > 60


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_gives_what_the_code_in_the_docstring_gives_each_utterance_alone(seed):
    model, (feats, lens) = random_model(seed), random_batch(seed)
    expected = [decode_alone(model, feats[b, :n], 4) for b, n in enumerate(lens)]
    assert batch_hypotheses(seed) == expected


def search_in_chunks(model, encoded, enc_lens, size):
    """Labels and paths of greedy_search on `size` encoder frames at a time, and the last state."""
    labels, paths, state = [[] for _ in encoded], [[] for _ in encoded], None
    for start in range(0, encoded.shape[1], size):
        new, state = decode.greedy_search(
            model, encoded[:, start : start + size], (enc_lens - start).clamp(0, size), state,
            max_symbols_per_frame=4, max_symbols=20, paths=paths,
        )
        for old, more in zip(labels, new, strict=True):
            old += more
    return labels, [[arc[:2] for arc in path] for path in paths], state


@pytest.mark.parametrize("size", [1, 2, 3, 5, 14])
def test_searching_chunk_by_chunk_gives_the_labels_and_arcs_of_one_search(size):
    for seed in SEEDS:
        model, batch = random_model(seed), random_batch(seed)
        with torch.no_grad():
            encoded, enc_lens = model.encode(*batch)
        labels, paths, end = search_in_chunks(model, encoded, enc_lens, encoded.shape[1])
        found, found_paths, state = search_in_chunks(model, encoded, enc_lens, size)
        assert (found, found_paths) == (labels, paths)
        for path, emitted, frames in zip(paths, labels, enc_lens, strict=True):
            assert [label for _, label in path if label != model.cfg.blank] == emitted
            assert {t for t, _ in path} == set(range(frames)) or len(emitted) > 20
        assert state.num_labels.tolist() == list(map(len, labels))
        assert state.num_frames.tolist() == enc_lens.tolist()
        torch.testing.assert_close(state.predicted, end.predicted)


def test_a_search_leaves_the_state_that_it_is_given_unchanged():
    model, batch = random_model(3), random_batch(3)
    with torch.no_grad():
        encoded, enc_lens = model.encode(*batch)
    _, state = decode.greedy_search(model, encoded, enc_lens)
    before = [x.clone() for x in (*state.predictor, *state[1:])]
    labels, _ = decode.greedy_search(model, encoded, enc_lens, state)
    assert any(labels)
    assert all(map(torch.equal, before, (*state.predictor, *state[1:])))


# --------------------------------------------------------------------------------- word error rate


def wer(hypotheses, references):
    return decode.error_rate(*decode.word_errors(hypotheses, references))


# NVIDIA/NeMo tests/collections/asr/test_asr_metrics.py, then two of Lightning-AI/torchmetrics, then
# two computed by the original: (hypothesis, reference, WER).
PUBLISHED = [
    ("cat", "cot", 1.0), ("GPU", "G P U", 1.0), ("G P U", "GPU", 3.0),
    ("ducati motorcycle", "motorcycle", 1.0), ("ducati motorcycle", "ducuti motorcycle", 0.5),
    ("a B c", "a b c", 1 / 3), ("hello world", "hello world", 0.0), ("Firwww", "hello world", 1.0),
    ("the bat sat on", "the cat sat", 2 / 3), ("", "one two three", 1.0),
]


@pytest.mark.parametrize(("hypothesis", "reference", "expected"), PUBLISHED)
def test_wer_of_published_pairs(hypothesis, reference, expected):
    assert wer([hypothesis], [reference]) == expected


def test_errors_and_words_are_summed_and_any_white_space_separates_words():
    assert decode.word_errors(["a b", "  c\td ", ""], ["a x", "c d", "e f g"]) == (4, 7)


def test_wer_without_reference_words_is_infinite():
    assert decode.word_errors(["one two"], [""]) == (2, 0)
    assert wer(["one two"], [""]) == wer([], []) == math.inf


@cache
def least_edits(x, y):
    """The least number of edits by definition: a letter is replaced, deleted or inserted."""
    if not x or not y:
        return len(x) + len(y)
    return min(least_edits(x[1:], y[1:]) + (x[0] != y[0]), least_edits(x[1:], y) + 1,
               least_edits(x, y[1:]) + 1)


def test_edit_distance_is_the_number_of_edits_of_the_alignment():
    rng = np.random.default_rng(1)
    for lengths in rng.integers(0, 90, (50, 2)):  # more rows than a machine word has bits
        hypothesis, reference = (rng.integers(0, 4, n).tolist() for n in lengths)
        edits = sum(x != y for x, y in decode.align(hypothesis, reference))
        assert decode.edit_distance(hypothesis, reference) == edits


def test_characters_count_with_one_space_between_words():
    assert decode.char_errors(["  the  bat\tsat "], ["the cat sat"]) == (1, 11)
    # A language without spaces has one word a sentence: one wrong character makes WER 100 %.
    heard, said = "今日は良い天汽です", "今日は良い天気です"
    assert decode.word_errors([heard], [said]) == (1, 1)
    assert decode.char_errors([heard, ""], [said, "今日"]) == (3, 11)


def test_word_errors_are_the_least_number_of_edits():
    strings = ["".join(letters) for n in range(5) for letters in product("ab", repeat=n)]
    for x, y in product(strings, repeat=2):
        assert decode.word_errors([" ".join(x)], [" ".join(y)])[0] == least_edits(x, y)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("a x c", "a b c", ["a a", "x b", "c c"]),
        ("a c", "a b c", ["a a", "- b", "c c"]),
        ("a b x c", "a b c", ["a a", "b b", "x -", "c c"]),
        ("", "a b", ["- a", "- b"]),
        ("a", "", ["a -"]),
    ],
)
def test_alignment_pairs_words_with_their_references(hypothesis, reference, expected):
    pairs = decode.align(hypothesis.split(), reference.split())
    assert [" ".join(word or "-" for word in pair) for pair in pairs] == expected


def test_the_most_frequent_errors_are_counted():
    hypotheses = ["ON THE SIX", "ON THE SIX", "A CAT", "SIX"]
    references = ["ON THE SEX", "ON A SEX", "CAT", "SIX OF"]
    assert decode.describe_errors(hypotheses, references) == [
        "substitutions: 3: SEX -> SIX (2), A -> THE (1)",
        "insertions: 1: A (1)",
        "deletions: 1: OF (1)",
    ]
    assert decode.describe_errors(["A"], ["A"])[1] == "insertions: 0"


def test_references_in_another_case_are_said():
    assert decode.describe_errors(["ON THE SIX", "A CAT"], ["on the sex", "a cat"])[-1] == (
        "4 of these errors are upper against lower case alone: write the references as the "
        "training texts are written"
    )
    assert len(decode.describe_errors(["ON THE SIX"], ["ON THE SEX"])) == 3


def test_evaluation_batches_hold_every_utterance_once_longest_first():
    lengths = [3.0, 9.0, 1.0, 7.0, 5.0]
    utterances = [data.Utterance(str(i), "", s, "") for i, s in enumerate(lengths)]
    assert decode.evaluation_batches(utterances, 2) == [[1, 3], [4, 0], [2]]


# ------------------------------------------------------------------------------------ command line

TEXTS = ["ONE TWO THREE", "TWO", "THREE ONE", "FOUR FIVE SIX"]


class Scene:
    """A corpus of tones, a checkpoint, and the hypotheses of its averaged weights.

    `texts` are decoded without a limit, `scored` with that of evaluation, which cuts the last.
    """

    def __init__(self, root):
        self.root, self.checkpoint = root, root / "run" / "best.pt"
        self.checkpoint.parent.mkdir()
        self.audio = write_tones(root, "dev", TEXTS, [0.25, 0.44, 0.57, 0.81])
        tokenizer = Tokenizer(data.train_tokenizer(TEXTS, 16))
        model = random_model(
            3, feature_size=256, vocab_size=tokenizer.vocab_size, normalization=False
        )
        torch.manual_seed(4)
        other = Transducer(model.cfg)  # the weights before averaging, which are not decoded
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
        self.labels = [decode.greedy_decode(model, *x)[0] for x in alone]
        self.scored = [tokenizer.decode(labels) for labels in self.labels]
        assert self.texts[:3] == self.scored[:3]
        assert len(self.texts[3]) > len(self.scored[3]) > decode.MAX_SYMBOLS
        assert len(set(self.texts)) == len(TEXTS), self.texts
        assert all(self.texts)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return Scene(tmp_path_factory.mktemp("decode"))


@pytest.fixture
def main(scene, monkeypatch, capsys):
    """The command line in this process: arguments -> status, standard output, standard error."""

    def run(*argv, checkpoint=scene.checkpoint):
        argv = ["decode.py", "--checkpoint", checkpoint, *argv]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        return decode.main(), *capsys.readouterr()

    return run


def run_command(scene, *argv, **options):
    """decode.py as a process of its own."""
    command = [sys.executable, REPO / "decode.py", "--checkpoint", scene.checkpoint, *argv]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, **options)


def named(errors):
    """File or folder of each line on standard error."""
    return [line.split(":")[0] for line in errors.splitlines()]


def test_the_command_transcribes_readable_files_in_their_order_and_names_the_others(
    scene, tmp_path
):
    text, empty, absent = (tmp_path / name for name in ("text.flac", "empty.wav", "absent.flac"))
    text.write_text("this is not audio")
    soundfile.write(empty, np.zeros(0, np.float32), 16000)
    good = [scene.audio[i] for i in (2, 0, 0, 3, 1)]
    process = run_command(scene, text, *good[:2], absent, empty, *good[2:], "--batch-size", "3",
                          stdout=subprocess.PIPE, text=True)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    expected = [f"{scene.audio[i]}\t{scene.texts[i]}" for i in (2, 0, 0, 3, 1)]
    assert printed.splitlines() == expected
    assert named(errors) == [str(text), str(absent), str(empty)]


def test_decode_starts_without_importing_matplotlib():
    code = "import sys, decode; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=300).returncode == 0


def test_a_folder_stands_for_all_audio_below_it_by_name(scene, main, tmp_path):
    for name in ("b/a.flac", "A.FLAC", "notes.txt", "._a.flac", "a.raw", ".b/a.flac", "LICENSE",
                 ".c.flac"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(scene.audio[0].read_bytes())
    text = scene.texts[0]
    status, printed, errors = main(tmp_path)
    assert (status, printed) == (0, f"{tmp_path}/A.FLAC\t{text}\n{tmp_path}/b/a.flac\t{text}\n")
    assert errors == (f"{tmp_path}: files without a suffix of audio are passed over: .raw (1), "
                      ".txt (1), none (1)\n")


FORMATS = {"a.mp3": {}, "b.opus": {"format": "OGG", "subtype": "OPUS"}, "c.aiff": {}, "d.au": {},
           "e.WAV": {"format": "NIST"}, "f.sph": {"format": "NIST"}, "g.w64": {}, "h.caf": {}}


def test_a_folder_and_a_file_take_the_same_formats(scene, main, tmp_path):
    sound, _ = soundfile.read(scene.audio[3], dtype="int16")
    for name, options in FORMATS.items():
        soundfile.write(tmp_path / name, sound, 16000, **options)
    status, printed, errors = main(tmp_path)
    assert (status, errors) == (0, "")
    assert printed == "".join(main(tmp_path / name)[1] for name in FORMATS)
    for name in list(FORMATS)[2:]:  # the first two are lossy
        assert f"{tmp_path / name}\t{scene.texts[3]}\n" in printed


def test_a_folder_without_audio_is_an_error(scene, main, tmp_path):
    status, printed, errors = main(tmp_path, scene.audio[0])
    assert (status, printed) == (1, f"{scene.audio[0]}\t{scene.texts[0]}\n")
    assert f"{tmp_path}: no audio in this folder\n" in errors


def test_a_warning_is_one_line(scene, tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.zeros((16000, 2)), 16000)
    process = run_command(scene, tmp_path / "stereo.wav", stdout=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=300)
    assert errors == "warning: audio of 2 channels is averaged to one\n"


def test_a_dash_is_standard_input(scene):
    process = run_command(scene, "-", "/dev/stdin", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    printed, errors = process.communicate(scene.audio[0].read_bytes(), timeout=300)
    assert printed.decode() == f"-\t{scene.texts[0]}\n"
    assert errors == b"/dev/stdin: the file is empty\n"  # the first of both has read everything
    assert process.returncode == 1


def test_a_reader_that_closes_the_pipe_ends_the_command_with_status_141(scene):
    reader, writer = os.pipe()
    os.close(reader)
    process = run_command(scene, scene.audio[0], stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 141


@pytest.mark.parametrize("argv", [("a.flac",), ("--data", "corpus", "--split", "dev")])
def test_ctrl_c_ends_the_command_quietly_with_status_130(scene, main, monkeypatch, argv):
    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("transcribe", "score_split"):
        monkeypatch.setattr(decode, name, interrupt)
    assert main(*argv) == (130, "", "")


def test_a_name_that_is_not_utf8_is_printed_with_escapes(scene, main, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.flac")
    odd.write_bytes(scene.audio[0].read_bytes())
    assert main(odd)[:2] == (0, f"{tmp_path}/caf\\udce9.flac\t{scene.texts[0]}\n")


def test_batches_with_too_many_frames_are_decoded_in_halves(scene, monkeypatch):
    batches, greedy_search = [], decode.greedy_search

    def record(model, encoded, enc_lens, **options):
        batches.append(len(encoded))
        return greedy_search(model, encoded, enc_lens, **options)

    monkeypatch.setattr(decode, "greedy_search", record)
    whole = decode.find_paths(scene.model, scene.feats)
    monkeypatch.setattr(decode, "MAX_FRAMES", 2 * len(scene.feats[1]))
    halves = decode.find_paths(scene.model, scene.feats)
    assert batches == [4, 2, 1, 1]  # the last two files are longer than the second
    assert [[a[:2] for a in p] for p in halves] == [[a[:2] for a in p] for p in whole]


@pytest.mark.parametrize("flag", ["--ctm", "--json", "--srt", "--vtt", "--plot", "--hypotheses"])
def test_files_that_cannot_be_written_are_named_before_decoding(
    scene, main, tmp_path, monkeypatch, flag
):
    monkeypatch.setattr(decode, "greedy_search", None)
    argv = ["--data", scene.root, "--split", "dev"] if flag == "--hypotheses" else scene.audio[:1]
    status, printed, errors = main(*argv, flag, tmp_path / "no" / "file.png")
    assert (status, printed) == (1, "")
    assert f"{tmp_path}/no/file.png" in errors


def test_a_full_disk_names_the_file_that_could_not_be_written(scene, main):
    _, _, errors = main(scene.audio[0], "--json", "/dev/full")
    assert errors == "/dev/full could not be written: No space left on device\n"


def test_a_program_may_read_the_words_from_a_fifo(scene, main, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen(["cat", tmp_path / "fifo"], stdout=subprocess.PIPE) as reader:
        assert main(scene.audio[0], "--json", tmp_path / "fifo")[0] == 0
        (file,) = json.loads(reader.communicate(timeout=300)[0])["files"]
    assert file["text"] == scene.texts[0]


@pytest.fixture(scope="module")
def score(scene):
    """Lines on standard output of scoring the split."""
    process = run_command(scene, "--data", scene.root, "--split", "dev/", stdout=subprocess.PIPE,
                          text=True)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return printed.splitlines()


def test_a_score_has_word_and_character_error_rates(scene, score):
    errors, words = decode.word_errors(scene.scored, TEXTS)
    expected = f"WER {100 * errors / words:.2f} % ({errors:,} errors in {words:,} words), "
    errors, chars = decode.char_errors(scene.scored, TEXTS)
    expected += f"CER {100 * errors / chars:.2f} %, "
    assert score[0].startswith(f"dev/: {expected}real-time factor ")


def test_the_real_time_factor_is_seconds_of_decoding_by_seconds_of_audio(scene, score):
    factor = float(re.search(r"real-time factor ([0-9.]+)", score[0])[1])
    seconds = float(re.search(r"([0-9.]+) s, hypotheses", score[0])[1])
    audio_s = sum(soundfile.info(path).duration for path in scene.audio)
    assert factor == pytest.approx(seconds / audio_s, abs=0.06 / audio_s)  # seconds have a decimal


def test_a_score_names_the_errors_and_the_share_of_blanks(scene, score):
    frames = sum(-(-len(f) // scene.model.cfg.stack) for f in scene.feats)
    symbols = sum(map(len, scene.labels))
    assert score[1:] == [
        *decode.describe_errors(scene.scored, TEXTS),
        f"blank ratio: {frames / (frames + symbols):.3f}, {symbols / frames:.3f} symbols a frame",
        "1 hypotheses were cut: after 300 symbols evaluation searches no further frame",
    ]


def test_a_score_names_a_model_that_emits_almost_only_blanks(scene, main, tmp_path, monkeypatch):
    def decode_batches(model, tokenizer, batches):
        texts = {u.id: "" for u in data.read_split(scene.root, "dev")}
        return texts, Counter(frames=90, labels=0)

    monkeypatch.setattr(decode, "decode_batches", decode_batches)
    status, printed, _ = main("--data", scene.root, "--split", "dev",
                              "--hypotheses", tmp_path / "dev.tsv")
    words = sum(len(text.split()) for text in TEXTS)
    assert status == 0
    assert f"the model emits (almost) only blanks: 0 symbols for {words} words" in printed
    assert f"hypotheses in {tmp_path}/dev.tsv\n" in printed
    assert len((tmp_path / "dev.tsv").read_text().splitlines()) == 1 + len(TEXTS)


def test_folders_are_searched_through_links_and_unreadable_ones_are_named(
    scene, main, tmp_path, monkeypatch
):
    real, calls = tmp_path / "real", tmp_path / "calls"
    for folder in (real, calls / "x.flac", calls / "shut"):
        folder.mkdir(parents=True)
    for path in (real / "b.flac", calls / "a.flac"):
        path.write_bytes(scene.audio[0].read_bytes())
    (calls / "x.flac" / "c.wav").touch()
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
    status, printed, errors = main(calls, long)
    assert status == 1
    expected = [f"{calls}/a.flac\t{scene.texts[0]}", f"{calls}/sub/b.flac\t{scene.texts[0]}"]
    assert printed.splitlines() == expected
    assert named(errors) == [f"{calls}/shut", f"{calls}/x.flac/c.wav", long]


def test_hypotheses_are_written_beside_their_references(scene, score):
    rows = zip(scene.audio, scene.scored, TEXTS, strict=True)
    expected = "id\thypothesis\treference\n" + "".join(f"{p.stem}\t{h}\t{r}\n" for p, h, r in rows)
    table = scene.checkpoint.parent / "dev.tsv"  # beside the checkpoint by default
    assert table.read_text(encoding="utf-8") == expected
    assert score[0].endswith(f"hypotheses in {table}")


def test_a_split_with_errors_is_not_scored(scene, main):
    status, printed, errors = main("--data", scene.root, "--split", "no")
    assert (status, printed) == (1, "")
    assert "no such folder" in errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either audio files, or --data and --split"),
        (["--data", "corpus"], "give either"),
        (["--split", "dev"], "give either"),
        (["a.flac", "--data", "corpus", "--split", "dev"], "give either"),
        (["a.flac", "--hypotheses", "a.tsv"], "--hypotheses is for --data and --split"),
        (["--data", "corpus", "--split", "dev", "--ctm", "c.ctm"], "--plot are for audio files"),
        (["a.flac", "--stream"], "give either"),
        (["--stream", "--srt", "a.srt"], "--vtt and --plot are for audio files"),
        (["a.flac", "--json"], "--json needs a file, unless --stream is given"),
        (["--stream", "--pause-s", "0"], "--pause-s: 0.0, expected more than 0"),
        (["a.flac", "--pause-s", "2"], "--pause-s: 2.0, expected more than 0, and --stream"),
        (["a.flac", "--batch-size", "0"], "--batch-size: 0, expected at least 1"),
        (["--stream", "--batch-size", "8"], "--batch-size: 8, expected at least 1, and no --s"),
        (["a.flac", "--plot", "a"], "--plot: a, expected a name that ends in .png, .pdf or .svg"),
        (["a.flac", "--batch", "4"], "unrecognized arguments: --batch 4"),  # no abbreviations
    ],
)
def test_wrong_flags_end_with_status_2(argv, message, main, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(*argv)
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------- words and times


def test_words_begin_at_their_first_piece_and_end_after_the_frame_of_the_last():
    # Label 0 is "_ON", 1 is "E", 2 is "_SIX", 3 is blank; columns are frame, label, posterior.
    path = [(0, 3, 0.9), (2, 0, 0.8), (2, 3, 0.9), (3, 3, 0.9), (4, 1, 0.5), (4, 3, 0.9),
            (5, 2, 0.7), (5, 3, 0.6)]
    tokenizer = SimpleNamespace(blank=3, starts_word=lambda label: label in (0, 2),
                                decode=lambda ids: {(0, 1): "ONE", (2,): "SIX"}[tuple(ids)])
    arcs = [decode.Arc(t, label, math.log(p), -1.0) for t, label, p in path]
    one, six = decode.words_of(arcs, tokenizer, 0.12, 5.0)
    assert (one.text, six.text) == ("ONE", "SIX")
    assert one[1:] == pytest.approx((5.24, 5.6, 0.5))
    assert six[1:] == pytest.approx((5.6, 5.72, 0.7))


def read_ctm(path):
    comment, *rows = path.read_text(encoding="utf-8").splitlines()
    assert comment == ";; times are those of emissions, in frames of 0.060 s"
    return [row.split() for row in rows]


@pytest.fixture
def written(scene, main, tmp_path):
    """Rows of the CTM file and contents of the JSON file for all audio."""
    status, *_ = main(*scene.audio, "--batch-size", 3, "--ctm", tmp_path / "a.ctm",
                      "--json", tmp_path / "a.json")
    assert status == 0
    return read_ctm(tmp_path / "a.ctm"), json.loads((tmp_path / "a.json").read_text())


def test_json_has_the_words_of_every_file_with_times_and_confidences(scene, written):
    _, as_json = written
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


@pytest.mark.parametrize("suffix", ["flac", "m4a"])
@pytest.mark.parametrize("flag", ["--ctm", "--json", "--srt"])
def test_a_recording_is_never_written_over(scene, main, tmp_path, flag, suffix):
    """The shell may put a recording behind the flag, as in `--json *.flac`."""
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        path.write_bytes(scene.audio[0].read_bytes())
    status, printed, errors = main(flag, first, second)
    assert (status, printed) == (1, "")
    assert errors == f"{first}: a recording, expected the file to write behind its flag\n"
    assert first.read_bytes() == second.read_bytes() == scene.audio[0].read_bytes()


def test_ctrl_c_loses_only_the_files_that_are_not_done(scene, main, tmp_path, monkeypatch):
    def one_file(*_):
        yield Transcription("a.flac", [])
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "transcribe_files", one_file)
    assert main(*scene.audio[:2], "--json", tmp_path / "a.json")[:2] == (130, "a.flac\t\n")
    (file,) = json.loads((tmp_path / "a.json").read_text())["files"]
    assert file["path"] == "a.flac"


def test_ctm_and_json_hold_the_same_words(scene, written):
    rows, as_json = written
    expected = [
        [path.stem, "1", f"{w['start_s']:.3f}", f"{w['end_s'] - w['start_s']:.3f}", w["text"],
         f"{w['confidence']:.3f}"]
        for path, file in zip(scene.audio, as_json["files"], strict=True)
        for w in file["words"]
    ]
    assert rows == expected


def test_names_in_ctm_have_no_white_space_and_differ(scene, main, tmp_path):
    paths = [tmp_path / name for name in ("my call 1.flac", "a/x y.flac", "b/x_y.flac")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(scene.audio[0].read_bytes())
    main(*paths, "--ctm", tmp_path / "a.ctm")
    rows = read_ctm(tmp_path / "a.ctm")
    assert {len(row) for row in rows} == {6}
    assert list(dict.fromkeys(row[0] for row in rows)) == [
        "my_call_1", f"{tmp_path}/a/x_y.flac", f"{tmp_path}/b/x_y.flac"]


def test_times_include_the_silence_that_is_trimmed_before_decoding(scene, main, tmp_path):
    sound, starts = features.load_audio(scene.audio[0]), []
    for silence in (4_000, 12_345):  # longer than trimming leaves
        path = tmp_path / f"{silence}.wav"
        soundfile.write(path, np.concatenate([np.zeros(silence), sound]), 16000, "FLOAT")
        main(path, "--json", tmp_path / "a.json")
        (file,) = json.loads((tmp_path / "a.json").read_text())["files"]
        starts.append(np.array([w["start_s"] for w in file["words"]]))
    assert starts[1] - starts[0] == pytest.approx((12_345 - 4_000) / 16000)
    assert starts[0].min() > (4_000 - 2_048) / 16000  # a window of 2048 that reaches the sound


def test_words_of_a_picture_are_labelled_with_their_references():
    words = [decode.Word(text, t, t + 0.5, 0.9) for t, text in enumerate(["A", "X", "C", "D"])]
    assert decode.label_words(words, "A B C", -0.25) == [
        (0, "A", "black"), (1, "X (B)", "red"), (2, "C", "black"), (3, "+D", "red"),
    ]
    assert decode.label_words(words, "A M X C D", -0.25)[1] == (0.5, "-M", "red")
    assert decode.label_words(words, "M A X C D", -0.25)[0] == (-0.25, "-M", "red")
    assert {colour for _, _, colour in decode.label_words(words, None, 0)} == {"black"}


def test_a_reference_is_found_beside_the_file(scene, tmp_path, monkeypatch):
    assert [decode.find_reference(str(path)) for path in scene.audio] == TEXTS
    assert decode.find_reference(str(tmp_path / "a.flac")) is None
    monkeypatch.chdir(scene.audio[0].parents[1])  # relative paths hide the names of folders
    assert decode.find_reference(f"2/{scene.audio[0].name}") == TEXTS[0]
    monkeypatch.chdir(scene.audio[0].parent)
    assert decode.find_reference(scene.audio[0].name) == TEXTS[0]


def test_a_picture_shows_errors_in_red(scene, main, tmp_path):
    picture = tmp_path / "heard.png"
    assert main(scene.audio[3], "--plot", picture)[0] == 0
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (500, 800)
    red = (pixels[..., 0] > 0.9) & (pixels[..., 1:3].max(-1) < 0.2)
    assert red.sum() > 100  # random weights make errors


def test_a_picture_is_of_one_file(scene, main, tmp_path):
    status, _, errors = main(*scene.audio, "--plot", tmp_path / "heard.png")
    assert (status, errors) == (1, f"--plot: {len(TEXTS)} audio files, expected 1\n")


# ------------------------------------------------------------------------------------- checkpoints


def test_a_missing_checkpoint_is_named(scene, main):
    status, _, errors = main(scene.audio[0], checkpoint="none.pt")
    assert (status, errors) == (1, "none.pt: no such checkpoint\n")


def test_a_checkpoint_restores_configs_and_tokenizer(scene):
    model, tokenizer, cfg = decode.restore(load_checkpoint(scene.checkpoint))
    assert asdict(model.cfg) == scene.contents["model_config"]
    assert asdict(cfg) == scene.contents["feature_config"]
    assert tokenizer.decode(tokenizer.encode("TWO THREE")) == "TWO THREE"
    assert not model.training
