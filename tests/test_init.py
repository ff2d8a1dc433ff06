# SPDX-License-Identifier: Apache-2.0
"""--init begins a new run from the averaged weights of another.

    python -m pytest tests/test_init.py

A run on tones is the origin. Runs that begin from it are looked at before their first step, where
the weights are still those that they began with.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tones import REPO, TINY, events, run_here, tiny_corpus

import recipe
import train
from checkpoint import load_checkpoint, save_checkpoint
from model import PRESETS
from recipe import TrainConfig, make_configs
from tools import tune

# The flags of a short run without those of the model, which the checkpoint of --init has.
SHORT = [
    "--train-splits", "train", "--dev-split", "dev", "--precision", "fp32", "--batch-size", "2",
    "--eval-batch-size", "2", "--epochs", "2", "--lr", "0.01", "--max-utterance-s", "1.0",
    "--loader-workers", "0", "--ctc-weight", "0", "--char-weight", "0",
    "--eval-epochs", "1",
]


@pytest.fixture(scope="module")
def origin(corpus, tmp_path_factory):
    """The best.pt of a run of one epoch, whose average differs from its last weights."""
    out = tmp_path_factory.mktemp("origin") / "run"
    assert run_here("--data", corpus, "--out", out, *TINY, "--epochs", 1) == 0
    return out / "best.pt"


@pytest.fixture
def other_letters(tmp_path):
    """The corpus of the origin, with a letter that its tokenizer does not have."""
    root = tiny_corpus(tmp_path / "other")
    for transcript in root.rglob("*.trans.txt"):
        text = transcript.read_text(encoding="utf-8").replace("O", "\u00d6")
        transcript.write_text(text, encoding="utf-8")
    return root


class Begun(BaseException):
    """Ends a run before its first step; `trainer` is in the state of its beginning."""

    def __init__(self, trainer):
        self.trainer = trainer


@pytest.fixture
def begin(corpus, origin, tmp_path, monkeypatch):
    """begin(flags) -> the trainer of a run from `origin` before its first step."""

    def start(*argv, root=corpus, init=origin):
        def stop(trainer, *_):
            raise Begun(trainer)

        monkeypatch.setattr(train, "train_step", stop)
        with pytest.raises(Begun) as begun:
            run_here("--data", root, "--out", tmp_path / "run", "--init", init, *SHORT, *argv)
        return begun.value.trainer

    return start


def tensors_that_differ(weights, stored):
    return {name for name, x in weights.items()
            if name not in stored or not torch.equal(x, stored[name])}


CLASSES = {"predictor.embed.weight", "joint_network.output.weight", "joint_network.output.bias"}
HEAD = {"ctc_head.weight", "ctc_head.bias"}


# ------------------------------------------------------------------------------------- what comes


def test_a_run_begins_with_averaged_weights_and_statistics(begin, origin):
    trainer, stored = begin(), load_checkpoint(origin)
    assert tensors_that_differ(stored["ema"], stored["model"])  # the last weights are others
    for model in (trainer.model, trainer.ema):
        assert not tensors_that_differ(model.state_dict(), stored["ema"])
    assert not torch.equal(trainer.ema.encoder.feature_norm.running_mean, torch.zeros(256))
    assert not trainer.optimizer.state


def test_flags_mean_what_the_checkpoints_preset_makes_of_them(begin):
    """The default preset has a band, and would refuse it without a CTC loss."""
    assert TrainConfig.preset != "demo"
    cfg = begin("--ctc-weight", "0").cfg
    assert (cfg.preset, cfg.ctc_weight, cfg.lattice_band) == ("demo", 0, 0)


def test_the_weights_are_evaluated_before_the_first_step(begin, origin, tmp_path, capsys):
    begin()
    (first,) = events(tmp_path / "run", "eval")
    (before,) = events(origin.parent, "eval")
    assert (first["step"], first["epoch"], first["epochs"], first["loss"]) == (0, 0, 0, None)
    for name in ("errors", "words", "cer", "labels"):
        assert first[name] == before[name]
    assert load_checkpoint(tmp_path / "run" / "best.pt")["state"]["step"] == 0
    assert (f"init: averaged weights of {origin}, step 4; layers that start anew: none\n"
            in capsys.readouterr().out)


def test_schedule_dropout_augmentation_and_batch_are_the_runs_own(begin):
    trainer = begin("--lr", "0.003", "--batch-size", "4", "--enc-dropout", "0.4",
                    "--freq-mask-max", "5", "--num-buckets", "1")
    assert (trainer.cfg.lr, trainer.cfg.batch_size, trainer.cfg.preset) == (0.003, 4, "demo")
    assert trainer.model.cfg.enc_hidden == 16  # of the origin; the preset has 160
    assert trainer.model.encoder.post.dropout.p == 0.4


def test_a_field_younger_than_the_checkpoint_has_its_default(begin, origin, tmp_path):
    contents = load_checkpoint(origin)
    del contents["model_config"]["bidirectional"]
    save_checkpoint(tmp_path / "old.pt", contents)
    trainer = begin("--preset", "mini", "--lattice-band", "0", init=tmp_path / "old.pt")
    assert trainer.model.cfg.bidirectional < PRESETS["mini"].bidirectional


def test_a_preset_is_a_recipe_for_another_model(begin):
    trainer = begin("--preset", "mini", "--lattice-band", "0")
    assert trainer.cfg.weight_decay == recipe.RECIPES["mini"]["weight_decay"]
    assert (trainer.model.cfg.enc_hidden, trainer.model.cfg.pred_dropout) == (16, 0.3)
    assert trainer.model.predictor.rnn.dropout.p == 0.3


@pytest.mark.parametrize(("argv", "epochs"), [([], (0, 0)), (["--ctc-epochs", "1"], (1, 0))])
def test_the_recipes_start_for_random_weights_is_left_out(begin, argv, epochs):
    cfg = begin("--preset", "mini", "--lattice-band", "0", *argv).cfg
    assert recipe.RECIPES["mini"]["ctc_epochs"] > 1
    assert (cfg.ctc_epochs, cfg.ramp_begin) == epochs


def test_texts_that_the_tokenizer_cannot_spell_give_a_new_one(
    begin, origin, other_letters, tmp_path, capsys
):
    trainer, stored = begin("--ctc-epochs", "0", root=other_letters), load_checkpoint(origin)
    assert tensors_that_differ(trainer.model.state_dict(), stored["ema"]) == CLASSES
    said = capsys.readouterr().out
    assert "init: a new tokenizer, because the checkpoint's cannot spell" in said
    assert "no piece for" in said
    assert "layers that start anew: joint_network.output, predictor.embed\n" in said
    assert events(tmp_path / "run", "eval") == []  # random classes recognise no word


def test_small_letters_are_told_of_the_tokenizer_of_capitals(begin, tmp_path, capsys):
    root = tiny_corpus(tmp_path / "small")
    for transcript in root.rglob("*.trans.txt"):
        transcript.write_text(transcript.read_text(encoding="utf-8").lower(), encoding="utf-8")
    begin("--ctc-epochs", "0", root=root)
    said = capsys.readouterr().out
    assert "init: a new tokenizer, because the checkpoint's cannot spell" in said
    assert "warning: it could spell the texts in capitals" in said


def test_new_labels_need_the_recipes_start_also_after_a_restart(origin, other_letters, tmp_path):
    run = ["--data", other_letters, "--out", tmp_path / "run", *SHORT, "--init", origin]
    for argv in ([], ["--resume"]):
        assert run_here(*run, *argv, "--time-limit-s", "1e-6") == 75
    for event in events(tmp_path / "run", "start"):
        for name in recipe.ALIGNED_START:
            assert event["train_config"][name] == recipe.RECIPES["demo"][name] > 0, name


def test_a_vocabulary_size_gives_a_new_tokenizer(begin, origin):
    trainer = begin("--vocab-size", "12", "--ctc-epochs", "0")
    stored = load_checkpoint(origin)
    assert trainer.model.cfg.vocab_size == 12 != stored["model_config"]["vocab_size"]
    assert tensors_that_differ(trainer.model.state_dict(), stored["ema"]) == CLASSES


def test_a_ctc_head_that_the_checkpoint_does_not_have_starts_anew(begin, origin, capsys):
    trainer, stored = begin("--ctc-weight", "0.5"), load_checkpoint(origin)
    assert tensors_that_differ(trainer.model.state_dict(), stored["ema"]) == HEAD
    assert "layers that start anew: ctc_head\n" in capsys.readouterr().out
    trainer = begin("--ctc-weight", "0.5", "--char-weight", "0.5", "--restart")
    both = HEAD | {"char_head.weight", "char_head.bias"}
    assert tensors_that_differ(trainer.model.state_dict(), stored["ema"]) == both
    assert "layers that start anew: char_head, ctc_head\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("argv", "message"), [
    (["--enc-hidden", "24"], "enc_hidden: 24, but the checkpoint of --init has 16"),
    (["--hop", "80"], "hop: 80, but the checkpoint of --init has 160"),
])
def test_a_flag_that_contradicts_the_checkpoint_names_both_values(
    corpus, origin, tmp_path, capsys, argv, message
):
    with pytest.raises(SystemExit, match="^2$"):
        run_here("--data", corpus, "--out", tmp_path, "--init", origin, *SHORT, *argv)
    assert (f"error: {message}, which the run keeps: leave the flag out\n"
            in capsys.readouterr().err)


def test_a_missing_checkpoint_is_named(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt: no such checkpoint"):
        run_here("--data", corpus, "--out", tmp_path / "run", "--init", "none.pt", *SHORT)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- restarts


def test_a_run_goes_on_without_the_file_that_it_began_from(corpus, origin, tmp_path):
    copy = shutil.copy(origin, tmp_path / "copy.pt")
    run = ["--data", corpus, "--out", tmp_path / "run", *SHORT]
    assert run_here(*run, "--init", copy, "--time-limit-s", "1e-6") == 75
    (tmp_path / "copy.pt").unlink()
    assert run_here(*run, "--init", copy, "--resume", "--time-limit-s", "1e-6") == 75
    assert run_here(*run, "--resume") == 0
    assert [e["step"] for e in events(tmp_path / "run", "step")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [e["step"] for e in events(tmp_path / "run", "eval")] == [0, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="its run did not begin with --init other.pt"):
        run_here(*run, "--init", "other.pt", "--resume")


def test_a_run_goes_on_in_another_folder(corpus, origin, tmp_path, monkeypatch):
    run = ["--data", corpus, "--out", tmp_path / "run", *SHORT]
    monkeypatch.chdir(origin.parent)
    assert run_here(*run, "--init", "best.pt", "--time-limit-s", "1e-6") == 75
    monkeypatch.chdir(tmp_path)
    assert run_here(*run, "--init", origin, "--resume", "--epochs", "1") == 0


def test_a_run_from_random_weights_is_not_resumed_with_init(corpus, origin, tmp_path):
    run = ["--data", corpus, "--out", tmp_path, *TINY]
    assert run_here(*run, "--time-limit-s", "1e-6") == 75
    with pytest.raises(ValueError, match=f"did not begin with --init {origin}; give another --out"):
        run_here(*run, "--init", origin, "--resume")


def test_a_run_that_is_older_than_the_ctc_heads_goes_on_without_them():
    checkpoint = {"train_config": {"init": "a.pt"}}
    cfg = TrainConfig("", (), "", "", init="a.pt")
    kept, start = train.find_origin(cfg, (Path("checkpoint-00000001.pt"), checkpoint))
    assert kept is checkpoint
    assert start == {"ctc_epochs": 0, "ramp_begin": 0, "ramp_epochs": 0}


def test_flags_are_checked_against_the_sizes_of_the_checkpoint(origin):
    stored = load_checkpoint(origin)
    stored["feature_config"] |= {"num_mels": 128}
    stored["model_config"] |= {"feature_size": 384}
    given = dict(data="", train_splits=(), dev_split="", out="", freq_mask_max=100)
    _, model, features = make_configs(given, stored)
    assert (features.num_mels, features.freq_mask_max, model.feature_size) == (128, 100, 384)


def test_a_search_from_a_checkpoint_has_its_defaults(origin):
    values = tune.parse(["--data", "", "--train-splits", "", "--dev-split", "", "--out", "",
                         "--init", str(origin)])
    assert (values["preset"], values["enc_hidden"], values["ctc_epochs"]) == ("demo", 16, 0)


@pytest.mark.slow
def test_two_ranks_begin_with_the_same_weights(corpus, origin, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", REPO / "train.py", "--data", corpus, "--out", tmp_path / "run", "--init",
               origin, *SHORT, "--batch-size", "1", "--epochs", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    first, _ = events(tmp_path / "run", "eval")
    (before,) = events(origin.parent, "eval")
    assert first["errors"] == before["errors"]
