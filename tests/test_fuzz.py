# SPDX-License-Identifier: Apache-2.0
"""Everything that reads files works on random input, or fails with the documented errors.

    python -m pytest tests/test_fuzz.py                # some hundred inputs
    python -m pytest tests/test_fuzz.py -m slow        # more than 10,000

Hypothesis draws the inputs from a fixed seed and shrinks what fails.
"""

import io
import re

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import features
from checkpoint import CHECKPOINT_FORMAT, load_checkpoint
from data import Problem

COUNTS = [pytest.param(100, id="quick"), pytest.param(4000, id="long", marks=pytest.mark.slow)]


def fuzz(count, strategy, check):
    """Runs `check` on `count` inputs."""
    seen = []
    common = dict(max_examples=count, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))

    @settings(**common)
    @given(strategy)
    def one(value):
        seen.append(0)
        check(value)

    one()
    assert len(seen) >= count / 2  # hypothesis stops early when it has tried everything


def encode(samples, name, rate=16000, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=name, **options)
    return buffer.getvalue()


TONE = 0.3 * np.sin(np.arange(2400) / 7)
GOOD = {
    "flac": encode(TONE, "FLAC"), "wav": encode(TONE, "WAV", subtype="FLOAT"),
    "ogg": encode(TONE, "OGG"),
}


@st.composite
def spoilt_audio(draw):
    """Suffix and bytes of a good file that is cut, or has bytes changed, inserted or deleted."""
    suffix = draw(st.sampled_from(sorted(GOOD)))
    contents = bytearray(GOOD[suffix])
    for _ in range(draw(st.integers(1, 6))):
        if not contents:
            break
        # Headers are short and matter most.
        place = draw(st.integers(0, len(contents) - 1) | st.integers(0, min(99, len(contents) - 1)))
        kind = draw(st.sampled_from(["change", "insert", "delete", "cut"]))
        if kind == "change":
            contents[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            contents[place:place] = draw(st.binary(min_size=1, max_size=40))
        elif kind == "delete":
            del contents[place : place + draw(st.integers(1, 40))]
        else:
            del contents[place:]
    return suffix, bytes(contents)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.filterwarnings("ignore")
def test_spoilt_audio_is_read_or_refused(tmp_path, count):
    def check(drawn):
        suffix, contents = drawn
        path = tmp_path / f"1-2-0000.{suffix}"
        path.write_bytes(contents)
        utterance = data.Utterance("1-2-0000", str(path), 0.0, "A")
        try:
            samples, rate = features.read_audio(path)
        except (OSError, ValueError) as error:
            problem = Problem("error", "audio not readable", "1-2-0000", str(error))
            assert problem.message.startswith(f"{path}: ")
            assert data.probe_audio(utterance, features.DEFAULT, decode=True) == [problem]
            return
        assert len(samples) > 0
        assert np.isfinite(samples).all()
        assert rate > 0
        found, *_ = data.probe_audio(utterance, features.DEFAULT, decode=True)
        assert isinstance(found, data.Utterance) or f"{path}: damaged audio: " in found.message

    fuzz(count, spoilt_audio(), check)


@pytest.mark.parametrize("count", COUNTS)
def test_any_samples_have_finite_features(count):
    numbers = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e-7])
    short = st.lists(numbers, min_size=1, max_size=700).map(lambda x: np.array(x, np.float32))

    def check(drawn):
        samples, seed = drawn
        rng = None if seed is None else np.random.default_rng(seed)
        feats = features.features(samples, rng=rng)
        assert feats.shape[1] == 256
        assert torch.isfinite(feats).all()

    fuzz(count, st.tuples(short, st.none() | st.integers(0, 99)), check)


HOSTS = st.sampled_from(
    ["n1", "n2 slots=2", "n3 slots=2 # c", "node-4.b", "n1 slots=0", " \t", "#"]
)


@pytest.mark.parametrize("count", COUNTS)
def test_any_hosts_file_is_read_or_refused(count):
    launch = pytest.importorskip("tools.launch")
    outcomes = set()

    def check(text):
        try:
            hosts, slots = launch.read_hosts(text, "hosts")
        except ValueError as error:
            outcomes.add("refused")
            message = str(error)
            assert re.match(r"hosts(:\d+: | names no host$)", message)
            return
        outcomes.add("read")
        assert hosts
        assert all(host in text for host in hosts)
        assert slots is None or slots >= 1

    lines = st.lists(HOSTS | st.text(max_size=12), max_size=5).map("\n".join)
    fuzz(count, lines | st.text(max_size=40), check)
    assert outcomes == {"read", "refused"}


LINE = st.sampled_from(["1-2-0000 ONE TWO", "1-2-0001 THREE", "1-2-0000 ", "1-3-0000 ONE"])


@pytest.mark.parametrize("count", COUNTS)
def test_any_transcript_gives_good_lines_and_problems(tmp_path, count):
    folder = tmp_path / "1" / "2"
    folder.mkdir(parents=True)
    path = folder / "1-2.trans.txt"
    lines = st.lists(LINE | st.text(max_size=30), max_size=6).map("\n".join).map(str.encode)

    def check(contents):
        path.write_bytes(contents)
        good, problems = data.separate(data.read_transcripts(path))
        for where, utterance_id, text in good:
            assert where.startswith(f"{path}:")
            assert utterance_id.startswith("1-2-")
            assert text.split() == text.split(" ")
            assert text.split()
        errors = [p for p in problems if p.level == "error"]
        if all(p.kind != "transcript not readable" for p in errors):
            pieces = contents.decode().split("\n")
            assert len(good) + len(errors) == len(pieces) - (pieces[-1] == "")

    fuzz(count, lines | st.binary(max_size=80), check)


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_checkpoint_is_refused(tmp_path, count):
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, "x": torch.arange(40)}, buffer)
    good, path = buffer.getvalue(), tmp_path / "a.pt"

    def check(drawn):
        place, patch = drawn
        path.write_bytes(good[:place] + patch + good[place + len(patch) :])
        with pytest.raises(ValueError, match="a.pt"):  # there is no checksum in it
            load_checkpoint(path)

    fuzz(count, st.tuples(st.integers(0, len(good)), st.binary(max_size=30)), check)
