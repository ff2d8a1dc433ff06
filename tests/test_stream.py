# SPDX-License-Identifier: Apache-2.0
"""Sentences of a stream, however its samples arrive:

    python -m pytest tests/test_stream.py

The models have random weights, so that their words change from frame to frame.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import TEXTS, random_model
from tones import REPO, heed_signals

import data
import decode
import features
from checkpoint import CHECKPOINT_FORMAT, save_checkpoint
from data import Tokenizer
from features import FeatureConfig

RATE = 16000
TOKENIZER = Tokenizer(data.train_tokenizer(TEXTS, 16))
# Convolutions, look-ahead and wide windows each change which samples a frame needs. These
# seeds give models whose labels change.
KINDS = {
    "plain": (17, {}, {}),
    "convolutions": (12, {"conv_layers": 2, "conv_channels": 2}, {}),
    "look-ahead": (20, {"look_ahead": 12}, {}),
    "wide window": (7, {"normalization": True}, {"window": 512}),
    "short steps": (7, {"stack": 1}, {"window": 400}),
}


@cache
def checkpoint(kind):
    seed, sizes, front_end = KINDS[kind]
    cfg = FeatureConfig(trim=False, normalize="none", **front_end)
    sizes = {"normalization": False, **sizes}
    model = random_model(seed, feature_size=256, vocab_size=TOKENIZER.vocab_size, **sizes)
    return {
        "format": CHECKPOINT_FORMAT, "ema": model.state_dict(),
        "model_config": asdict(model.cfg), "feature_config": asdict(cfg),
        "tokenizer": torch.frombuffer(bytearray(TOKENIZER.model), dtype=torch.uint8),
    }


def sound(n):
    """Noise that swells and fades, so that the words change."""
    t = np.arange(n) / RATE
    noise = np.random.default_rng(5).standard_normal(n)
    return (0.2 * np.sin(9 * t) ** 2 * noise).astype(np.float32)


@cache
def whole(kind, n):
    """Arcs and text of a recording of n samples that is decoded in one piece."""
    model, tokenizer, cfg = decode.restore(checkpoint(kind))
    (path,) = decode.find_paths(model, [features.features(sound(n), cfg)])
    return path, tokenizer.decode([arc.label for arc in path if arc.label != tokenizer.blank])


def check_stream(kind, n, sizes):
    """Gives a stream n samples in pieces of these sizes, over and over again."""
    stream, samples, i = decode.Stream(checkpoint(kind), pause_s=100), sound(n), 0
    texts = []
    while len(samples):
        size = sizes[i % len(sizes)]
        texts.append(stream.accept(samples[:size]))
        samples, i = samples[size:], i + 1
    texts.append(stream.finish())
    path, text = whole(kind, n)
    assert texts[-1] == text
    assert all(longer.startswith(text) for text, longer in zip(texts, texts[1:], strict=False))
    if text:
        (sentence,) = stream.sentences
        assert [arc[:2] for arc in sentence.arcs] == [arc[:2] for arc in path]
        log_probs = [arc.log_prob for arc in path]
        assert [arc.log_prob for arc in sentence.arcs] == pytest.approx(log_probs, abs=1e-3)


def sentence_of(samples):
    """The sentence of a stream that gets all samples at once."""
    stream = decode.Stream(checkpoint("plain"))
    stream.accept(samples)
    stream.finish()
    (sentence,) = stream.sentences
    return sentence


# ---------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", KINDS)
def test_the_words_are_those_of_the_whole_recording(kind):
    assert len(set(whole(kind, 20_000)[1])) >= 4

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5))
    def check(sizes):
        check_stream(kind, 20_000, sizes)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_single_samples_give_the_words_of_the_whole_recording(kind):
    check_stream(kind, 3_000, [1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 159, 160, 161, 480, 959, 960, 961, 1920, 3840, 7681, 30_000])
def test_any_length_gives_the_words_of_the_whole_recording(kind, n):
    check_stream(kind, n, [1000])


def test_a_stream_takes_the_path_of_a_checkpoint_and_begins_anew_after_its_end(tmp_path):
    save_checkpoint(tmp_path / "best.pt", dict(checkpoint("plain")))
    stream = decode.Stream(tmp_path / "best.pt")
    for _ in range(2):
        stream.accept(sound(20_000))
        assert stream.finish() == whole("plain", 20_000)[1]
        stream.sentences.clear()


def test_words_have_the_times_of_the_whole_recording():
    expected = decode.words_of(whole("plain", 20_000)[0], TOKENIZER, 0.06, 0.0)
    words = sentence_of(sound(20_000)).words
    assert [w.text for w in words] == [w.text for w in expected]
    assert [w.start_s for w in words] == pytest.approx([w.start_s for w in expected])


@pytest.mark.parametrize(("front_end", "bidirectional"), [
    ({}, False), ({"trim": False}, False), ({"normalize": "none"}, False),
    ({"trim": False, "normalize": "none"}, True),
])
def test_a_model_that_needs_the_whole_recording_is_refused(front_end, bidirectional):
    model = random_model(1, feature_size=256, vocab_size=TOKENIZER.vocab_size,
                         bidirectional=bidirectional)
    contents = {**checkpoint("plain"), "feature_config": asdict(FeatureConfig(**front_end)),
                "model_config": asdict(model.cfg), "ema": model.state_dict()}
    with pytest.raises(ValueError, match="--no-trim --normalize none --no-bidirectional"):
        decode.Stream(contents)


# -------------------------------------------------------------------------------------- sentences


BLANK = 9


class Loud(decode.Stream):
    """A stream that hears a word in every step with a loud sample."""

    def decode(self, samples, is_last=False):
        self.num_samples += len(samples)
        if len(samples):
            label = 0 if np.abs(samples).max() > 0.05 else BLANK
            self.labels += [label] * (label != BLANK)
            self.arcs.append(decode.Arc(self.num_samples // self.step - 1, label, -0.1, -1.0))


def listen(samples, pause_s=1.0):
    """A Loud stream that has heard these samples to their end."""
    stream = Loud(checkpoint("plain"), pause_s)
    stream.tokenizer = SimpleNamespace(blank=BLANK, starts_word=lambda _: True,
                                       decode=lambda ids: " ".join("A" for _ in ids))
    stream.accept(samples)
    stream.finish()
    return stream


def quiet(seconds):
    noise = np.random.default_rng(2).standard_normal(round(seconds * RATE))
    return (1e-3 * noise).astype(np.float32)


def loud(seconds):
    return quiet(seconds) + 0.1 * np.sign(quiet(seconds))


def test_a_pause_ends_a_sentence():
    samples = np.concatenate([quiet(0.6), loud(1.2), quiet(1.5), loud(1.2), quiet(0.6), loud(0.6)])
    times = [(s.start_s, s.end_s) for s in listen(samples).sentences]
    assert times == [pytest.approx((0.6, 1.8), abs=0.07), pytest.approx((3.3, 5.7), abs=0.07)]
    assert len(listen(samples, pause_s=0.3).sentences) == 3


def test_sentences_end_although_there_is_no_pause():
    """Every step is heard once, also those at which a sentence ends."""
    stream = listen(loud(120))
    assert len(stream.sentences) >= 3
    assert max(s.end_s - s.start_s for s in stream.sentences) < 2 * 16.7 + 0.1  # max_utterance_s
    assert sum(len(s.words) for s in stream.sentences) == 120 * RATE // stream.step


def test_a_short_pause_ends_a_long_sentence():
    first, second = listen(np.concatenate([loud(25), quiet(0.8), loud(5)])).sentences
    assert first.end_s == pytest.approx(25, abs=0.07)
    assert second.start_s == pytest.approx(25.8, abs=0.07)


def test_minutes_of_quiet_leave_nothing_behind():
    stream = listen(quiet(0))
    for _ in range(60):
        stream.accept(quiet(10))
    assert stream.sentences == []
    assert stream.num_samples < 20 * RATE
    assert len(stream.levels) == 1000  # a minute of steps


# ------------------------------------------------------------------------------------ command line


LISTENING = "listening: raw audio, 16 bits, one channel, 16000 Hz\n"
PCM = (32767 * sound(20_000)).astype("<i2")


@pytest.mark.parametrize("samples", [
    np.zeros(5, np.int16), np.zeros((5, 1), np.float32), np.array([0.0, np.nan]),
])
def test_samples_of_another_form_are_an_error(samples):
    stream = decode.Stream(checkpoint("plain"))
    with pytest.raises(ValueError, match=re.escape(f"samples {samples.shape} of {samples.dtype}")):
        stream.accept(samples)


@pytest.mark.parametrize("head", decode.HEADERS)
def test_the_header_of_a_file_is_no_raw_audio(head):
    with pytest.raises(ValueError, match="header of an audio file, and --stream takes raw samples"):
        list(decode.read_pcm(io.BytesIO(head + bytes(100))))
    later = io.BytesIO(bytes(2**16) + head + bytes(100))
    assert sum(map(len, decode.read_pcm(later))) == (2**16 + len(head) + 100) // 2


def test_raw_audio_may_arrive_in_halves_of_samples():
    class Trickle(io.BytesIO):
        def read1(self, _):
            return super().read1(3)

    samples = np.arange(-5, 6).astype("<i2")
    read = list(decode.read_pcm(Trickle(samples.tobytes())))
    assert np.array_equal(np.concatenate(read) * 32768, samples)
    assert read[0].dtype == np.float32


@pytest.fixture
def run_stream(tmp_path, monkeypatch, capsys):
    """decode.py --stream in this process: raw audio and flags -> what it prints."""
    path = tmp_path / "best.pt"
    save_checkpoint(path, dict(checkpoint("plain")))

    def run(contents, *argv):
        argv = ["decode.py", "--checkpoint", str(path), "--stream", *argv]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(contents)))
        status = decode.main()
        printed, errors = capsys.readouterr()
        assert (status, errors) == (0, LISTENING)
        return printed

    return run


def test_the_line_of_a_stream_has_its_text(run_stream):
    assert run_stream(PCM.tobytes()) == sentence_of(PCM.astype(np.float32) / 32768).text + "\n"
    assert run_stream(b"") == ""


def test_json_of_a_stream_is_an_object_per_sentence(run_stream):
    sentence = sentence_of(PCM.astype(np.float32) / 32768)
    (line,) = run_stream(PCM.tobytes(), "--json").splitlines()
    heard = json.loads(line)
    assert list(heard) == ["start_s", "end_s", "text", "words"]
    assert heard["text"] == sentence.text
    assert heard["start_s"] == pytest.approx(sentence.start_s)
    assert heard["end_s"] == pytest.approx(sentence.end_s)
    assert heard["words"] == [word._asdict() for word in sentence.words]


def test_a_line_grows_and_ends_with_its_sentence(capsys):
    stream = SimpleNamespace(sentences=[], current="ON")
    shown = decode.print_new_text(stream, "")
    stream.current = "ONE TWO"
    shown = decode.print_new_text(stream, shown)
    assert (capsys.readouterr().out, shown) == ("ONE TWO", "ONE TWO")
    stream.sentences, stream.current = [SimpleNamespace(text="ONE TWO SIX")], "A"
    shown = decode.print_new_text(stream, shown)
    assert (capsys.readouterr().out, shown) == (" SIX\nA", "A")
    assert stream.sentences == []


def test_words_are_printed_while_audio_comes_and_ctrl_c_ends_the_line(tmp_path):
    save_checkpoint(tmp_path / "best.pt", dict(checkpoint("plain")))
    process = subprocess.Popen(
        [sys.executable, REPO / "decode.py", "--checkpoint", tmp_path / "best.pt", "--stream"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=heed_signals,
    )
    process.stdin.write(PCM.tobytes())
    process.stdin.flush()
    first = process.stdout.read(1)  # standard input is still open
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, LISTENING.encode())
    assert first.isalpha()
    assert rest.endswith(b"\n")
