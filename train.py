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
a checkpoint, to be resumed: 75 time limit, 128 + n signal n (130 SIGINT, 138 SIGUSR1, 143 SIGTERM).
"""

import copy
import gc
import importlib
import math
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    save_checkpoint,
    try_space,
)
from data import Batch, Tokenizer, Utterance
from features import FeatureConfig
from loss import ctc_band, ctc_loss, joint_transducer_loss
from model import ModelConfig, Transducer
from optimizer import Lamb, clip_gradients, lr_at, update_ema
from ranks import Ranks, all_sum, leave, start_ranks
from recipe import RECIPES, TrainConfig, make_configs, make_parser
from report import Log, Monitor

# ------------------------------------------------------------------------------------- one step

WHEN_DIVERGED = "if the recordings are sound, the run diverged: give a lower --lr"


def processor_multiplies_bf16() -> bool:
    """True if the processor's flags name AMX (Intel), AVX-512 BF16 (AMD) or BF16 (Arm).

    Intel's AVX-512 BF16 instructions without AMX multiply at half of float32's rate.
    """
    words = set(report.processor_info().split())
    return bool(words & {"amx_bf16", "bf16"}) or {"AuthenticAMD", "avx512_bf16"} <= words


def matrix_dtype(precision: str) -> torch.dtype:
    bf16 = precision == "bf16" or (precision == "auto" and processor_multiplies_bf16())
    return torch.bfloat16 if bf16 else torch.float32


class Trainer(NamedTuple):
    """Everything that a step reads or changes."""

    cfg: TrainConfig
    ranks: Ranks
    model: Transducer
    parallel: nn.Module  # the model, wrapped by DistributedDataParallel if there are many ranks
    ema: Transducer  # the averaged weights
    optimizer: Lamb
    dtype: torch.dtype  # of the matrix products

    @property
    def global_batch(self) -> int:
        """Utterances of a step."""
        return self.cfg.global_batch(self.ranks.world)


def make_trainer(cfg: TrainConfig, model_cfg: ModelConfig, ranks: Ranks) -> Trainer:
    torch.manual_seed(cfg.seed)  # every rank starts from the same weights
    model = Transducer(model_cfg)
    ema = copy.deepcopy(model).eval()
    optimizer = Lamb(model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    if cfg.ipex:
        optimize_with_ipex(model, optimizer)
    trainer = Trainer(cfg, ranks, model, model, ema, optimizer, matrix_dtype(cfg.precision))
    return begin_epoch(trainer, 1)


def begin_epoch(trainer: Trainer, epoch: int) -> Trainer:
    """The trainer with the dropout of an epoch, counted from 1, and the parameters it trains.

    Parameters that the CTC head does not need have no gradient while it is trained alone, and
    DistributedDataParallel waits for the gradient of every parameter that had one when it was made.
    """
    cfg, model = trainer.cfg, trainer.model
    model.scale_dropout(cfg.strength(epoch))
    is_alone = cfg.is_ctc_alone(epoch)
    changed = trainer.parallel is model
    for name, parameter in model.named_parameters():
        is_trained = not is_alone or name.startswith(("encoder.", "ctc_head.", "char_head."))
        changed |= is_trained != parameter.requires_grad
        parameter.requires_grad_(is_trained)
    if trainer.ranks.world == 1 or not changed:
        return trainer
    return trainer._replace(
        parallel=DistributedDataParallel(model, gradient_as_bucket_view=True)
    )


def optimize_with_ipex(model: Transducer, optimizer: Lamb) -> None:
    """Replaces the model's LSTMs by IPEX's, in place; importing IPEX also replaces torch operators.

    The parameters stay in float32 and in their own shapes: the loss multiplies with the weight of
    the output layer itself, and checkpoints have to load without IPEX.
    """
    try:
        ipex = importlib.import_module("intel_extension_for_pytorch")
    except ImportError as error:
        raise ValueError(f"ipex: needs intel_extension_for_pytorch: {error}") from error
    ipex.optimize(model, optimizer=optimizer, inplace=True, weights_prepack=False)


class Losses(NamedTuple):
    """Negative log-likelihoods of the utterances of a micro-batch, in nats, (B,) each."""

    loss: Tensor  # the weighted sum of all, which training minimises
    transducer: Tensor  # 0 while the CTC heads are trained alone
    ctc: Tensor  # of pieces; 0 without a CTC head and where no alignment exists
    char: Tensor  # of characters; likewise
    has_no_alignment: Tensor  # of pieces
    share_of_nodes: Tensor  # of the lattice that were computed


def batch_losses(trainer: Trainer, batch: Batch, ctc_alone: bool) -> Losses:
    model, cfg = trainer.model, trainer.cfg
    zero = torch.zeros(len(batch.ids))
    loss, transducer, ctc, char, has_alignment, share = *[zero] * 4, zero == 0, zero + 1
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
        outputs = trainer.parallel(batch.feats, batch.feat_lens, batch.targets, ctc_alone)
        if outputs.ctc_logits is not None:
            positions = model.cfg.ctc_split * outputs.enc_lens
            ctc, has_alignment = ctc_loss(outputs.ctc_logits, batch.targets, positions,
                                          batch.target_lens, model.cfg.blank)
            loss = ctc
            if outputs.char_logits is not None:
                char, _ = ctc_loss(outputs.char_logits, batch.chars, outputs.char_lens,
                                   batch.char_lens, model.cfg.blank)
                loss = ctc + cfg.char_weight * char
            if not ctc_alone:
                loss = cfg.ctc_weight * loss
        if not ctc_alone:
            band = None
            if cfg.lattice_band:
                band = ctc_band(outputs.ctc_logits, batch.targets, outputs.enc_lens,
                                batch.target_lens, model.cfg.blank, model.cfg.ctc_split,
                                cfg.lattice_band)
            output = model.joint_network.output
            transducer = joint_transducer_loss(
                outputs.encoded, outputs.predicted, output.weight, output.bias, batch.targets,
                outputs.enc_lens, batch.target_lens, model.cfg.blank,
                model.joint_network.dropout.p, reduction="none", band=band,
            )
            if band is not None:
                share = band.sum((1, 2)) / (outputs.enc_lens * (batch.target_lens + 1))
            loss = transducer if outputs.ctc_logits is None else loss + transducer
    return Losses(loss, transducer, ctc, char, ~has_alignment, share)


def sum_losses(losses: Losses, batch: Batch, step: int, ranks: Ranks) -> Tensor:
    """Sums of all `losses` over a micro-batch and all ranks, then the number of utterances: (7,).

    Raises:
        FloatingPointError: a loss on any rank is not finite; every rank raises it.
    """
    is_finite = losses.loss.isfinite().tolist()
    bad = [i for i, ok in zip(batch.ids, is_finite, strict=True) if not ok]
    sums = [x.detach().double().sum() for x in losses]
    sums = torch.tensor([len(bad), *sums, len(batch.ids)], dtype=torch.float64)
    total_bad, *_ = sums = all_sum(sums, ranks)
    if total_bad > 0:
        where = f"of {', '.join(bad)}" if bad else "on another rank"
        raise FloatingPointError(f"step {step}: rank {ranks.rank}: loss {where} is not finite; "
                                 f"{WHEN_DIVERGED}")
    return sums[1:]


class StepResult(NamedTuple):
    """Means over the utterances of a step, in nats."""

    loss: float  # what training minimises
    grad_norm: float
    transducer_loss: float
    ctc_loss: float
    char_loss: float
    num_unaligned: int  # utterances with more labels than the CTC head has positions
    share_of_nodes: float  # of the lattices that were computed
    num_left_out: int  # utterances that could not be read


def train_step(trainer: Trainer, batches: Sequence[Batch], step: int, lr: float,
               ctc_alone: bool = False) -> StepResult:
    """One optimiser step over all micro-batches.

    Every utterance of the global batch has the same weight. Accumulation and ranks change only the
    order of summation and the dropout masks, which depend on (seed, step, rank): a resumed run
    draws the same ones as an uninterrupted run.
    """
    cfg, ranks = trainer.cfg, trainer.ranks
    state = np.random.SeedSequence((cfg.seed, step, ranks.rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
    trainer.parallel.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    num_requested = sum(b.num_requested for b in batches)  # the same on every rank
    norm = trainer.model.encoder.feature_norm
    if norm is not None:  # BatchNorm takes the statistics of all micro-batches of all ranks
        moments = sum(norm.moments(b.feats, b.feat_lens) for b in batches)
        norm.begin_step(all_sum(moments, ranks))
    sums = torch.zeros(7, dtype=torch.float64)
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        # Gradients are summed over the ranks during the last backward pass only.
        with nullcontext() if is_last or ranks.world == 1 else trainer.parallel.no_sync():
            losses = batch_losses(trainer, batch, ctc_alone)
            sums += sum_losses(losses, batch, step, ranks)
            (losses.loss.sum() / num_requested).backward()
    if norm is not None:
        norm.end_step()
    grad_norm = clip_gradients(trainer.model.parameters(), cfg.clip_norm)
    if not math.isfinite(grad_norm):  # every rank has the same norm
        raise FloatingPointError(f"step {step}: gradient norm is {grad_norm}; {WHEN_DIVERGED}")
    trainer.optimizer.param_groups[0]["lr"] = lr
    trainer.optimizer.step()
    # The average of the first steps would lag: its decay warms up.
    update_ema(trainer.ema, trainer.model, min(cfg.ema_decay, (1 + step) / (10 + step)))
    loss, transducer, ctc, char, num_unaligned, share, count = sums.tolist()
    return StepResult(loss / count, grad_norm, transducer / count, ctc / count, char / count,
                      int(num_unaligned), share / count, num_requested * ranks.world - int(count))


def evaluate(trainer: Trainer, tokenizer: Tokenizer, utterances: Sequence[Utterance],
             features: FeatureConfig, ctc_alone: bool = False) -> dict:
    """WER and CER of the averaged weights; every rank decodes its share of the batches, in float32.

    With `ctc_alone` the search is that of the CTC head.
    """
    started = time.perf_counter()
    cfg, ranks = trainer.cfg, trainer.ranks
    mine = decode.evaluation_batches(utterances, cfg.eval_batch_size)[ranks.rank :: ranks.world]
    dataset = data.SpeechDataset(utterances, None, features)
    # A batch may take half of timeout_s, because the other ranks wait timeout_s for this one.
    loader = data.batch_loader(dataset, mine, cfg.loader_workers, cfg.timeout_s / 2)
    bar = report.progress_bar(loader, ranks.rank, desc="dev", unit="batch", total=len(mine))
    counts = Counter()
    search = decode.ctc_greedy_decode if ctc_alone else decode.greedy_decode
    texts = decode.decode_batches(trainer.ema, tokenizer, bar, counts, search)
    decoded = [u for u in utterances if u.id in texts]
    pairs = [texts[u.id] for u in decoded], [u.text for u in decoded]
    sums = torch.tensor([*decode.word_errors(*pairs), *decode.char_errors(*pairs),
                         counts["frames"], counts["labels"]])
    errors, words, char_errors, chars, frames, labels = all_sum(sums, ranks).tolist()
    seconds = time.perf_counter() - started
    return {
        "wer": decode.word_error_rate(errors, words), "errors": errors, "words": words,
        "cer": decode.word_error_rate(char_errors, chars),
        "rtf": seconds / sum(u.duration_s for u in utterances), "seconds": seconds,
        "frames": frames, "labels": labels,
    }


def epoch_steps(utterances: Sequence[Utterance], tokenizer: Tokenizer, features: FeatureConfig,
                cfg: TrainConfig, ranks: Ranks, epoch: int,
                first_step: int = 0) -> Iterator[list[Batch]]:
    """This rank's micro-batches for every step of an epoch, from its step `first_step` on.

    The order of the utterances depends on (seed, epoch) alone, their augmentation on (seed, epoch,
    utterance). A step's utterances depend on the global batch, not on how ranks and micro-batches
    share it.
    """
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch, cfg.skip_bad,
                                 cfg.strength(epoch))
    global_batch = cfg.global_batch(ranks.world)
    rng = np.random.default_rng((cfg.seed, epoch))
    order = data.bucket_batches(dataset.durations_s(), global_batch, features.num_buckets, rng)
    # (steps, global_batch) indices -> (micro-batches, batch_size) of this rank.
    mine = order[first_step:, ranks.rank :: ranks.world].reshape(-1, cfg.batch_size)
    batches = data.batch_loader(dataset, mine.tolist(), cfg.loader_workers, cfg.timeout_s / 2)
    while step := list(islice(batches, cfg.accumulation)):
        yield step


# ---------------------------------------------------------------------- the run and its checkpoints


class Run(NamedTuple):
    """The parts of a run. Only `trainer` is replaced, when an epoch trains other parameters."""

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
    num_unaligned: int = 0  # utterances of this epoch without a CTC alignment
    left_out: int = 0  # utterances of this epoch that could not be read
    epoch_s: float = 0.0  # seconds spent in the steps of this epoch
    loss: float = math.nan  # mean over this epoch, or the last one if this has no step yet
    utts_per_s: float = math.nan  # likewise
    seconds: float = 0.0  # spent in steps and evaluations, over all restarts
    best_wer: float = math.inf
    best_cer: float = math.inf  # of the evaluation with the best WER
    evaluated: int = 0  # step of the newest evaluation

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
            "ranks x batch x accumulation": f"{ranks.world} x {cfg.batch_size} x "
                                            f"{cfg.accumulation}",
            "seed": cfg.seed, "training set": data.describe_corpus(train),
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


def find_origin(cfg: TrainConfig, resumed: tuple[Path, dict] | None) -> dict | None:
    """The checkpoint whose architecture a run with --init keeps; None for any other run.

    Such a run needs the file of --init at its beginning only: resumed, it keeps its own.

    Raises:
        ValueError: the resumed run began otherwise.
    """
    if resumed is None:
        return load_checkpoint(cfg.init) if cfg.init else None
    path, checkpoint = resumed
    begun = checkpoint["train_config"].get("init", "")
    if cfg.init and Path(cfg.init).resolve() != Path(begun).resolve():
        raise ValueError(f"{path}: its run did not begin with --init {cfg.init}; give another "
                         "--out, or --restart to delete it")
    return checkpoint if begun else None


def check_same_model(path: Path, checkpoint: dict, facts: dict) -> None:
    """Raises ValueError, naming the field, if this run's model facts are not the checkpoint's."""
    for name, value in facts["model_facts"].items():
        stored = checkpoint["model_facts"].get(name)
        if stored != value:
            raise ValueError(f"{path} has {name} {stored}, this run {value}")


def to_checkpoint(run: Run, state: State) -> dict:
    """The contents of a checkpoint. Random numbers need no state: seed and position give them."""
    trainer = run.trainer
    return {
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "state": asdict(state),
        **run.facts,
        "train_config": asdict(trainer.cfg) | {"train_splits": list(trainer.cfg.train_splits)},
        "model_config": asdict(trainer.model.cfg),
        "feature_config": asdict(run.features),
        "tokenizer": torch.frombuffer(bytearray(run.tokenizer.model), dtype=torch.uint8),
    }


def from_checkpoint(run: Run, checkpoint: dict) -> State:
    """Restores weights and optimiser in `run.trainer`; returns the state from which to go on."""
    trainer, say = run.trainer, run.log.say
    trainer.model.load_state_dict(checkpoint["model"])
    trainer.ema.load_state_dict(checkpoint["ema"])
    (group,) = trainer.optimizer.param_groups
    requested = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    trainer.optimizer.load_state_dict(checkpoint["optimizer"])
    trainer.optimizer.param_groups[0].update(requested)  # this run's flags decide, as for lr
    state = State(**checkpoint["state"])
    run.log.rewind(state.step, state.evaluated)
    say(f"resumed at step {state.step}, epoch {state.epoch}")
    if checkpoint["dev_facts"] != run.facts["dev_facts"]:
        say("the dev split is another one: its WER has yet to be measured")
        state.best_wer, state.evaluated = math.inf, 0
    now, before = run.facts["sampling_facts"], checkpoint["sampling_facts"]
    if now != before and state.batch > 0:
        state.begin_next_epoch()
    for name in now:
        if now[name] != before[name]:
            say(f"{name} was {before[name]}, now {now[name]}: goes on at epoch {state.epoch}")
    return state


def begin_from(run: Run, origin: dict) -> State:
    """Copies the averaged weights of another run; returns the state of a new one.

    The layers that depend on the tokenizer start anew with a new one, and so does a CTC head of
    another size. Weights that can recognise at once are evaluated before the first step.
    """
    trainer, weights = run.trainer, run.trainer.model.state_dict()
    same_classes = stored_tokenizer(origin).model == run.tokenizer.model
    anew = () if same_classes else ("predictor.embed", "joint_network.output")
    for head, field in (("ctc_head", "ctc_split"), ("char_head", "char_head")):
        is_same = getattr(trainer.model.cfg, field) == origin["model_config"].get(field, 0)
        anew += () if same_classes and is_same else (head,)
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
    # best.pt first: a run that is killed between the two evaluates again and writes both.
    if is_best:
        save_checkpoint(out / "best.pt", contents)
    path = out / f"checkpoint-{state.step:08d}.pt"
    save_checkpoint(path, contents)
    keep_newest(out)
    run.log.say(f"wrote {path}{' and best.pt' if is_best else ''}")


# -------------------------------------------------------------------------------------- the loop


# Ctrl-C and the signals that batch systems send before they kill.
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = {"time limit": os.EX_TEMPFAIL, **{s.name: 128 + s for s in STOP_SIGNALS}}


class BadInput(ValueError):
    """A recording could not be read; raised on every rank."""


class Stopper:
    """Decides before every step, together with all ranks, whether the run stops there."""

    def __init__(self, ranks: Ranks, time_limit_s: float) -> None:
        self.ranks, self.time_limit_s = ranks, time_limit_s
        self.started, self.steps = time.monotonic(), 0  # of this process
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
        reasons = ("", "time limit", *(s.name for s in STOP_SIGNALS), "bad input")
        is_late = 0 < self.time_limit_s < time.monotonic() - self.started
        mine = ""
        if is_input_bad:
            mine = "bad input"
        elif self.signal:
            mine = signal.Signals(self.signal).name
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
                problem = data.reason(error)
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
        evaluate_and_save(run, state)  # the last run ended between an epoch and its evaluation
    for epoch in range(state.epoch, cfg.epochs + 1):
        if cfg.is_target(state.best_wer) or stopper.should_stop():
            break
        log.mllog("block_start", first_epoch_num=epoch, epoch_count=1)
        log.mllog("epoch_start", epoch_num=epoch)
        ctc_alone = cfg.is_ctc_alone(epoch)
        run = run._replace(trainer=begin_epoch(run.trainer, epoch))
        if ctc_alone != cfg.is_ctc_alone(epoch - 1):
            run.monitor.epoch_loss = math.inf  # another loss: no comparison with the last epoch
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
            result = train_step(run.trainer, batches, state.step + 1, lr, ctc_alone)
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
            run.monitor.epoch(state.best_wer, state.left_out, epoch=epoch, step=state.step,
                              loss=state.loss, utts_per_s=state.utts_per_s, seconds=state.epoch_s,
                              num_unaligned=state.num_unaligned)
            state.begin_next_epoch()
        save(run, state)
        if stopper.reason in ("", "time limit"):
            evaluate_and_save(run, state)
            log.mllog("block_stop", first_epoch_num=epoch)
        if stopper.reason:
            break
    return stopper.reason or ("target wer" if cfg.is_target(state.best_wer) else "epochs")


def loss_fields(run: Run, result: StepResult) -> dict:
    """The losses of a step for log.jsonl; both parts where there is a CTC head."""
    record = {"loss": result.loss}
    if run.trainer.model.cfg.ctc_split:
        record |= {"transducer_loss": result.transducer_loss, "ctc_loss": result.ctc_loss}
    if run.trainer.model.cfg.char_head:
        record |= {"char_loss": result.char_loss}
    if run.trainer.cfg.lattice_band:
        record |= {"share_of_nodes": result.share_of_nodes}
    return record


def shown_steps(run: Run, state: State) -> Iterable[list[Batch]]:
    """The steps that are left in the epoch, with a progress bar, and profiled with --profile."""
    cfg, ranks = run.trainer.cfg, run.trainer.ranks
    steps = epoch_steps(run.train, run.tokenizer, run.features, cfg, ranks, state.epoch,
                        first_step=state.batch)
    left = run.steps_per_epoch - state.batch
    # Only the first epoch with enough steps left is profiled.
    is_first = run.monitor.steps < report.PROFILE_STEPS <= left
    if cfg.profile and ranks.rank == 0 and is_first:
        steps = report.profile_steps(steps, left, run.log)
    return report.progress_bar(steps, ranks.rank, desc=f"epoch {state.epoch}", unit="step",
                               total=run.steps_per_epoch, initial=state.batch)


def evaluate_and_save(run: Run, state: State) -> None:
    """Scores the dev split unless that is done or not due, writes all results, draws the curves."""
    is_due = state.batch > 0 or run.trainer.cfg.is_scored(state.epoch - 1)
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
    """`run_epochs`, with an end in log.jsonl and a checkpoint if a recording cannot be read."""
    try:
        reason = run_epochs(run, state, stopper)
    except (OSError, ValueError, FloatingPointError) as error:
        if isinstance(error, BadInput):
            save(run, state)
        with suppress(OSError):  # a full disk may be the error itself
            run.log.write("end", reason=f"error: {data.reason(error)}", step=state.step)
        raise
    best_wer = state.best_wer if math.isfinite(state.best_wer) else None
    run.log.write("end", reason=reason, best_wer=best_wer, step=state.step)
    return reason


# ------------------------------------------------------------------------------------------- main


def stored_tokenizer(checkpoint: dict) -> Tokenizer:
    return Tokenizer(checkpoint["tokenizer"].numpy().tobytes())


def make_tokenizer(origin: dict | None, train: Sequence[Utterance], vocab_size: int,
                   log: Log) -> Tokenizer:
    """The tokenizer of `origin` if it can spell the training texts, or a new one for them."""
    if origin is not None:
        tokenizer = stored_tokenizer(origin)
        try:
            for utterance in train:
                tokenizer.encode(utterance.text)
            return tokenizer
        except ValueError as error:
            log.say(f"init: a new tokenizer, because the checkpoint's cannot spell {error}")
    tokenizer = Tokenizer(data.train_tokenizer((u.text for u in train), vocab_size))
    if tokenizer.vocab_size != vocab_size:
        log.say(f"vocabulary: {tokenizer.vocab_size} classes; the texts do not give {vocab_size}")
    return tokenizer


def check_sizes(run: Run) -> None:
    """Raises ValueError if an epoch has no step, or too few of them to be profiled."""
    per_epoch, global_batch = run.steps_per_epoch, run.trainer.global_batch
    if per_epoch == 0:
        raise ValueError(f"{len(run.train)} training utterances, fewer than a batch of "
                         f"{global_batch}")
    if run.trainer.cfg.profile and per_epoch < report.PROFILE_STEPS:
        raise ValueError(f"--profile: {per_epoch} steps in an epoch, expected at least "
                         f"{report.PROFILE_STEPS}")


def log_settings(run: Run, state: State) -> None:
    """Writes the settings of the run to all logs."""
    trainer, log, per_epoch = run.trainer, run.log, run.steps_per_epoch
    cfg, model_cfg, global_batch = trainer.cfg, trainer.model.cfg, trainer.global_batch
    report.mllog_settings(log, cfg, model_cfg, run.features, global_batch,
                          per_epoch * global_batch, len(run.dev), decode.MAX_SYMBOLS)
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
    log.say(f"RESULT,RNN_SPEECH_RECOGNITION,{time.time() - started_s:.0f},"
            + time.strftime("%Y-%m-%d %I:%M:%S %p", time.localtime(started_s)))


def main() -> int:
    """Trains as the command line says; returns the exit status."""
    started_s = time.time()

    # 1 config
    given = vars(make_parser(__doc__).parse_args(sys.argv[1:]))
    cfg, model_cfg, features = make_configs(given)
    out = Path(cfg.out)

    # 2 ranks
    ranks, heartbeat = start_ranks(cfg.ranks, cfg.backend, cfg.timeout_s)
    log = Log(out, ranks.rank, cfg.tensorboard)
    torch.set_flush_denormal(True)  # small LSTM gates produce denormals, which multiply slowly

    # 3 data
    resumed = find_checkpoint(cfg, log)
    path, checkpoint = resumed or (None, None)
    origin = find_origin(cfg, resumed)
    if origin is not None:
        cfg, model_cfg, features = make_configs(given, origin)
    reading_s = time.time()
    train, dev = data.load_corpus(cfg.data, cfg.train_splits, cfg.dev_split, features,
                                  cfg.skip_bad, log.say)
    facts = run_facts(cfg, model_cfg, features, ranks, train, dev)
    if checkpoint is not None:
        check_same_model(path, checkpoint, facts)
        tokenizer = stored_tokenizer(checkpoint)
    else:
        known = None if "vocab_size" in given else origin
        tokenizer = make_tokenizer(known, train, model_cfg.vocab_size, log)
    model_cfg = replace(model_cfg, vocab_size=tokenizer.vocab_size)
    data.check_texts(train, tokenizer, features.frame_s * model_cfg.reduction, log.say)
    step = (checkpoint or origin or {"state": {"step": 0}})["state"]["step"]
    heartbeat.compare("run", {
        "corpus": data.describe_corpus(train + dev),
        **asdict(cfg), **asdict(model_cfg), **asdict(features),
        "checkpoint": f"step {step} in {out}", "dtype": matrix_dtype(cfg.precision),
    })

    # 4 model, 5 optimiser
    trainer = make_trainer(cfg, model_cfg, ranks)
    monitor = Monitor(log, len(train) // trainer.global_batch, cfg.epochs, cfg.log_every)
    run = Run(trainer, features, tokenizer, train, dev, facts, log, monitor)
    check_sizes(run)

    # 6 resume or begin
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_run(out)  # noqa: F841 - the lock is held as long as this variable lives
        clear_run(out, resumed=path)  # not before: a run that cannot begin deletes nothing
        # A checkpoint holds the weights, their average and the two moments of the optimiser.
        try_space(out, 4 * sum(x.nbytes for x in trainer.model.state_dict().values()))
    if checkpoint is None:
        state = State() if origin is None else begin_from(run, origin)
        report.mllog_start(log, cfg.submission_division, cfg.submission_org, ranks.world,
                           started_s, reading_s)
    else:
        state = from_checkpoint(run, checkpoint)
    del checkpoint, origin, resumed  # the weights that were read need much memory
    log_settings(run, state)

    # 7 loop
    stopper = Stopper(ranks, cfg.time_limit_s)
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
    try:
        status = main()
    except (OSError, ValueError, FloatingPointError) as error:
        leave(1, f"train.py: {data.reason(error)}")
    except KeyboardInterrupt:
        leave(EXIT_STATUS["SIGINT"], wait_s=0)
    except SystemExit as end:  # argparse has printed its message
        leave(end.code)
    except Exception:  # noqa: BLE001 - a bug: the other ranks must not wait for this one
        leave(1, traceback.format_exc())
    leave(status, wait_s=None)  # rank 0 may still be writing its last checkpoint
