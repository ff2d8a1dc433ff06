# SPDX-License-Identifier: Apache-2.0
"""prepare.py makes the demo corpus that it promises, and finds what is wrong with a corpus.

python -m pytest tests/test_prepare.py
"""

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tones import REPO

from tools import prepare

SIZES = {"num_train": 70, "num_dev": 6, "seed": 3}  # 64 voices: six of them speak twice


def read_tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def transcripts(root, split):
    """id -> text, straight from the files."""
    files = sorted((root / split).glob("*/*/*.trans.txt"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return dict(line.split(" ", 1) for line in lines)


def recordings(root):
    """Every FLAC as (path, int16 samples)."""
    return [(p, soundfile.read(p, dtype="int16")[0]) for p in sorted(root.rglob("*.flac"))]


def words_of(texts):
    return set(" ".join(texts).split())


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """A small demo corpus; nobody may change it."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader speaks the demo corpus")
    root = tmp_path_factory.mktemp("corpora") / "demo"
    prepare.make_demo(root, **SIZES)
    return root


@pytest.fixture
def corpus(spoken, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(spoken, tmp_path / "demo"))


# ---------------------------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def plan():
    """Lines of the default recipe, by split."""
    lines = prepare.plan_demo(
        prepare.DEMO_TRAIN_UTTERANCES, prepare.DEMO_DEV_UTTERANCES, prepare.DEMO_SEED
    )
    return {s: [x for x in lines if x.split == s] for s in ("train-demo", "dev-demo")}


def test_default_sizes(plan):
    assert {split: len(lines) for split, lines in plan.items()} == {
        "train-demo": prepare.DEMO_TRAIN_UTTERANCES,
        "dev-demo": prepare.DEMO_DEV_UTTERANCES,
    }
    dev_words = [word for line in plan["dev-demo"] for word in line.text.split()]
    assert 5 <= len(dev_words) / len(plan["dev-demo"]) < 7


def test_default_has_at_least_60_words_and_20_voices(plan):
    assert len(words_of(line.text for line in plan["train-demo"])) >= 60
    assert len({line.voice.name for lines in plan.values() for line in lines}) >= 20


def test_every_dev_word_is_in_training(plan):
    train, dev = (words_of(line.text for line in lines) for lines in plan.values())
    assert dev <= train


def test_every_word_is_trained_often(plan):
    counts = Counter(word for line in plan["train-demo"] for word in line.text.split())
    assert min(counts.values()) >= 20


def test_dev_sentences_are_new_and_different(plan):
    train, dev = ([line.text for line in lines] for lines in plan.values())
    assert not set(dev) & set(train)
    assert len(set(dev)) == len(dev)


def test_dev_speakers_and_vocal_tracts_are_new(plan):
    train, dev = ({line.voice for line in lines} for lines in plan.values())
    assert not {v.speaker for v in train} & {v.speaker for v in dev}
    assert not {v.name.split("+")[1] for v in train} & {v.name.split("+")[1] for v in dev}


def test_a_speaker_is_one_voice(plan):
    voices = {line.voice for lines in plan.values() for line in lines}
    assert len({v.speaker for v in voices}) == len({v.name for v in voices}) == len(voices)


def test_every_accent_of_dev_is_trained(plan):
    train, dev = ({x.voice.name.split("+")[0] for x in lines} for lines in plan.values())
    assert dev <= train == set(prepare.ACCENTS)


def test_ids_are_unique(plan):
    ids = [line.id for lines in plan.values() for line in lines]
    assert len(set(ids)) == len(ids)


def test_too_few_training_words_are_an_error():
    with pytest.raises(ValueError, match="2 training words give 0 dev sentences, wanted 1"):
        prepare.draw_dev_sentences(1, {"TURN", "ON"}, random.Random(0))


# --------------------------------------------------------------------------------------- the sound


def test_tree_is_librispeech(spoken):
    found = {split: transcripts(spoken, split) for split in ("train-demo", "dev-demo")}
    assert {split: len(texts) for split, texts in found.items()} == {
        "train-demo": SIZES["num_train"],
        "dev-demo": SIZES["num_dev"],
    }
    expected = {"recipe.txt"}
    for split, texts in found.items():
        for utterance, text in texts.items():
            speaker, chapter, number = utterance.split("-")
            assert len(number) == 4
            assert text == text.upper()
            folder = f"{split}/{speaker}/{chapter}"
            expected |= {f"{folder}/{utterance}.flac", f"{folder}/{speaker}-{chapter}.trans.txt"}
    assert set(read_tree(spoken)) == expected


def test_small_corpora_keep_the_splits_apart_too(spoken):
    train, dev = (set(transcripts(spoken, s).values()) for s in ("train-demo", "dev-demo"))
    assert not train & dev
    assert words_of(dev) <= words_of(train)


def test_audio_is_16_khz_mono_int16(spoken):
    infos = [soundfile.info(path) for path, _ in recordings(spoken)]
    assert {(i.samplerate, i.channels, i.subtype) for i in infos} == {(16000, 1, "PCM_16")}


def test_no_utterance_is_silent_or_clipped(spoken):
    for path, samples in recordings(spoken):
        peak_dbfs = 20 * np.log10(np.abs(samples.astype(float)).max() / 2**15)
        # The noise is 20 dB or more below the speech and moves the peak by little.
        assert -14.5 < peak_dbfs < -1, path


def test_no_utterance_is_cut(spoken):
    texts = transcripts(spoken, "train-demo") | transcripts(spoken, "dev-demo")
    for path, samples in recordings(spoken):
        seconds, words = len(samples) / 16000, texts[path.stem].split()
        assert 1.2 < seconds < 4.2, path
        assert 0.2 < seconds / len(words) < 0.7, path  # 5 words a second are fast speech
        # What is said in the first and the last 80 ms is the pause: noise 20 dB or more below
        # the speech. 15 instead of 20 dB because the level of speech here includes the pauses.
        level = np.sqrt(np.mean(samples.astype(float) ** 2))
        for end in (samples[:1280], samples[-1280:]):
            assert np.sqrt(np.mean(end.astype(float) ** 2)) < level * 10 ** (-15 / 20), path


def test_speech_keeps_its_speed(spoken, tmp_path):
    voice = prepare.Voice(1, "gmw/en-US+m1", 175, 50, 50)
    text = "CALL ANNA ON MONDAY THE TWENTY THIRD OF MAY"
    scratch, folder = tmp_path / "scratch", tmp_path / "corpus"
    scratch.mkdir()
    espeak = prepare.Espeak(scratch)
    said_s = len(espeak.say(text, voice, seed=1)) / espeak.sample_rate_hz
    hours = prepare.write_demo(folder, [prepare.Line("split", "1-1-0000", voice, text)], seed=1)
    [(_, samples)] = recordings(folder)
    assert hours == len(samples) / 16000 / 3600
    # Speakers vary their rate by 6 %. Without resampling the factor would be 22050 / 16000.
    assert said_s * 0.9 < len(samples) / 16000 - 2 * prepare.PAUSE_S[0] < said_s * 1.1 + 0.2


def test_record_pads_and_scales_and_adds_noise():
    tone = np.sin(np.arange(16000) / 5).astype(np.float32)
    loud, quiet = (prepare.record(tone * gain, random.Random(1)) for gain in (0.5, 2**-10))
    assert np.array_equal(loud, quiet)  # the level is drawn, not kept
    assert loud.dtype == np.int16
    pause = len(loud) - len(tone)
    assert 2 * prepare.PAUSE_S[0] <= pause / 16000 <= 2 * prepare.PAUSE_S[1]
    assert np.any(loud[:1600])
    assert not np.array_equal(loud[:1600], prepare.record(tone, random.Random(2))[:1600])


# --------------------------------------------------------------------------------- making it again


def test_same_seed_same_bytes(spoken, tmp_path):
    # The library has spoken in this process before; its state may not be heard.
    prepare.make_demo(tmp_path / "again", **SIZES)
    assert read_tree(tmp_path / "again") == read_tree(spoken)


def test_same_bytes_in_a_process_with_another_hash_seed(spoken, tmp_path):
    code = ("import pathlib; from tools import prepare; "
            f"prepare.make_demo(pathlib.Path('again'), **{SIZES})")
    path = str(Path(prepare.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": path},
        check=True,
    )
    assert read_tree(tmp_path / "again") == read_tree(spoken)


def test_another_seed_says_something_else(spoken, tmp_path):
    prepare.make_demo(tmp_path / "other", **SIZES | {"seed": 4})
    assert transcripts(tmp_path / "other", "dev-demo") != transcripts(spoken, "dev-demo")


def test_a_whole_corpus_is_left_alone(corpus, capsys):
    before = {p: p.stat().st_mtime_ns for p in corpus.rglob("*")}
    prepare.make_demo(corpus, **SIZES)
    assert {p: p.stat().st_mtime_ns for p in corpus.rglob("*")} == before
    assert f"{corpus}: is there already" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"seed": 4}, {"num_dev": 7}])
def test_another_recipe_is_not_overwritten(corpus, change):
    before = read_tree(corpus)
    with pytest.raises(FileExistsError, match="holds something other"):
        prepare.make_demo(corpus, **SIZES | change)
    assert read_tree(corpus) == before


def test_an_empty_folder_is_filled(spoken, tmp_path):
    prepare.make_demo(tmp_path, **SIZES)
    assert read_tree(tmp_path) == read_tree(spoken)


def test_what_an_interruption_leaves_is_made_again(spoken, tmp_path, monkeypatch):
    written = []

    def write_until_interrupted(path, *rest):
        if len(written) == 10:
            raise KeyboardInterrupt
        written.append(path)
        soundfile_write(path, *rest)

    soundfile_write = soundfile.write
    monkeypatch.setattr(soundfile, "write", write_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.make_demo(tmp_path / "deep" / "demo", **SIZES)
    assert len(written) == 10
    monkeypatch.setattr(soundfile, "write", soundfile_write)
    prepare.make_demo(tmp_path / "deep" / "demo", **SIZES)
    assert read_tree(tmp_path / "deep" / "demo") == read_tree(spoken)


@pytest.mark.parametrize("interrupted", ["rename train-demo", "write_text recipe.txt",
                                         "rmdir .unfinished", "mkdir .unfinished"])
def test_an_interruption_at_any_moment_is_mended(spoken, tmp_path, monkeypatch, interrupted):
    """Nothing may be renamed across the folder's border, which may be a mount point."""
    function, name = interrupted.split()
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
            prepare.make_demo(tmp_path, **SIZES)
        monkeypatch.setattr(Path, function, real)
    prepare.make_demo(tmp_path, **SIZES)
    assert read_tree(tmp_path) == read_tree(spoken)


@pytest.mark.slow
def test_a_second_call_waits_for_the_first(spoken, tmp_path):
    with prepare.locked(tmp_path):
        make = "import pathlib, prepare, sys\nprepare.make_demo(pathlib.Path(sys.argv[1]), **{})"
        call = subprocess.Popen([sys.executable, "-c", make.format(SIZES), str(tmp_path)], cwd=REPO)
        with pytest.raises(subprocess.TimeoutExpired):
            call.wait(5)
        assert list(tmp_path.iterdir()) == []
    assert call.wait(120) == 0
    assert read_tree(tmp_path) == read_tree(spoken)


# --------------------------------------------------------------------------------------- espeak-ng


def test_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)  # import fails
    assert prepare.main(["demo", str(tmp_path / "demo")]) == 1
    assert "pip install espeakng-loader" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_unknown_voice_is_an_error(spoken, tmp_path):
    espeak = prepare.Espeak(tmp_path)
    with pytest.raises(RuntimeError, match="no voice gmw/en-nowhere[+]m1"):
        espeak.say("HELLO", prepare.Voice(1, "gmw/en-nowhere+m1", 175, 50, 50), seed=1)


def test_every_variant_exists():
    # espeak-ng speaks without a variant if it does not know it.
    loader = pytest.importorskip("espeakng_loader", reason="espeakng-loader brings the voices")
    folder = Path(loader.get_data_path()) / "voices" / "!v"
    names = {*prepare.TRAIN_VARIANTS, *prepare.DEV_VARIANTS}
    assert names <= {path.name for path in folder.iterdir()}


def test_capitals_are_spoken_like_small_letters(spoken, tmp_path):
    text, voice = "HEAT THE OFFICE TO TEN DEGREES", prepare.Voice(1, "gmw/en-US+m1", 175, 50, 50)
    said = []
    for words in (text, text.lower()):
        scratch = tmp_path / words
        scratch.mkdir()
        said.append(prepare.Espeak(scratch).say(words, voice, seed=1))
    assert np.array_equal(*said)


def test_voices_below_a_long_path_are_found(spoken, tmp_path, monkeypatch):
    import espeakng_loader

    deep = tmp_path / ("x" * 160)
    deep.symlink_to(espeakng_loader.get_data_path())
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(deep))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    voice = prepare.Voice(1, "gmw/en-US+f1", 175, 50, 50)
    assert len(prepare.Espeak(scratch).say("HELLO", voice, seed=1)) > 5000


@pytest.mark.parametrize(
    ("field", "value"),
    [("rate_wpm", 120), ("pitch", 90), ("pitch_range", 90), ("name", "gmw/en-US+f1")],
)
def test_every_field_of_a_voice_is_heard(spoken, tmp_path, field, value):
    voice = prepare.Voice(1, "gmw/en-US+m1", 175, 50, 50)
    said = []
    for number, speaker in enumerate((voice, voice, voice._replace(**{field: value}))):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        said.append(prepare.Espeak(scratch).say("CALL ANNA ON MONDAY", speaker, seed=1))
    assert np.array_equal(said[0], said[1])
    assert not np.array_equal(said[0], said[2])


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


def test_check_counts_what_it_does_not_show(corpus, capsys):
    gone = sorted((corpus / "train-demo").rglob("*.flac"))[:13]
    for path in gone:
        path.unlink()
    assert prepare.main(["check", str(corpus)]) == 1
    output = capsys.readouterr().out
    assert "train-demo: 57 utterances" in output
    assert sum(path.stem in output for path in gone) == 10
    assert "13" in output
    assert "... and 3 more" in output


def test_check_of_named_splits_sees_no_other(corpus, capsys):
    next((corpus / "train-demo").rglob("*.flac")).unlink()
    assert prepare.main(["check", str(corpus), "dev-demo"]) == 0
    assert "train-demo" not in capsys.readouterr().out
    assert prepare.main(["check", str(corpus), "dev-demo", "train-demo"]) == 1


def test_check_of_a_warning_has_status_0(corpus, capsys):
    path = next((corpus / "dev-demo").rglob("*.flac"))
    spare = path.with_name(path.name.replace("-0000", "-0099"))
    shutil.copy(path, spare)
    assert prepare.main(["check", str(corpus), "dev-demo"]) == 0
    output = capsys.readouterr().out
    assert "warning" in output
    assert spare.stem in output


def test_check_sees_a_split_without_any_transcript(corpus, capsys):
    for path in (corpus / "dev-demo").rglob("*.trans.txt"):
        path.unlink()
    assert prepare.main(["check", str(corpus)]) == 1
    assert "dev-demo" in capsys.readouterr().out


def test_check_of_a_missing_split_has_status_1(spoken):
    assert prepare.main(["check", str(spoken), "test-demo"]) == 1


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_check_without_any_split_has_status_1(tmp_path, capsys, folder):
    assert prepare.main(["check", str(tmp_path / folder)]) == 1
    assert "no audio in it as" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["demo"], ["check"], ["dem", "x"], ["demo", "x", "--no"]])
def test_a_wrong_command_line_has_status_2(words):
    with pytest.raises(SystemExit) as stop:
        prepare.main(words)
    assert stop.value.code == 2
