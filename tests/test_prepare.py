# SPDX-License-Identifier: Apache-2.0
"""The demo corpus is as promised and always the same; `check` finds the problems of a corpus.

python -m pytest tests/test_prepare.py
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tones import REPO

from tools import demo, locked, prepare

SIZES = {"num_train": 70, "num_dev": 6, "seed": 3}  # 64 voices: six of them speak twice
VOICE = demo.Voice(1, "gmw/en-US+m1", 175, 50, 50)


def read_tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def transcripts(root, split):
    """Reads id -> text from the files, without data.py."""
    files = sorted((root / split).glob("*/*/*.trans.txt"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return dict(line.split(" ", 1) for line in lines)


def recordings(root):
    """Reads every FLAC as (path, int16 samples)."""
    return [(p, soundfile.read(p, dtype="int16")[0]) for p in sorted(root.rglob("*.flac"))]


def words_of(texts):
    return set(" ".join(texts).split())


def say(scratch, text, voice=VOICE):
    """Speak with a newly loaded synthesiser."""
    scratch.mkdir()
    return demo.Espeak(scratch).say(text, voice, seed=1)


def start_demo(root, **env):
    """Make the small demo corpus in another process."""
    code = ("import pathlib, sys; from tools import demo; "
            f"demo.make_demo(pathlib.Path(sys.argv[1]), **{SIZES})")
    return subprocess.Popen([sys.executable, "-c", code, str(root)], cwd=REPO,
                            env=os.environ | env)


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """Makes a small demo corpus, which tests must not change."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader speaks the demo corpus")
    root = tmp_path_factory.mktemp("corpora") / "demo"
    demo.make_demo(root, **SIZES)
    return root


@pytest.fixture
def corpus(spoken, tmp_path):
    """Makes a copy that tests may damage."""
    return Path(shutil.copytree(spoken, tmp_path / "demo"))


# ---------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def prompts():
    """Plans the default demo corpus; returns split -> prompts."""
    prompts = demo.plan_demo(demo.DEMO_TRAIN_UTTERANCES, demo.DEMO_DEV_UTTERANCES,
                             demo.DEMO_SEED)
    return {s: [x for x in prompts if x.split == s] for s in ("train-demo", "dev-demo")}


def test_recipe_1_has_these_prompts(prompts):
    assert demo.DEMO_RECIPE == 1
    assert len({x.id for split in prompts.values() for x in split}) == 2100
    lines = [f"{x.split} {x.id} {' '.join(map(str, x.voice))} {x.text}"
             for split in prompts.values() for x in split]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == (
        "64f3a688ceade090fb8daae84aa348ab5450cf830cd9357a036815b9c9106a0c")


def test_dev_sentences_are_new_and_different(prompts):
    """Every dev word is trained; there are 60 or more, each trained 20 times or more."""
    train, dev = ([x.text for x in split] for split in prompts.values())
    assert not set(dev) & set(train)
    assert len(set(dev)) == len(dev)
    counts = Counter(" ".join(train).split())
    assert len(counts) >= 60
    assert min(counts.values()) >= 20
    assert words_of(dev) <= set(counts)


def test_dev_speakers_and_vocal_tracts_are_new_and_all_accents_are_trained(prompts):
    train, dev = ({x.voice for x in split} for split in prompts.values())
    voices = train | dev
    assert len({v.speaker for v in voices}) == len({v.name for v in voices}) == len(voices) == 72
    assert not {v.speaker for v in train} & {v.speaker for v in dev}
    assert not {v.name.split("+")[1] for v in train} & {v.name.split("+")[1] for v in dev}
    train, dev = ({v.name.split("+")[0] for v in voices} for voices in (train, dev))
    assert dev <= train == set(demo.ACCENTS)


# --------------------------------------------------------------------------------------- the sound


def test_tree_is_librispeech(spoken):
    expected = {"recipe.txt"}
    for split, count in (("train-demo", SIZES["num_train"]), ("dev-demo", SIZES["num_dev"])):
        texts = transcripts(spoken, split)
        assert len(texts) == count
        for utterance, text in texts.items():
            speaker, chapter, number = utterance.split("-")
            assert len(number) == 4
            assert text == text.upper()
            folder = f"{split}/{speaker}/{chapter}"
            expected |= {f"{folder}/{utterance}.flac", f"{folder}/{speaker}-{chapter}.trans.txt"}
    assert set(read_tree(spoken)) == expected


def test_audio_is_16_khz_mono_int16(spoken):
    infos = [soundfile.info(path) for path, _ in recordings(spoken)]
    assert {(i.samplerate, i.channels, i.subtype) for i in infos} == {(16000, 1, "PCM_16")}


def test_no_utterance_is_silent_clipped_or_cut(spoken):
    texts = transcripts(spoken, "train-demo") | transcripts(spoken, "dev-demo")
    for path, samples in recordings(spoken):
        seconds, words = len(samples) / 16000, texts[path.stem].split()
        samples = samples.astype(float)
        # The noise is 20 dB or more below the speech and moves the peak by little.
        assert -14.5 < 20 * np.log10(np.abs(samples).max() / 2**15) < -1, path
        assert 1.2 < seconds < 4.2, path
        assert 0.2 < seconds / len(words) < 0.7, path  # 5 words a second are fast speech
        # The first and the last 80 ms are pause: noise 20 dB or more below the speech. The limit
        # is 15 dB because `level` is that of speech and pauses together.
        level = np.sqrt(np.mean(samples**2))
        for end in (samples[:1280], samples[-1280:]):
            assert 0 < np.sqrt(np.mean(end**2)) < level * 10 ** (-15 / 20), path


def test_speech_keeps_its_speed(spoken, tmp_path):
    text = "CALL ANNA ON MONDAY THE TWENTY THIRD OF MAY"
    spoken_s = len(say(tmp_path / "scratch", text)) / 22050  # espeak-ng's sample rate
    folder = tmp_path / "corpus"
    hours = demo.write_demo(folder, [demo.Prompt("split", "1-1-0000", VOICE, text)], seed=1)
    [(_, samples)] = recordings(folder)
    assert hours == len(samples) / 16000 / 3600
    # Speakers vary their rate by 6 %. Without resampling the factor would be 22050 / 16000.
    assert spoken_s * 0.9 < len(samples) / 16000 - 2 * demo.PAUSE_S[0] < spoken_s * 1.1 + 0.2


# --------------------------------------------------------------------------------- making it again


def test_same_bytes_in_a_process_with_another_hash_seed(spoken, tmp_path):
    assert start_demo(tmp_path / "again", PYTHONHASHSEED="7").wait() == 0
    assert read_tree(tmp_path / "again") == read_tree(spoken)


def test_another_seed_says_something_else(spoken, tmp_path):
    demo.make_demo(tmp_path / "other", **SIZES | {"seed": 4})
    assert transcripts(tmp_path / "other", "dev-demo") != transcripts(spoken, "dev-demo")


def test_a_complete_corpus_is_not_written_again(corpus, capsys):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    demo.make_demo(corpus, **SIZES)
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before
    assert f"{corpus}: is there already" in capsys.readouterr().out


def test_another_corpus_is_not_overwritten(corpus):
    before = read_tree(corpus)
    with pytest.raises(FileExistsError, match="holds something other"):
        demo.make_demo(corpus, **SIZES | {"seed": 4})
    assert read_tree(corpus) == before


@pytest.mark.parametrize(("function", "name"), [
    ("mkdir", ".unfinished"), ("mkdir", "110"),  # before and after the first speakers
    ("rename", "train-demo"), ("write_text", "recipe.txt"), ("rmdir", ".unfinished"),
])
def test_an_interruption_at_any_moment_is_mended(spoken, tmp_path, monkeypatch, function, name):
    """Files are renamed inside of the folder only, because it may be a mount point."""
    real = getattr(Path, function)

    def interrupt(path, *rest, **others):
        if path.name == name:
            raise KeyboardInterrupt
        if function == "rename":
            assert path.parent.parent == rest[0].parent == tmp_path
        return real(path, *rest, **others)

    for _ in range(2):
        monkeypatch.setattr(Path, function, interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.make_demo(tmp_path, **SIZES)
        monkeypatch.setattr(Path, function, real)
    demo.make_demo(tmp_path, **SIZES)
    assert read_tree(tmp_path) == read_tree(spoken)


def test_a_complete_corpus_may_lie_on_a_disk_that_nobody_can_write_to(spoken, monkeypatch, capsys):
    monkeypatch.setattr(demo, "locked", None)
    demo.make_demo(spoken, **SIZES)
    assert "is there already" in capsys.readouterr().out


@pytest.mark.slow
def test_a_second_call_waits_for_the_first(spoken, tmp_path):
    with locked(tmp_path):
        call = start_demo(tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(5)
        assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]
    assert call.wait(120) == 0
    assert read_tree(tmp_path) == read_tree(spoken)


# --------------------------------------------------------------------------------------- espeak-ng


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # import fails
    assert prepare.main(["demo", str(tmp_path / "demo")]) == 1
    assert "pip install espeakng-loader" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_every_variant_exists():
    # espeak-ng ignores a variant that it does not know.
    loader = pytest.importorskip("espeakng_loader", reason="espeakng-loader brings the voices")
    folder = Path(loader.get_data_path()) / "voices" / "!v"
    names = {*demo.TRAIN_VARIANTS, *demo.DEV_VARIANTS}
    assert names <= {path.name for path in folder.iterdir()}


def test_capitals_are_spoken_like_small_letters(spoken, tmp_path):
    text = "HEAT THE OFFICE TO TEN DEGREES"
    assert np.array_equal(say(tmp_path / "capitals", text), say(tmp_path / "small", text.lower()))


def test_words_start_where_their_sound_starts(spoken, tmp_path):
    """The pause at a comma is silent; a word that is spoken with the one before has no start."""
    espeak = demo.Espeak(tmp_path)
    espeak.say("TURN ON THE LIGHT", VOICE, seed=1)
    assert list(espeak.word_starts) == [0, 1, 3]
    speech = np.abs(espeak.say("CALL ANNA, PETER", VOICE, seed=1))
    assert list(espeak.word_starts) == [0, 1, 2]
    starts = list(espeak.word_starts.values())
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert speech[starts[2] - 1000 : starts[2]].max() < 0.01 < speech[starts[2] :][:4000].max()


def test_voices_below_a_long_path_are_found(spoken, tmp_path, monkeypatch):
    import espeakng_loader

    deep = tmp_path / ("x" * 160)
    deep.symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep))
    assert len(say(tmp_path / "scratch", "HELLO")) > 5000


def test_ctrl_c_in_the_middle_of_an_utterance_ends_the_demo(spoken, tmp_path, monkeypatch):
    class Chunks(list):
        def append(self, chunk):
            os.kill(os.getpid(), signal.SIGINT)
            super().append(chunk)

    espeak = demo.Espeak(tmp_path)
    espeak._chunks = Chunks()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            espeak.say("HELLO", VOICE, seed=1)
        assert len(espeak._chunks) > 1
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("field", "value"), [
    ("rate_wpm", 120), ("pitch", 90), ("pitch_range", 90), ("name", "gmw/en-US+f1")])
def test_every_field_of_a_voice_is_heard(spoken, tmp_path, field, value):
    first, same, other = (
        say(tmp_path / str(number), "CALL ANNA ON MONDAY", voice)
        for number, voice in enumerate((VOICE, VOICE, VOICE._replace(**{field: value}))))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


# ------------------------------------------------------------------------------------------- check


def test_check_of_a_good_corpus(spoken, capsys):
    assert prepare.main(["check", str(spoken)]) == 0
    dev, train = capsys.readouterr().out.splitlines()
    texts = transcripts(spoken, "train-demo").values()
    seconds = sum(len(x) for p, x in recordings(spoken / "train-demo")) / 16000
    assert train == (
        f"train-demo: 70 utterances, {seconds / 3600:.2f} h, {len(' '.join(texts).split())} words, "
        f"{len(words_of(texts))} distinct words, 64 speakers"
    )
    assert dev.startswith("dev-demo: 6 utterances, ")


def test_check_of_named_splits_sees_no_other(corpus, capsys):
    next((corpus / "train-demo").rglob("*.flac")).unlink()
    assert prepare.main(["check", str(corpus), "dev-demo"]) == 0
    assert "train-demo" not in capsys.readouterr().out
    assert prepare.main(["check", str(corpus), "dev-demo", "train-demo"]) == 1
    assert prepare.main(["check", str(corpus), "test-demo"]) == 1


def test_check_sees_a_split_without_any_transcript(corpus, capsys):
    for path in (corpus / "dev-demo").rglob("*.trans.txt"):
        path.unlink()
    assert prepare.main(["check", str(corpus)]) == 1
    assert "dev-demo" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_check_without_any_split_has_status_1(tmp_path, capsys, folder):
    assert prepare.main(["check", str(tmp_path / folder)]) == 1
    assert "no audio in it as" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["..", "dev-demo"])
def test_check_at_a_wrong_level_names_the_corpus(corpus, capsys, level):
    folder = (corpus / level).resolve()
    assert prepare.main(["check", str(folder)]) == 1
    splits = "dev-demo, train-demo" if level == ".." else "dev-demo"
    assert capsys.readouterr().err == (
        f"tools.prepare: {folder}: no audio in it as <split>/<speaker>/<chapter>/*.flac; "
        f"the corpus to name is {corpus}, with the splits {splits}\n")


@pytest.mark.parametrize("argv", [
    [], ["demo"], ["check"], ["dem", "x"], ["demo", "x", "--no"], ["import", "x", "y"],
    ["mini-librispeech", "x", "--mirror", "y", "--archive", "z"],
])
def test_a_wrong_command_line_has_status_2(argv):
    with pytest.raises(SystemExit) as stop:
        prepare.main(argv)
    assert stop.value.code == 2
