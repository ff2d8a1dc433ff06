# SPDX-License-Identifier: Apache-2.0
"""Train a transducer on the processors of one or many machines.

    python train.py --data data/demo --train-splits train-demo --dev-split dev-demo \\
        --out out/demo --preset demo
    python train.py ... --resume      # continues from the newest checkpoint, if there is one
    python train.py ... --init out/demo/best.pt      # begins from the averaged weights of a run
    torchrun --standalone --nproc-per-node 2 train.py ...   # two ranks; or mpirun

Writes to --out: log.jsonl (one object per line: start, step, epoch, eval, end), mllog.log (the
same for MLPerf's compliance checker), curves.png, checkpoint-<step>.pt (the last two) and best.pt;
trace.json with --profile, TensorBoard's files with --tensorboard.
The fields of the three configurations are flags; presets change their defaults: recipe.py.

Exit status: 0 all epochs done or the target WER reached; 1 an error; 2 a wrong flag. Stopped with
a checkpoint, to be resumed: 75 time limit, 128 + n signal n (130 SIGINT, 138 SIGUSR1, 143 SIGTERM),
141 the reader of standard output has ended. A second Ctrl-C saves nothing.
"""

import gc
import math
import os
import signal
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # The end of this file answers Ctrl-C; until the libraries below are imported, this hook does.
    sys.excepthook = lambda kind, *rest: (
        os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest))

import torch
import torch.distributed as dist

import data
import decode
import report
from checkpoint import (
    clear_run,
    keep_newest,
    list_checkpoints,
    load_checkpoint,
    lock_run,
    newest_checkpoint,
    reserve_space,
    save_checkpoint,
)
from data import Batch, Tokenizer, Utterance
from features import FeatureConfig
from model import ModelConfig
from optimizer import lr_at
from ranks import Ranks, leave, start_ranks
from recipe import ALIGNED_START, EARLY_FIELDS, RECIPES, TrainConfig, make_configs, parse_flags
from report import Log, Monitor
from step import (
    StepResult,
    Trainer,
    begin_epoch,
    epoch_steps,
    evaluate,
    make_trainer,
    matrix_dtype,
    train_step,
)

# ---------------------------------------------------------------------- the run and its checkpoints


class Run(NamedTuple):
    """The parts of a run. Only `trainer` is replaced, when an epoch begins."""

    trainer: Trainer
    features: FeatureConfig
    tokenizer: Tokenizer
    train: list[Utterance]
    dev: list[Utterance]
    facts: dict  # see run_facts
    log: Log
    monitor: Monitor

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train) // self.trainer.global_batch


@dataclass
class State:
    """The position and the results of a run: saved with every checkpoint."""

    epoch: int = 1  # the epoch under way, or the next one
    batch: int = 0  # steps of this epoch that are done
    step: int = 0  # steps of the run that are done
    loss_sum: float = 0.0  # over the steps of this epoch
    num_unaligned: int = 0  # utterances of this epoch without a CTC alignment of their pieces
    left_out: int = 0  # utterances of this epoch that could not be read
    epoch_s: float = 0.0  # seconds spent in the steps of this epoch
    loss: float = math.nan  # mean over this epoch, or the last one if this has no step yet
    utts_per_s: float = math.nan  # likewise
    seconds: float = 0.0  # spent in steps and evaluations, over all restarts
    best_wer: float = math.inf
    best_cer: float = math.inf  # of the evaluation with the best WER
    evaluated: int = 0  # step of the newest evaluation; -1 asks for one before the next epoch

    def count_step(self, result: StepResult, step_s: float, utterances: int) -> None:
        self.step, self.batch = self.step + 1, self.batch + 1
        self.loss_sum, self.epoch_s = self.loss_sum + result.loss, self.epoch_s + step_s
        self.num_unaligned += result.num_unaligned
        self.left_out += result.num_left_out
        self.seconds += step_s
        self.loss = self.loss_sum / self.batch
        self.utts_per_s = self.batch * utterances / self.epoch_s

    def begin_next_epoch(self) -> None:
        self.epoch, self.batch, self.loss_sum, self.epoch_s = self.epoch + 1, 0, 0.0, 0.0
        self.num_unaligned = self.left_out = 0

    def position(self, steps_per_epoch: int) -> dict:
        """The fields that place a record of log.jsonl."""
        return {"step": self.step, "epoch": self.epoch,
                "epochs": self.epoch - 1 + self.batch / steps_per_epoch,
                "hours": self.seconds / 3600}


def run_facts(cfg: TrainConfig, model_cfg: ModelConfig, features: FeatureConfig, ranks: Ranks,
              train: Sequence[Utterance], dev: Sequence[Utterance]) -> dict:
    """The facts about a run that decide how another run may continue it.

    Another model or front end cannot continue; with other sampling facts the utterances of a step
    change, so the run continues at the next epoch; another dev split has to be evaluated.
    """
    return {
        "model_facts": {"preset": cfg.preset, **asdict(model_cfg), **asdict(features)},
        "sampling_facts": {
            "utterances of a step": cfg.global_batch(ranks.world),
            "seed": cfg.seed, "training set": data.describe_corpus(train),
            # Background makes recordings longer, and buckets hold recordings of similar length.
            "ramp_begin": cfg.ramp_begin, "ramp_epochs": cfg.ramp_epochs,
        },
        "dev_facts": data.describe_corpus(dev),
    }


def find_checkpoint(cfg: TrainConfig, log: Log) -> tuple[Path, dict] | None:
    """The newest readable checkpoint of the run directory; None if a new run begins.

    Raises:
        ValueError: the directory has a run, and neither --resume nor --restart is given, or none of
            its checkpoints is readable, or another version wrote them.
    """
    out = Path(cfg.out)
    existing = [*out.glob("best.pt"), *list_checkpoints(out)]
    if not existing or cfg.restart:
        if cfg.resume and not cfg.init:
            log.say(f"{out}: no run to resume, a new one begins; --init CHECKPOINT begins it from "
                    "the weights of another")
        return None
    if not cfg.resume:
        raise ValueError(f"{existing[-1]} exists: give --resume to go on, --restart to delete it, "
                         "or another --out")
    found = newest_checkpoint(out, log.warn)
    if found is None:
        raise ValueError(f"{out}: no readable checkpoint-*.pt to resume; --restart deletes the run,"
                         " --init best.pt with another --out begins one from averaged weights")
    return found


def find_origin(cfg: TrainConfig,
                resumed: tuple[Path, dict] | None) -> tuple[dict | None, dict]:
    """The checkpoint whose architecture a run with --init keeps, None for any other run, and the
    values of ALIGNED_START's fields.

    Such a run needs the file of --init at its beginning only: resumed, it keeps its own values.

    Raises:
        ValueError: the resumed run began otherwise.
    """
    if resumed is None:
        return (load_checkpoint(cfg.init) if cfg.init else None), ALIGNED_START
    path, checkpoint = resumed
    begun = checkpoint["train_config"].get("init", "")
    if cfg.init and Path(cfg.init).resolve() != Path(begun).resolve():
        raise ValueError(f"{path}: its run did not begin with --init {cfg.init}; give another "
                         "--out, or --restart to delete it")
    stored = asdict(TrainConfig("", (), "", "")) | checkpoint["train_config"]
    start = {name: stored[name] for name in ALIGNED_START}
    return (checkpoint if begun else None), start


def check_same_model(path: Path, checkpoint: dict, facts: dict) -> None:
    """Raises ValueError, naming the field, if this run's model facts are not the checkpoint's."""
    # A field that is younger than the checkpoint had its default.
    stored = asdict(ModelConfig()) | asdict(FeatureConfig()) | checkpoint["model_facts"]
    for name, value in facts["model_facts"].items():
        if stored[name] != value:
            raise ValueError(f"{path} has {name} {stored[name]}, this run {value}; --init {path} "
                             "with another --out begins a new run from its weights")


def to_checkpoint(run: Run, state: State) -> dict:
    """The contents of a checkpoint. Random numbers need no state: seed and position give them."""
    trainer = run.trainer
    # decode.py cuts recordings that are longer than any training utterance was.
    longest_s = run.features.speed_max * max(u.duration_s for u in run.train)
    longest_s = min(longest_s, run.features.max_utterance_s)
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "state": asdict(state),
        **run.facts,
        "train_config": asdict(trainer.cfg) | {
            "train_splits": list(trainer.cfg.train_splits),
            "init": trainer.cfg.init and str(Path(trainer.cfg.init).resolve()),
        },
        "model_config": asdict(trainer.model.cfg),
        "feature_config": asdict(run.features) | {"max_utterance_s": longest_s},
        "tokenizer": torch.frombuffer(bytearray(run.tokenizer.model), dtype=torch.uint8),
    }


def from_checkpoint(run: Run, checkpoint: dict) -> State:
    """Restores weights and optimiser in `run.trainer`; returns the state from which to go on."""
    trainer, say = run.trainer, run.log.say
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.ema.load_state_dict(checkpoint["ema"])
    # The flags of this run decide on betas, eps and weight decay, as they do on lr.
    groups = {"param_groups": trainer.optimizer.state_dict()["param_groups"]}
    trainer.optimizer.load_state_dict(checkpoint["optimizer"] | groups)
    state = State(**checkpoint["state"])
    run.log.rewind(state.step, state.evaluated)
    say(f"resumed at step {state.step}, epoch {state.epoch}")
    if checkpoint["dev_facts"] != run.facts["dev_facts"]:
        say("the dev split is another one: its WER has yet to be measured")
        state.best_wer, state.evaluated = math.inf, -1
    now, before = run.facts["sampling_facts"], checkpoint["sampling_facts"]
    if now != before and state.batch > 0:
        state.begin_next_epoch()
    for name in now:
        if now[name] != before.get(name):
            say(f"{name} was {before.get(name, 'unknown')}, now {now[name]}: goes on at epoch "
                f"{state.epoch}")
    return state


def begin_from(run: Run, origin: dict) -> State:
    """Copies the averaged weights of another run; returns the state of a new one.

    The layers that depend on the tokenizer start anew with a new one, and so does a CTC head of
    another size. Weights that can recognise at once are evaluated before the first step.
    """
    trainer, weights = run.trainer, run.trainer.model.state_dict()
    same_classes = decode.stored_tokenizer(origin).model == run.tokenizer.model
    anew = () if same_classes else ("predictor.embed", "joint_network.output")
    for head, field in (("ctc_head", "ctc_split"), ("char_head", "char_head")):
        is_same = getattr(trainer.model.cfg, field) == origin["model_config"].get(field, 0)
        if not (same_classes and is_same):
            anew += (head,)
    kept = {name: origin["ema"][name] for name in weights if not name.startswith(anew)}
    for model in (trainer.model, trainer.ema):
        model.load_state_dict(weights | kept)
    layers = sorted({name.rpartition(".")[0] for name in weights.keys() - kept.keys()})
    run.log.say(f"init: averaged weights of {trainer.cfg.init}, step {origin['state']['step']}; "
                f"layers that start anew: {', '.join(layers) or 'none'}")
    return State(evaluated=-1 if same_classes else 0)


def save(run: Run, state: State, is_best: bool = False) -> None:
    """Rank 0 writes checkpoint-<step>.pt, of which the last two stay, and best.pt."""
    if run.trainer.ranks.rank != 0:
        return
    out, contents = Path(run.trainer.cfg.out), to_checkpoint(run, state)
    # best.pt first: a run that is killed between the two, at the end of an epoch, evaluates again
    # and writes both.
    if is_best:
        save_checkpoint(out / "best.pt", contents)
    path = out / f"checkpoint-{state.step:08d}.pt"
    save_checkpoint(path, contents)
    keep_newest(out)
    run.log.say(f"wrote {path}{' and best.pt' if is_best else ''}")


# -------------------------------------------------------------------------------------- the loop


# Ctrl-C sends SIGINT; batch systems send the others before they kill a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = {"time limit": os.EX_TEMPFAIL, "closed pipe": 128 + signal.SIGPIPE,
               **{s.name: 128 + s for s in STOP_SIGNALS}}


class BadInput(ValueError):
    """A recording could not be read; raised on every rank."""


class Stopper:
    """Decides before every step, together with all ranks, whether the run stops there."""

    def __init__(self, ranks: Ranks, time_limit_s: float, log: Log) -> None:
        self.ranks, self.time_limit_s, self.log = ranks, time_limit_s, log
        self.started, self.steps = time.monotonic(), 0  # of this process, after its set-up
        self.signal, self.signal_time = 0, 0.0  # the last one of STOP_SIGNALS
        self.reason = ""  # why the run stops, empty as long as it goes on

    def on_signal(self, number: int, _frame: object) -> None:
        """Handler of STOP_SIGNALS: the run stops after the step, at a second Ctrl-C at once."""
        now = time.monotonic()
        # A launcher passes on the Ctrl-C that the terminal has sent to all processes: a second one
        # within a second is the same one.
        if number == self.signal == signal.SIGINT and now - self.signal_time > 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT and self.ranks.rank == 0:
            os.write(2, b"stops after this step; Ctrl-C again ends at once\n")
        self.signal, self.signal_time = number, now

    def should_stop(self, is_input_bad: bool = False) -> bool:
        """Sets `reason` to the most urgent reason of any rank; costs one all-reduce."""
        # The reasons stand by rising urgency: all ranks take the largest index of any rank.
        reasons = ("", "time limit", "closed pipe", *(s.name for s in STOP_SIGNALS), "bad input")
        is_late = 0 < self.time_limit_s < time.monotonic() - self.started
        mine = ""
        if is_input_bad:
            mine = "bad input"
        elif self.signal:
            mine = signal.Signals(self.signal).name
        elif not self.log.has_reader:
            mine = "closed pipe"
        # At least one step runs, or a run with a short limit would never advance over restarts.
        elif is_late and self.steps > 0:
            mine = "time limit"
        code = torch.tensor(reasons.index(mine))
        if self.ranks.world > 1:
            dist.all_reduce(code, dist.ReduceOp.MAX)
        self.reason = reasons[int(code)]
        return bool(self.reason)

    def until_stop(self, steps: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
        """Yields steps up to the epoch's end or the first one before which the run stops.

        Raises:
            BadInput: this rank or another one could not read a recording of the next step.
        """
        steps = iter(steps)
        while True:
            batches, problem = None, ""
            try:
                batches = next(steps, None)
            except (OSError, ValueError) as error:
                problem = data.error_message(error)
            if batches is None and not problem:
                return
            if self.should_stop(is_input_bad=bool(problem)):
                if self.reason == "bad input":
                    raise BadInput(problem or "another rank could not read a recording")
                return
            yield batches
            self.steps += 1


def run_epochs(run: Run, state: State, stopper: Stopper) -> str:
    """Trains until all epochs are done, the target WER is reached or `stopper` stops the run.

    Returns:
        The reason of the end.
    """
    cfg, log, per_epoch = run.trainer.cfg, run.log, run.steps_per_epoch
    if state.batch == 0:
        # The weights may have no score yet: those of --init, of another dev split, or of a run that
        # was killed before its evaluation.
        evaluate_and_save(run, state)
    for epoch in range(state.epoch, cfg.epochs + 1):
        if cfg.is_target(state.best_wer) or stopper.should_stop():
            break
        log.mllog("block_start", first_epoch_num=epoch, epoch_count=1)
        log.mllog("epoch_start", epoch_num=epoch)
        run = run._replace(trainer=begin_epoch(run.trainer, epoch))
        if cfg.is_ctc_alone(epoch) != cfg.is_ctc_alone(epoch - 1):
            run.monitor.begin_loss()
        started = saved_at = time.monotonic()
        for batches in stopper.until_stop(shown_steps(run, state)):
            data_s = time.monotonic() - started
            # The schedule counts by epochs: `state.step` would mix steps of different sizes if the
            # number of ranks or the batch size changed at a restart.
            lr = lr_at(
                (epoch - 1) * per_epoch + state.batch + 1, epoch, lr=cfg.lr,
                warmup_epochs=cfg.warmup_epochs, hold_epochs=cfg.hold_epochs,
                steps_per_epoch=per_epoch, gamma=cfg.lr_gamma, lr_min=cfg.lr_min,
                epochs=cfg.epochs, hold_share=cfg.hold_share,
            )
            result = train_step(run.trainer, batches, state.step + 1, lr)
            step_s = time.monotonic() - started
            state.count_step(result, step_s, run.trainer.global_batch)
            run.monitor.step(
                state.batch, **state.position(per_epoch), **loss_fields(run, result), lr=lr,
                grad_norm=result.grad_norm, utts_per_s=run.trainer.global_batch / step_s,
                step_s=step_s, data_s=data_s,
            )
            is_due = time.monotonic() - saved_at >= cfg.checkpoint_every_s
            if is_due and state.batch < per_epoch:
                save(run, state)
                saved_at = time.monotonic()
            started = time.monotonic()
        log.mllog("epoch_stop", epoch_num=epoch)
        if not stopper.reason:
            end_epoch(run, state, stopper)
        save(run, state)
        if stopper.reason in ("", "time limit"):
            evaluate_and_save(run, state)
            log.mllog("block_stop", first_epoch_num=epoch)
        if stopper.reason:
            break
    return stopper.reason or ("target wer" if cfg.is_target(state.best_wer) else "epochs")


def end_epoch(run: Run, state: State, stopper: Stopper) -> None:
    """Writes the record of an epoch whose steps are all done, and goes on to the next one."""
    run.monitor.epoch(state.best_wer, state.left_out, epoch=state.epoch, step=state.step,
                      loss=state.loss, utts_per_s=state.utts_per_s, seconds=state.epoch_s,
                      num_unaligned=state.num_unaligned)
    if state.epoch < run.trainer.cfg.epochs:
        stopper.should_stop()  # a signal in the last step may leave no time for an evaluation
    state.begin_next_epoch()


def loss_fields(run: Run, result: StepResult) -> dict:
    """The losses of a step for log.jsonl, with those of the CTC heads and the band's share of the
    nodes if the run has them."""
    record = {"loss": result.loss}
    if run.trainer.model.cfg.ctc_split:
        record |= {"transducer_loss": result.transducer_loss, "ctc_loss": result.ctc_loss}
    if run.trainer.model.cfg.char_head:
        record |= {"char_loss": result.char_loss}
    if run.trainer.cfg.lattice_band and not run.trainer.cfg.is_ctc_alone(run.trainer.epoch):
        record |= {"share_of_nodes": result.share_of_nodes}
    return record


def shown_steps(run: Run, state: State) -> Iterable[list[Batch]]:
    """The steps that are left in the epoch, with a progress bar, and profiled with --profile."""
    cfg, ranks = run.trainer.cfg, run.trainer.ranks
    steps = epoch_steps(run.train, run.tokenizer, run.features, cfg, ranks, state.epoch,
                        first_step=state.batch)
    left = run.steps_per_epoch - state.batch
    # The first epoch of every loss that has enough steps left is profiled.
    is_first = run.monitor.steps < report.PROFILE_STEPS <= left
    if cfg.profile and ranks.rank == 0 and is_first:
        steps = report.profile_steps(steps, left, run.log)
    return report.progress_bar(steps, ranks.rank, desc=f"epoch {state.epoch}", unit="step",
                               total=run.steps_per_epoch, initial=state.batch)


def evaluate_and_save(run: Run, state: State, is_last: bool = False) -> None:
    """Scores the dev split unless that is done or not due, writes all results, draws the curves.

    It is due after every `eval_epochs`, within an epoch, and when the run ends, `is_last`.
    """
    is_due = (is_last or state.batch > 0 or state.evaluated < 0
              or run.trainer.cfg.is_scored(state.epoch - 1))
    if state.evaluated == state.step or not is_due:
        return
    if state.step == 0:
        save(run, state)  # best.pt alone could not be resumed
    log, cfg = run.log, run.trainer.cfg
    epoch = state.epoch if state.batch else state.epoch - 1
    log.mllog("eval_start", epoch_num=epoch)
    ctc_alone = cfg.is_ctc_alone(epoch)
    result = evaluate(run.trainer, run.tokenizer, run.dev, run.features, ctc_alone)
    log.mllog("eval_accuracy", result["wer"], epoch_num=epoch)
    log.mllog("eval_stop", epoch_num=epoch)
    state.seconds += result["seconds"]
    # The CTC head's WER says nothing about the transducer, which best.pt is for.
    is_best = result["wer"] < state.best_wer and not ctc_alone
    if is_best:
        state.best_wer, state.best_cer = result["wer"], result["cer"]
    state.evaluated = state.step
    position = state.position(run.steps_per_epoch) | {"epoch": epoch}
    run.monitor.evaluation(epoch > cfg.warmup_epochs, **position, loss=state.loss,
                           utts_per_s=state.utts_per_s, search="ctc" if ctc_alone else "transducer",
                           **result)
    save(run, state, is_best)
    log.draw()


def run_and_log_end(run: Run, state: State, stopper: Stopper) -> str:
    """Runs `run_epochs`. An error is written to log.jsonl, and a checkpoint, too, if a recording
    could not be read."""
    try:
        reason = run_epochs(run, state, stopper)
        if reason == "time limit":  # it may have come between two epochs
            evaluate_and_save(run, state, is_last=True)
    except (OSError, ValueError, FloatingPointError) as error:
        if isinstance(error, BadInput):
            save(run, state)
        with suppress(OSError):  # a full disk may be the error itself
            run.log.write("end", reason=f"error: {data.error_message(error)}", step=state.step)
        raise
    run.log.write("end", reason=reason, best_wer=state.best_wer, best_cer=state.best_cer,
                  step=state.step)
    return reason


# ------------------------------------------------------------------------------------------- main


def can_spell(tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    try:
        return all(map(tokenizer.encode, texts))
    except ValueError:
        return False


def make_tokenizer(origin: dict | None, train: Sequence[Utterance], vocab_size: int,
                   log: Log) -> Tokenizer:
    """The tokenizer of `origin` if it can spell the training texts, or a new one for them."""
    if origin is not None:
        tokenizer = decode.stored_tokenizer(origin)
        try:
            for utterance in train:
                tokenizer.encode(utterance.text)
            return tokenizer
        except ValueError as error:
            log.say(f"init: a new tokenizer, because the checkpoint's cannot spell {error}")
            if can_spell(tokenizer, (u.text.upper() for u in train)):
                log.warn("it could spell the texts in capitals, with which the labels would not "
                         "have to be learnt again")
    tokenizer = Tokenizer(data.train_tokenizer((u.text for u in train), vocab_size))
    if tokenizer.vocab_size != vocab_size:
        log.say(f"vocabulary: {tokenizer.vocab_size} classes; the texts do not give {vocab_size}")
    return tokenizer


def check_sizes(run: Run) -> None:
    """Raises ValueError if an epoch has no step, or too few of them to be profiled."""
    per_epoch, global_batch = run.steps_per_epoch, run.trainer.global_batch
    if per_epoch == 0:
        raise ValueError(f"{len(run.train)} training utterances, fewer than a batch of "
                         f"{global_batch}; give a smaller --batch-size")
    if run.trainer.cfg.profile and per_epoch < report.PROFILE_STEPS:
        raise ValueError(f"--profile: {per_epoch} steps in an epoch, expected at least "
                         f"{report.PROFILE_STEPS}")


def log_settings(run: Run, state: State) -> None:
    """Writes the settings of the run to all logs."""
    trainer, log, per_epoch = run.trainer, run.log, run.steps_per_epoch
    cfg, model_cfg, global_batch = trainer.cfg, trainer.model.cfg, trainer.global_batch
    # A last batch that is not full does not count as samples in MLPerf's published logs either.
    report.mllog_settings(log, cfg, model_cfg, run.features, global_batch_size=global_batch,
                          train_samples=per_epoch * global_batch, eval_samples=len(run.dev),
                          eval_max_prediction_symbols=decode.MAX_SYMBOLS)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = report.describe_start(trainer.ranks.world, trainer.dtype, parameters, train_config=cfg,
                                  model_config=model_cfg, feature_config=run.features)
    log.write("start", step=state.step, **start)
    log.say(f"model: {parameters:,} parameters, {model_cfg.vocab_size} classes; "
            f"{trainer.ranks.world} ranks x {start['threads']} threads, {start['precision']}; "
            f"{per_epoch} steps of {global_batch} utterances an epoch; "
            f"torch {torch.__version__}, commit {start['commit']}")
    usual = min(64, RECIPES[cfg.preset].get("batch_size", 64))
    if global_batch < usual:
        log.warn(f"a global batch of {global_batch} is under {usual}: gradients are noisy; raise "
                 "--batch-size or --accumulation if the WER stays at 100 %")


def log_end(run: Run, state: State, reason: str, started_s: float) -> None:
    """Writes the result to mllog.log and the console."""
    cfg, log = run.trainer.cfg, run.log
    is_reached = cfg.is_target(state.best_wer) or (reason == "epochs" and not cfg.target_wer)
    log.mllog("run_stop", status="success" if is_reached else "aborted")
    best = f"{100 * state.best_wer:.2f} %, cer {100 * state.best_cer:.2f} %"
    best = best if math.isfinite(state.best_wer) else "not measured"
    log.say(f"end: {reason}, best dev wer {best}")
    # MLPerf's reference scripts end in this line: benchmark, seconds, start.
    log.say(f"RESULT,RNN_SPEECH_RECOGNITION,{time.time() - started_s:.0f},"
            + time.strftime("%Y-%m-%d %I:%M:%S %p", time.localtime(started_s)))


def main() -> int:
    """Trains as the command line says; returns the exit status."""
    started_s = time.time()

    # 1 config; a checkpoint decides what the other flags mean, so they are checked when it is read
    given = parse_flags(sys.argv[1:], __doc__)
    may_continue = given.get("resume") or given.get("init")
    cfg, model_cfg, features = make_configs(
        {name: value for name, value in given.items() if name in EARLY_FIELDS or not may_continue}
    )
    out = Path(cfg.out)

    # 2 ranks
    ranks, heartbeat = start_ranks(cfg.ranks, cfg.backend, cfg.timeout_s)
    log = Log(out, ranks.rank, cfg.tensorboard)
    torch.set_flush_denormal(True)  # small LSTM gates produce denormals, which multiply slowly

    # 3 data
    lock = lock_run(out) if ranks.rank == 0 and out.is_dir() else None  # before another run writes
    resumed = find_checkpoint(cfg, log)
    path, checkpoint = resumed or (None, None)
    origin, start = find_origin(cfg, resumed)
    cfg, model_cfg, features = make_configs(given, origin, start)
    reading_s = time.time()
    train, dev = data.load_corpus(cfg.data, cfg.train_splits, cfg.dev_split, features,
                                  cfg.skip_bad, log.say)
    if checkpoint is not None:
        tokenizer = decode.stored_tokenizer(checkpoint)
    else:
        tokenizer = make_tokenizer(None if "vocab_size" in given else origin, train,
                                   model_cfg.vocab_size, log)
        if origin is not None and tokenizer.model != decode.stored_tokenizer(origin).model:
            cfg, model_cfg, _ = make_configs(given, origin, start={})
    facts = run_facts(cfg, model_cfg, features, ranks, train, dev)
    if checkpoint is not None:
        check_same_model(path, checkpoint, facts)
    model_cfg = replace(model_cfg, vocab_size=tokenizer.vocab_size)
    data.check_texts(train, dev, tokenizer, features.frame_s * model_cfg.reduction, log.say)
    heartbeat.compare("run", {
        "corpus": data.describe_corpus(train + dev),
        **asdict(cfg), **asdict(model_cfg), **asdict(features),
        "step of the checkpoint": (checkpoint or origin or {"state": {"step": 0}})["state"]["step"],
        "dtype": matrix_dtype(cfg.precision),
        "tokenizer": zlib.crc32(tokenizer.model),
    })

    # 4 model, 5 optimiser
    trainer = make_trainer(cfg, model_cfg, ranks)
    monitor = Monitor(log, len(train) // trainer.global_batch, cfg.epochs, cfg.log_every)
    run = Run(trainer, features, tokenizer, train, dev, facts, log, monitor)
    check_sizes(run)

    # 6 resume or begin
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock or lock_run(out)  # it is held as long as this variable lives
        # A checkpoint holds the weights, their average and the two moments of the optimiser.
        reserve_space(out, 4 * sum(x.nbytes for x in trainer.model.state_dict().values()))
        clear_run(out, resumed=path)  # not before: a run that cannot begin deletes nothing
    if checkpoint is None:
        state = State() if origin is None else begin_from(run, origin)
        report.mllog_start(log, cfg.submission_division, cfg.submission_org, ranks.world,
                           started_s, reading_s)
    else:
        state = from_checkpoint(run, checkpoint)
    del checkpoint, origin, resumed  # the weights that were read need much memory
    log_settings(run, state)

    # 7 loop
    stopper = Stopper(ranks, cfg.time_limit_s, log)
    for number in STOP_SIGNALS:
        signal.signal(number, stopper.on_signal)
    gc.freeze()  # garbage collections skip the many objects that torch has created by now
    with heartbeat.watching():
        reason = run_and_log_end(run, state, stopper)

    # 8 finish
    log_end(run, state, reason, started_s)
    return EXIT_STATUS.get(reason, 0)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # file names and texts may not fit its encoding
        stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = data.warning_line
    try:
        status = main()
    except BrokenPipeError:  # standard error has no reader either, as in `2>&1 | head`
        leave(EXIT_STATUS["closed pipe"], wait_s=0)
    except (OSError, ValueError, FloatingPointError) as error:
        leave(1, f"train.py: {data.error_message(error)}")
    except KeyboardInterrupt:
        leave(EXIT_STATUS["SIGINT"], wait_s=0)
    except SystemExit as end:  # argparse has printed its message
        leave(end.code)
    except Exception:  # noqa: BLE001 - a bug: the other ranks must not wait for this one
        leave(1, traceback.format_exc())
    leave(status, wait_s=None)  # rank 0 may still be writing its last checkpoint
