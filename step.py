# SPDX-License-Identifier: Apache-2.0
"""One training step: losses, gradients over micro-batches and ranks, optimiser, averaged weights.

    trainer = make_trainer(cfg, model_cfg, ranks)
    for batches in epoch_steps(utterances, tokenizer, features, cfg, ranks, epoch=1):
        result = train_step(trainer, batches, step=1, lr=0.001)
    scores = evaluate(trainer, tokenizer, dev_utterances, features)
"""

import copy
import importlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import data
import decode
import report
from data import Batch, Tokenizer, Utterance
from features import FeatureConfig, make_tables
from loss import MOST_BORDER_VISITS, ctc_band, ctc_loss, joint_transducer_loss
from model import ModelConfig, Transducer, WideLstm
from optimizer import Lamb, clip_gradients, update_ema
from ranks import Ranks, all_sum
from recipe import TrainConfig

WHEN_DIVERGED = "if the recordings are sound, the run diverged: give a lower --lr"


def processor_multiplies_bf16() -> bool:
    """True if the processor's flags name AMX (Intel), AVX-512 BF16 (AMD) or BF16 (Arm).

    Intel's AVX-512 BF16 instructions without AMX multiply at half of float32's rate.
    """
    flags = set(report.processor_info().split())
    return bool(flags & {"amx_bf16", "bf16"}) or {"AuthenticAMD", "avx512_bf16"} <= flags


def matrix_dtype(precision: str) -> torch.dtype:
    bf16 = precision == "bf16" or (precision == "auto" and processor_multiplies_bf16())
    return torch.bfloat16 if bf16 else torch.float32


# AMX multiplies tiles of 16 rows. So few utterances fill them so badly that oneDNN's LSTMs are
# faster in float32.
FLOAT32_BATCH_ON_AMX = 8


class Trainer(NamedTuple):
    """Everything that a step reads or changes."""

    cfg: TrainConfig
    ranks: Ranks
    model: Transducer
    parallel: nn.Module  # the model, wrapped by DistributedDataParallel if there are many ranks
    ema: Transducer  # the averaged weights
    optimizer: Lamb
    dtype: torch.dtype  # of the matrix products
    epoch: int  # the epoch under way, counted from 1; see begin_epoch

    @property
    def global_batch(self) -> int:
        """Utterances of a step."""
        return self.cfg.global_batch(self.ranks.world)


def make_trainer(cfg: TrainConfig, model_cfg: ModelConfig, ranks: Ranks,
                 epoch: int = 1) -> Trainer:
    """A trainer with random weights that depend on the seed alone, ready for an epoch's steps."""
    torch.manual_seed(cfg.seed)  # every rank starts from the same weights
    model = Transducer(model_cfg)
    if "amx_bf16" in report.processor_info().split():
        for lstm in (m for m in model.modules() if isinstance(m, WideLstm)):
            lstm.float32_batch = FLOAT32_BATCH_ON_AMX
    ema = copy.deepcopy(model).eval()
    optimizer = Lamb(model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    if cfg.ipex:
        optimize_with_ipex(model, optimizer)
    trainer = Trainer(cfg, ranks, model, model, ema, optimizer, matrix_dtype(cfg.precision), epoch)
    return begin_epoch(trainer, epoch)


def begin_epoch(trainer: Trainer, epoch: int) -> Trainer:
    """The trainer for an epoch, counted from 1, with its dropout and the parameters it trains.

    Parameters that the CTC head does not need have no gradient while it is trained alone, and
    DistributedDataParallel waits for the gradient of every parameter that had one when it was made.
    """
    trainer = trainer._replace(epoch=epoch)
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
    has_no_alignment: Tensor  # True where the pieces have no CTC alignment
    share_of_nodes: Tensor  # share of the lattice's nodes that were computed


def batch_losses(trainer: Trainer, batch: Batch) -> Losses:
    """Runs the model on a micro-batch and computes the losses that the epoch needs."""
    model, cfg = trainer.model, trainer.cfg
    ctc_alone = cfg.is_ctc_alone(trainer.epoch)
    zero = torch.zeros(len(batch.ids))
    loss = transducer = ctc = char = zero
    has_alignment = torch.ones(len(batch.ids), dtype=torch.bool)
    share = torch.ones(len(batch.ids))
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
        outputs = trainer.parallel(batch.feats, batch.feat_lens, batch.targets, ctc_alone)
        if outputs.ctc_logits is not None:
            ctc, has_alignment = ctc_loss(outputs.ctc_logits, batch.targets, outputs.ctc_lens,
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
            border_visits = math.inf if cfg.is_band_hard(trainer.epoch) else MOST_BORDER_VISITS
            if cfg.lattice_band:
                band = ctc_band(outputs.ctc_logits, batch.targets, outputs.enc_lens,
                                batch.target_lens, model.cfg.blank, model.cfg.ctc_split,
                                cfg.lattice_band)
            output = model.joint_network.output
            transducer = joint_transducer_loss(
                outputs.encoded, outputs.predicted, output.weight, output.bias, batch.targets,
                outputs.enc_lens, batch.target_lens, model.cfg.blank,
                model.joint_network.dropout.p, reduction="none", band=band,
                border_visits=border_visits,
            )
            if band is not None:
                share = band.sum((1, 2)) / (outputs.enc_lens * (batch.target_lens + 1))
            loss = transducer if outputs.ctc_logits is None else loss + transducer
    return Losses(loss, transducer, ctc, char, ~has_alignment, share)


def sum_losses(losses: Losses, batch: Batch, step: int, ranks: Ranks) -> Tensor:
    """Sums over a micro-batch and all ranks, (7,): the fields of `losses`, then the utterances.

    Raises:
        FloatingPointError: a loss on any rank is not finite; every rank raises it.
    """
    is_finite = losses.loss.isfinite().tolist()
    bad = [i for i, ok in zip(batch.ids, is_finite, strict=True) if not ok]
    sums = [x.detach().double().sum() for x in losses]
    sums = torch.tensor([len(bad), *sums, len(batch.ids)], dtype=torch.float64)
    sums = all_sum(sums, ranks)
    if sums[0] > 0:
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
    num_unaligned: int  # utterances without a CTC alignment of their pieces
    share_of_nodes: float  # share of the lattices' nodes that were computed
    num_left_out: int  # utterances that could not be read


def train_step(trainer: Trainer, batches: Sequence[Batch], step: int, lr: float) -> StepResult:
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
        # DistributedDataParallel averages the gradients over the ranks, in the last backward pass
        # only. All ranks divide by the same number, so the mean is over the global batch.
        with nullcontext() if is_last or ranks.world == 1 else trainer.parallel.no_sync():
            losses = batch_losses(trainer, batch)
            sums += sum_losses(losses, batch, step, ranks)
            (losses.loss.sum() / num_requested).backward()
    if norm is not None:
        norm.end_step()
    grad_norm = clip_gradients(trainer.model.parameters(), cfg.clip_norm)
    if not math.isfinite(grad_norm):  # every rank has the same norm
        raise FloatingPointError(f"step {step}: gradient norm is {grad_norm}; {WHEN_DIVERGED}")
    trainer.optimizer.param_groups[0]["lr"] = lr
    trainer.optimizer.step()
    # The average of the first steps would lag, so its decay warms up as num_updates makes it do in
    # TensorFlow's ExponentialMovingAverage.
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
    search = decode.ctc_greedy_decode if ctc_alone else decode.greedy_decode
    texts, counts = decode.decode_batches(trainer.ema, tokenizer, bar, search)
    decoded = [u for u in utterances if u.id in texts]
    pairs = [texts[u.id] for u in decoded], [u.text for u in decoded]
    sums = torch.tensor([*decode.word_errors(*pairs), *decode.char_errors(*pairs),
                         counts["frames"], counts["labels"]])
    errors, words, char_errors, chars, frames, labels = all_sum(sums, ranks).tolist()
    seconds = time.perf_counter() - started
    return {
        "wer": decode.error_rate(errors, words), "errors": errors, "words": words,
        "cer": decode.error_rate(char_errors, chars),
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
    make_tables(features)
    dataset = data.SpeechDataset(utterances, tokenizer, features, cfg.seed, epoch, cfg.skip_bad,
                                 cfg.strength(epoch))
    global_batch = cfg.global_batch(ranks.world)
    rng = np.random.default_rng((cfg.seed, epoch))
    order = data.bucket_batches(dataset.durations_s(), global_batch, features.num_buckets, rng)
    # (steps, global_batch) indices -> (micro-batches, utterances) of this rank.
    mine = order[first_step:, ranks.rank :: ranks.world].reshape(-1, cfg.rank_batch(ranks.world))
    batches = data.batch_loader(dataset, mine.tolist(), cfg.loader_workers, cfg.timeout_s / 2)
    while step := list(islice(batches, cfg.accumulation)):
        yield step
