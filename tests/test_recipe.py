# SPDX-License-Identifier: Apache-2.0
"""recipe.py: the published recipe, flags, presets, and wrong command lines.

    python -m pytest tests/test_recipe.py
"""

import inspect
import re
from dataclasses import asdict, fields, replace

import pytest

import decode
from features import FeatureConfig
from model import PRESETS, ModelConfig
from optimizer import Lamb
from recipe import RECIPES, TrainConfig, parse_configs

# ------------------------------------------------------------------------------ published recipes

# MLPerf's name -> the value that every closed RNN-T run logs, and our default.
CONSTANTS = {
    "opt_base_learning_rate": (0.004, TrainConfig.lr),
    "opt_learning_rate_warmup_epochs": (6, TrainConfig.warmup_epochs),
    "opt_lamb_learning_rate_hold_epochs": (40, TrainConfig.hold_epochs),
    "opt_lamb_learning_rate_decay_poly_power": (0.935, TrainConfig.lr_gamma),
    "opt_lamb_learning_rate_min": (1e-5, TrainConfig.lr_min),
    "opt_lamb_epsilon": (1e-9, TrainConfig.eps),
    "opt_lamb_beta_1": (0.9, TrainConfig.beta1),
    "opt_lamb_beta_2": (0.999, TrainConfig.beta2),
    "opt_weight_decay": (1e-3, TrainConfig.weight_decay),
    "opt_gradient_clip_norm": (1, TrainConfig.clip_norm),
    "opt_name": ("lamb", Lamb.__name__.lower()),
    "gradient_accumulation_steps": (1, TrainConfig.accumulation),
    "model_eval_ema_factor": (0.999, TrainConfig.ema_decay),
    "model_weights_initialization_scale": (0.5, ModelConfig.weights_init_scale),
    "eval_max_prediction_symbols": (300, decode.MAX_SYMBOLS),
    "data_train_max_duration": (16.7, FeatureConfig.max_utterance_s),
    "data_train_num_buckets": (6, FeatureConfig.num_buckets),
    "data_speed_perturbaton_min": (0.85, FeatureConfig.speed_min),  # spelt so in the logs
    "data_speed_perturbaton_max": (1.15, FeatureConfig.speed_max),
    "data_spec_augment_freq_n": (2, FeatureConfig.freq_masks),
    "data_spec_augment_freq_max": (20, FeatureConfig.freq_mask_max),
    "data_spec_augment_time_n": (10, FeatureConfig.time_masks),
    "data_spec_augment_time_max": (0.03, FeatureConfig.time_mask_max),
}

REQUIRED = ["--data", "corpus", "--train-splits", "train", "--dev-split", "dev", "--out", "run"]


def parse(*argv):
    return parse_configs([*REQUIRED, *argv])


@pytest.mark.parametrize("key", sorted(CONSTANTS))
def test_default_is_mlperfs(key):
    published, ours = CONSTANTS[key]
    assert ours == published


def test_ranks_share_a_batch_that_is_a_multiple_of_them():
    shared, own = (parse("--batch-size", "6", *flags)[0] for flags in (["--share-batch"], []))
    assert (shared.rank_batch(3), shared.global_batch(3)) == (2, 6)
    assert (own.rank_batch(3), own.global_batch(3)) == (6, 18)
    message = "batch_size: 6, expected a multiple of 4, the ranks"
    with pytest.raises(ValueError, match=message):
        shared.rank_batch(4)
    with pytest.raises(ValueError, match=message):  # the launcher says --ranks
        replace(shared, ranks=4)


# -------------------------------------------------------------------------------------------- flags


def another(value):
    """A legal value for a numeric or boolean field whose default is `value`."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 0.9 * value + 0.001


@pytest.mark.parametrize("config", [TrainConfig, ModelConfig, FeatureConfig])
def test_every_field_is_a_flag(config):
    names = {"preset": "baseline", "precision": "bf16", "backend": "mpi", "init": "best.pt",
             "submission_division": "closed", "submission_org": "Ours", "normalize": "none",
             "look_ahead": 8}
    defaults = next(c for c in parse() if isinstance(c, config))
    for field in fields(config):
        if field.name in ("data", "train_splits", "dev_split", "out"):
            continue  # REQUIRED has them
        flag = "--" + field.name.replace("_", "-")
        if field.name in ("feature_size", "char_head"):  # follow from other flags
            with pytest.raises(SystemExit):
                parse(flag, "256")
            continue
        old = getattr(defaults, field.name)
        value = names.get(field.name) or another(old)
        argv = [flag, str(value)]
        if field.name in ("ctc_split", "char_weight", "lattice_band"):  # a CTC loss allows them
            argv += ["--ctc-weight", "0.1"]
        if isinstance(value, bool):
            argv = [flag if value else flag.replace("--", "--no-")]
        changed = next(c for c in parse(*argv) if isinstance(c, config))
        assert getattr(changed, field.name) == value != old, flag


def test_help_tells_what_every_flag_does_and_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_configs(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "factor per epoch after these, without hold_share (0.935)" in said
    assert "--stack STACK frames that StackTime concatenates (8)" in said  # of the default preset
    assert "of the utterance's own length (0.03)" in said
    assert re.search(r"--num-buckets NUM_BUCKETS [^-]*\(12\)", said)


@pytest.mark.parametrize("config", [TrainConfig, ModelConfig, FeatureConfig])
def test_every_field_has_a_comment_which_is_the_help_of_its_flag(config):
    explained = re.findall(r"^    (\w+): .*?  # ", inspect.getsource(config), re.MULTILINE)
    assert explained == [field.name for field in fields(config)]


def test_the_models_input_size_follows_the_front_end():
    _, model_cfg, features = parse("--num-mels", "20", "--splice", "5", "--align", "16")
    assert model_cfg.feature_size == features.feature_size == 112


def test_train_splits_may_be_many():
    assert parse("--train-splits", "a", "b", "c")[0].train_splits == ("a", "b", "c")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_brings_its_model_and_recipe(preset):
    cfg, model_cfg, features = parse("--preset", preset)
    recipe = dict(RECIPES.get(preset, {}))
    required = dict(data="corpus", train_splits=("train",), dev_split="dev", out="run")
    ctc_split = recipe.pop("ctc_split")
    names = {field.name for field in fields(FeatureConfig)} & set(recipe)
    assert features == FeatureConfig(**{name: recipe.pop(name) for name in names})
    assert asdict(cfg) == asdict(TrainConfig(**required, preset=preset, **recipe))
    assert model_cfg == replace(PRESETS[preset], ctc_split=ctc_split if cfg.has_ctc else 0,
                                char_head=cfg.char_weight > 0)


@pytest.mark.parametrize("argv", [
    ["--preset", "demo", "--epochs", "3", "--stack", "2"],
    ["--stack", "2", "--epochs", "3", "--preset", "demo"],
])
def test_flags_win_over_the_preset_wherever_they_stand(argv):
    cfg, model_cfg, _ = parse(*argv)
    assert RECIPES["demo"]["epochs"] != 3
    assert cfg.epochs == 3
    assert cfg.ema_decay == RECIPES["demo"]["ema_decay"] != TrainConfig.ema_decay
    assert model_cfg == replace(PRESETS["demo"], stack=2, ctc_split=2, char_head=True)


WRONG_FLAGS = """
    --learning-rate 0.1; --epoch 3; --epochs 2.5; --epochs 0; --epochs many; --batch-size -4;
    --accumulation 0; --lr 0; --lr nan; --lr inf; --lr-min 0.5; --lr-gamma 1.01; --clip-norm -1;
    --beta1 1.0; --ema-decay 1.5; --target-wer 25; --time-limit-s nan; --seed -1; --preset huge;
    --precision fp16; --backend nccl; --submission-division shut; --enc-dropout 1.25; --stack 0;
    --weights-init-scale nan; --speed-max 0.75; --speed-max inf; --dither inf; --hop -1;
    --time-mask-max 1.5; --freq-mask-max 81; --fft-size 256; --trim-db 3; --trim-db nan;
    --unknown 1; --ctc-weight -1; --ctc-epochs -1; --hold-share 1; --ramp-begin -1
"""


@pytest.mark.parametrize("argv", [flag.split() for flag in WRONG_FLAGS.split(";")], ids=" ".join)
def test_a_wrong_flag_ends_with_status_2_and_is_named(argv, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse(*argv)
    message = capsys.readouterr().err.rpartition("error:")[2]
    assert argv[0].strip("-").replace("-", "_") in message.replace("-", "_")
    assert argv[1] in message


@pytest.mark.parametrize("argv", [["--char-weight", "0.5"], ["--lattice-band", "4"],
                                  ["--ctc-split", "0", "--ctc-weight", "1"]], ids=" ".join)
def test_flags_of_the_ctc_heads_need_them(argv, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        parse("--preset", "baseline", *argv)
    name = argv[0].strip("-").replace("-", "_")
    assert f"{name}: {argv[1]}, expected" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data", "--train-splits", "--dev-split", "--out"])
def test_the_corpus_and_the_run_directory_must_be_given(flag, capsys):
    i = REQUIRED.index(flag)
    with pytest.raises(SystemExit, match="^2$"):
        parse_configs(REQUIRED[:i] + REQUIRED[i + 2 :])
    assert flag in capsys.readouterr().err
