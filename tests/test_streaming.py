# SPDX-License-Identifier: Apache-2.0
"""`bench stream` measures computing and the delay from the end of a word to its text.

    python -m pytest tests/test_streaming.py
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from test_bench import run_here
from test_stream import checkpoint

from checkpoint import save_checkpoint
from tools import streaming

PIECE = 320  # samples of 20 ms


class Recogniser:
    """Stands for a stream: says a text from a number of pieces on, each piece taking 1 ms."""

    cfg = SimpleNamespace(sample_rate_hz=16000)

    def __init__(self, texts):
        self.texts, self.pieces, self.sentences = texts, 0, []

    def accept(self, samples):
        assert len(samples) <= PIECE
        self.pieces += 1
        return max((n, text) for n, text in self.texts.items() if n <= self.pieces)[1]

    def finish(self):
        return self.texts[max(self.texts)]


def test_a_word_has_the_time_of_its_last_letter(monkeypatch):
    clock = itertools.count(0, 0.001)
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: next(clock))
    stream = Recogniser({0: "", 3: "FOUR", 5: "FOURTEEN", 7: "FOURTEEN DAYS",
                         1000: "FOURTEEN DAYS X"})
    seconds, timed = streaming.listen(stream, np.zeros(10 * PIECE - 1, np.float32))
    assert len(seconds) == 10
    assert seconds == pytest.approx([0.001] * 10)
    assert [word for word, _ in timed] == ["FOURTEEN", "DAYS", "X"]
    for (_, at_s), piece in zip(timed, (5, 7, 10), strict=True):
        assert at_s == pytest.approx(0.02 * piece + seconds[piece - 1])


def test_a_piece_waits_for_the_pieces_before_it(monkeypatch):
    """Computing a piece of 20 ms takes 30 ms, so the last of ten pieces is late by 100 ms."""
    clock = iter(0.03 * (i // 2 + i % 2) for i in range(1000))  # pieces follow without a break
    monkeypatch.setattr(streaming.time, "perf_counter", lambda: next(clock))
    _, timed = streaming.listen(Recogniser({0: "", 10: "A"}), np.zeros(10 * PIECE, np.float32))
    assert timed == [("A", pytest.approx(0.02 + 10 * 0.03))]


def test_delays_are_those_of_recognised_words_whose_end_is_known():
    spoken = streaming.Spoken(np.zeros(0), "A B C D", {0: 1.0, 1: 2.0, 3: 4.0})
    heard = [("A", 1.25), ("X", 2.0), ("B", 2.5), ("C", 3.5), ("E", 4.5)]
    assert streaming.word_delays(heard, spoken) == [0.25, 0.5]


def test_sentences_have_ends_within_their_speech():
    pytest.importorskip("espeakng_loader", reason="espeakng-loader speaks the demo corpus")
    for spoken in streaming.speak(3, 16000):
        words = spoken.text.split()
        length_s = len(spoken.samples) / 16000
        ends_s = [spoken.ends_s[place] for place in sorted(spoken.ends_s)]
        assert 0.3 < ends_s[0] < ends_s[-1] == pytest.approx(length_s - 1, abs=1e-3)
        assert ends_s == sorted(ends_s)
        assert max(spoken.ends_s) == len(words) - 1
        level = np.abs(spoken.samples)
        assert level[: 16000 // 10].max() < 1e-3 < 0.3 < level.max()


def test_real_time_factor_and_delay_are_printed(monkeypatch, capsys, tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader speaks the demo corpus")
    monkeypatch.setattr(streaming, "word_delays", lambda *_: [0.1, 0.3])
    save_checkpoint(tmp_path / "best.pt", dict(checkpoint("plain")))
    lines, result = run_here(monkeypatch, capsys, "stream", "--checkpoint", tmp_path / "best.pt",
                             "--count", "2")
    assert result["rtf"] > 0
    assert 0 < result["median_ms"] <= result["p99_ms"]
    assert f"real-time factor {result['rtf']:.3f} on one core" in lines[0]
    assert result["delays"] == 4
    assert (result["delay_s"], result["p90_delay_s"]) == pytest.approx((0.2, 0.3))
    expected = f"4 delays for {result['words']} words: median 0.20 s, 90th percentile 0.30 s"
    assert lines[1] == expected
