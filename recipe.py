# SPDX-License-Identifier: Apache-2.0
"""How to train: the configuration, the recipes of the presets, and the flags of train.py.

Every field of TrainConfig, ModelConfig and FeatureConfig is a flag, but for feature_size and
char_head, which follow from others. A preset changes defaults of all three. The defaults of
TrainConfig are those of the MLPerf Training v1.0 RNN-T.
"""

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace

from features import FeatureConfig, check_ranges
from model import PRESETS, ModelConfig

# ------------------------------------------------------------------------ configuration and recipes


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are MLPerf v1.0's; a preset of RECIPES changes some."""

    data: str  # corpus root, in LibriSpeech's form
    train_splits: tuple[str, ...]  # folders of the corpus to train on
    dev_split: str  # folder that is scored
    out: str  # run directory
    preset: str = "democratized"  # model and recipe
    epochs: int = 49  # number of epochs; a target or a limit may end the run earlier
    batch_size: int = 32  # utterances per rank and forward pass
    share_batch: bool = False  # divide batch_size among the ranks instead of giving it to each
    accumulation: int = 1  # forward passes per step, exactly one big batch
    lr: float = 0.004  # the largest learning rate
    lr_min: float = 1e-5  # the smallest learning rate
    warmup_epochs: float = 6  # epochs in which the rate grows to lr
    hold_epochs: float = 40  # epochs at the full rate after the warm-up, without hold_share
    lr_gamma: float = 0.935  # factor per epoch after these, without hold_share
    hold_share: float = 0.0  # share of all epochs at full lr, then a linear fall; 0: hold_epochs
    ctc_epochs: int = 0  # first epochs that train the CTC head alone; at most a quarter of all
    ctc_weight: float = 0.0  # weight of CTC beside the transducer loss, after ctc_epochs
    char_weight: float = 0.0  # weight of characters' CTC before StackTime, relative to pieces'
    lattice_band: int = 0  # frames around CTC's alignment that the lattice keeps; 0: all
    ramp_begin: float = 0.0  # epochs at the start without dropout and augmentation but speeds
    ramp_epochs: float = 0.0  # epochs in which both then grow to full strength
    beta1: float = 0.9  # decay of LAMB's mean of gradients
    beta2: float = 0.999  # decay of LAMB's mean of squared gradients
    eps: float = 1e-9  # added to the root of that mean
    weight_decay: float = 1e-3  # on every parameter; 0 makes LAMB Adam
    clip_norm: float = 1.0  # largest norm of the whole gradient; inf: no limit
    ema_decay: float = 0.999  # decay per step of the averaged weights, which are evaluated
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the processor multiplies it
    target_wer: float = 0.0  # stop when the dev split reaches it; a fraction, 0: no target
    time_limit_s: float = 0.0  # stop so many seconds after the set-up; 0: no limit
    checkpoint_every_s: float = 900.0  # also at every epoch's end
    eval_epochs: int = 1  # epochs from one evaluation to the next; the last is always evaluated
    resume: bool = False  # continue the run in the run directory
    init: str = ""  # begin with the averaged weights of this checkpoint, best.pt for example
    restart: bool = False  # delete the run in the run directory
    skip_bad: bool = False  # leave bad utterances out of the training set instead of stopping
    seed: int = 1  # seed of weights, order, augmentation and dropout
    loader_workers: int = 2  # worker processes that prepare batches
    eval_batch_size: int = 32  # utterances that are decoded at a time
    log_every: int = 10  # steps between lines on the console; log.jsonl has all
    tensorboard: bool = False  # also write the numbers of log.jsonl for TensorBoard
    profile: bool = False  # measure where the time of five steps goes
    timeout_s: float = 600.0  # longest wait for another rank; half of it for a batch
    submission_division: str = "open"  # division in mllog.log; closed is for MLPerf's own recipe
    submission_org: str = "none"  # organisation that mllog.log names
    ranks: int = 0  # number of ranks that the launcher must have started; 0: any
    backend: str = "gloo"  # backend of torch.distributed: gloo, ccl (oneCCL) or mpi
    ipex: bool = False  # let the Intel Extension for PyTorch optimise model and optimiser

    def __post_init__(self) -> None:
        check_ranges(self, (
            (("preset",), PRESETS.__contains__, f"one of {', '.join(PRESETS)}"),
            (("precision",), lambda x: x in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
            (("backend",), lambda x: x in ("ccl", "gloo", "mpi"), "ccl, gloo or mpi"),
            (("submission_division",), lambda x: x in ("open", "closed"), "open or closed"),
            (("epochs", "batch_size", "accumulation", "eval_batch_size", "eval_epochs",
              "log_every"),
             lambda x: x >= 1, "at least 1"),
            (("lr", "eps", "clip_norm", "timeout_s"), lambda x: x > 0, "more than 0"),
            (("lr_min", "warmup_epochs", "hold_epochs", "weight_decay", "target_wer",
              "time_limit_s", "checkpoint_every_s", "seed", "loader_workers", "ctc_epochs",
              "ctc_weight", "char_weight", "lattice_band", "ramp_begin",
              "ramp_epochs"),
             lambda x: x >= 0, "at least 0"),
            (("beta1", "beta2", "ema_decay"), lambda x: 0 <= x < 1, "0 <= x < 1"),
            (("target_wer",), lambda x: x <= 1, "a fraction, at most 1"),
            (("lr_gamma",), lambda x: 0 < x <= 1, "0 < x <= 1"),
            (("hold_share",), lambda x: 0 <= x < 1, "0 <= x < 1"),
            (("lr_min",), lambda x: x <= self.lr, f"at most lr, {self.lr}"),
        ), may_be_infinite="clip_norm")
        if self.ranks:
            self.rank_batch(self.ranks)
        if self.char_weight and not self.has_ctc:
            raise ValueError(f"char_weight: {self.char_weight}, expected 0 without ctc_epochs and "
                             "ctc_weight, which it is relative to")
        if self.lattice_band and self.ctc_weight == 0:
            raise ValueError(f"lattice_band: {self.lattice_band}, expected 0 without ctc_weight, "
                             "whose CTC head finds the band")
        if self.resume and self.restart:
            raise ValueError("resume and restart exclude each other")

    def rank_batch(self, ranks: int) -> int:
        """Utterances of one rank's forward pass, of `ranks` in all.

        Raises:
            ValueError: the ranks cannot share the batch equally.
        """
        if not self.share_batch:
            return self.batch_size
        if self.batch_size % ranks:
            raise ValueError(f"batch_size: {self.batch_size}, expected a multiple of {ranks}, the "
                             "ranks that share it; RANKS=1 bash run.sh starts one")
        return self.batch_size // ranks

    def global_batch(self, ranks: int) -> int:
        """Utterances of a step."""
        return self.rank_batch(ranks) * self.accumulation * ranks

    def is_scored(self, epoch: int) -> bool:
        """True if the dev split is evaluated after an epoch; 0 stands for the start."""
        return epoch % self.eval_epochs == 0 or epoch >= self.epochs

    def is_target(self, wer: float) -> bool:
        return self.target_wer > 0 and wer <= self.target_wer

    @property
    def has_ctc(self) -> bool:
        return self.ctc_epochs > 0 or self.ctc_weight > 0

    def is_ctc_alone(self, epoch: int) -> bool:
        """True in the epochs, counted from 1, that train the CTC head without the transducer."""
        return 0 < epoch <= min(self.ctc_epochs, self.epochs // 4)

    def is_band_hard(self, epoch: int) -> bool:
        """True in the first epoch of the transducer if the CTC head was trained alone before it.

        The joint network knows no alignment yet, and without this it may find none for epochs.
        """
        return self.is_ctc_alone(epoch - 1) and not self.is_ctc_alone(epoch)

    def strength(self, epoch: int) -> float:
        """Share of their full strength that dropout and augmentation have in an epoch."""
        return min(1.0, max(0.0, (epoch - self.ramp_begin) / max(self.ramp_epochs, 1.0)))


# All recipes but MLPerf's share these fields. Small batches give a small corpus many steps. LAMB
# turns every tensor by the same share of its norm, also where the gradient of a small batch is
# mostly noise; without weight decay it is Adam, which suits batches of 8. The CTC heads find the
# first alignments, and the learning rate falls to almost zero at the end.
CTC_RECIPE = dict(
    batch_size=8, lr=0.002, lr_min=1e-6, warmup_epochs=0.5, hold_share=0.5, beta2=0.98,
    clip_norm=500.0, weight_decay=0.0, ema_decay=0.998, ctc_epochs=3, ctc_weight=0.3,
    char_weight=0.5, lattice_band=4, ramp_begin=5, num_buckets=12,
)
# The fields that a preset changes beside model.PRESETS. Twelve buckets instead of MLPerf's six:
# fewer frames of a batch are padding. `ctc_split` stands here and not in model.PRESETS because
# make_configs sets it to 0 without a CTC loss.
RECIPES = {
    "baseline": dict(ctc_split=1),
    # StackTime leaves fewer frames than labels, so the CTC head needs several positions per frame.
    "democratized": CTC_RECIPE | dict(epochs=26, ctc_split=4, ramp_epochs=8),
    # Without background, noise and recordings without words a model hears words in any noise.
    "mini": CTC_RECIPE | dict(
        epochs=44, eval_epochs=4, ctc_split=1, ramp_epochs=12, splice=1, align=16,
        freq_mask_max=20, time_mask_max=0.05, mel_warp=0.1, round_frames=96, noise_prob=0.2,
        pad_max_s=0.5, empty_prob=0.03, band_prob=0.1,
    ),
    # The demo's own recordings are clean and close: noise, silence and telephones are added. Quiet
    # noise around its short sentences would shift the mean by which they are normalised: ends that
    # are 50 dB below the loudest frame are trimmed.
    "demo": CTC_RECIPE | dict(
        epochs=12, eval_epochs=3, batch_size=16, lr=0.004, ema_decay=0.99, ctc_epochs=2,
        ctc_split=2, lattice_band=0, ramp_begin=2, ramp_epochs=6, noise_prob=0.5, pad_max_s=1.0,
        empty_prob=0.08, gain_db=20.0, band_prob=0.2, trim_db=-50.0,
    ),
}

# The fields of model and front end that a run with --init chooses for itself. All others are those
# of its checkpoint.
FREE_FIELDS = {
    "vocab_size", "ctc_split", "char_head", "enc_dropout", "pred_dropout", "joint_dropout",
    "speed_min", "speed_max", "band_prob", "pad_max_s", "empty_prob", "noise_prob", "snr_min_db",
    "snr_max_db", "gain_db", "mel_warp", "freq_masks", "freq_mask_max", "time_masks",
    "time_mask_max", "max_utterance_s", "num_buckets", "round_frames", "round_labels",
}
# The fields that a run needs before it has read a checkpoint.
EARLY_FIELDS = {"data", "train_splits", "dev_split", "out", "ranks", "backend", "timeout_s",
                "tensorboard", "resume", "restart", "init"}
# These values replace the start of the recipe in a run with --init, whose weights align already.
# With a new tokenizer the layers of the labels begin at random, and the recipe's start stays.
ALIGNED_START = dict(ctc_epochs=0, ramp_begin=0.0, ramp_epochs=0.0)


# ------------------------------------------------------------------------------------------- flags


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """Adds one flag for each field of a config dataclass; absent flags keep the preset's value.

    The help of a flag is the comment behind its field and the default.
    """
    defaults = PRESETS[TrainConfig.preset] if config is ModelConfig else config
    source = inspect.getsource(config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    for field in fields(config):
        if field.name in ("feature_size", "char_head"):  # follow from other flags
            continue
        options: dict = {"default": argparse.SUPPRESS, "required": field.default is MISSING}
        default = RECIPES[TrainConfig.preset].get(field.name, getattr(defaults, field.name, ""))
        default = "" if field.default is MISSING else f"({default})"
        options["help"] = f"{comments.get(field.name, '')} {default}".strip().replace("%", "%%")
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type == tuple[str, ...]:
            options["nargs"] = "+"
        else:
            options["type"] = field.type
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def make_parser(description: str | None = None) -> argparse.ArgumentParser:
    # A usage that lists a hundred flags would hide the message below it.
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=description,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    for config in (TrainConfig, ModelConfig, FeatureConfig):
        add_flags(parser.add_argument_group(config.__name__), config)
    return parser


def parse_flags(argv: Sequence[str], description: str | None = None) -> dict:
    """Command line -> flags and their values; a wrong flag ends the program with status 2."""
    parser = make_parser(description)
    flags, unknown = parser.parse_known_args(argv)
    if unknown:
        is_value = "resume" in flags and not unknown[0].startswith("-")
        hint = "; --resume has no value, and --init begins from a file" if is_value else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return vars(flags)


def fields_of_checkpoint(stored: dict, given: dict) -> dict:
    """The fields of a checkpoint's config that a run with --init keeps: all but FREE_FIELDS.

    Raises:
        ValueError: a flag, one of `given`, has another value.
    """
    kept = {name: value for name, value in stored.items() if name not in FREE_FIELDS}
    for name, value in kept.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name}: {given[name]}, but the checkpoint of --init has {value}, "
                             "which the run keeps: leave the flag out")
    return kept


def make_configs(given: dict, origin: dict | None = None,
                 start: dict = ALIGNED_START) -> tuple[TrainConfig, ModelConfig, FeatureConfig]:
    """Flags -> the three configs; a wrong value ends the program with status 2.

    Args:
        given: the flags of the command line and their values.
        origin: a checkpoint whose architecture the run keeps; its preset is the default.
        start: replaces the recipe's start in a run with an origin.
    """
    if origin is not None:
        before = origin["train_config"]
        given = {"preset": before["preset"], "init": before.get("init", ""), **given}
    preset = given.get("preset", TrainConfig.preset)
    values = {**RECIPES.get(preset, {}), **(start if origin else {}), **given}

    def values_for(config: type) -> dict:
        return {f.name: values[f.name] for f in fields(config) if f.name in values}

    try:
        if origin is not None:
            # A field that is younger than the checkpoint has its default.
            for stored in (FeatureConfig(**origin["feature_config"]),
                           ModelConfig(**origin["model_config"])):
                values |= fields_of_checkpoint(asdict(stored), given)
        train = TrainConfig(**values_for(TrainConfig))
        features = FeatureConfig(**values_for(FeatureConfig))
        model = replace(PRESETS[preset], **values_for(ModelConfig))
        model = replace(model, feature_size=features.feature_size, char_head=train.char_weight > 0)
        if not train.has_ctc:
            model = replace(model, ctc_split=0)  # the head exists only if a loss uses it
        elif not model.ctc_split:
            raise ValueError("ctc_split: 0, expected at least 1 with ctc_epochs or ctc_weight")
    except ValueError as error:
        make_parser().error(str(error))
    return replace(train, train_splits=tuple(train.train_splits)), model, features


def parse_configs(argv: Sequence[str]) -> tuple[TrainConfig, ModelConfig, FeatureConfig]:
    """Command line -> the three configs; a wrong flag or value ends the program with status 2."""
    return make_configs(parse_flags(argv))
