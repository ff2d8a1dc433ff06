# SPDX-License-Identifier: Apache-2.0
"""Train a transducer on the processors of one or many machines.

    python train.py --data data/demo --train-splits train-demo --dev-split dev-demo \\
        --out out/demo --preset demo
    python train.py ... --resume                            # goes on from the newest checkpoint
    torchrun --standalone --nproc-per-node 2 train.py ...   # two ranks; or mpirun

Writes to --out: log.jsonl (one object per line: start, step, epoch, eval, end),
checkpoint-<step>.pt (the last two) and best.pt. Every field of TrainConfig, ModelConfig and
FeatureConfig is a flag.

You et al. (2019), arXiv:1904.00962: LAMB. The recipe is that of the MLPerf Training v1.0 RNN-T.
"""

import argparse
import copy
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import timedelta
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
from data import Batch, FeatureConfig, Tokenizer
from loss import joint_transducer_loss
from model import PRESETS, ModelConfig, Transducer


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are MLPerf v1.0's; a preset of RECIPES changes some."""

    data: str  # corpus root, in LibriSpeech's form
    train_splits: tuple[str, ...]  # folders below it
    dev_split: str
    out: str  # run directory
    preset: str = "democratized"  # model and recipe
    epochs: int = 49  # at most
    batch_size: int = 32  # utterances per rank and forward pass
    accumulation: int = 1  # forward passes per step, exactly one big batch
    lr: float = 0.004
    lr_min: float = 1e-5
    warmup_epochs: float = 6
    hold_epochs: float = 40
    lr_gamma: float = 0.935  # factor per epoch after warm-up and hold
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-9
    weight_decay: float = 1e-3  # on every parameter; 0 makes LAMB Adam
    clip_norm: float = 1.0  # largest norm of the whole gradient
    ema_decay: float = 0.999  # of the averaged weights that are evaluated
    precision: str = "auto"  # bf16, fp32, or auto: bf16 where the processor multiplies it
    target_wer: float = 0.0  # stop when the dev split reaches it; a fraction
    time_limit_s: float = 0.0  # stop after so many seconds; 0: no limit
    checkpoint_every_s: float = 900.0  # also at every epoch's end
    resume: bool = False
    seed: int = 1
    loader_workers: int = 1  # processes that prepare batches
    eval_batch_size: int = 32
    log_every: int = 10  # steps between lines on the console; log.jsonl has all
    timeout_s: float = 600.0  # longest wait for another rank

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r}, expected one of {sorted(PRESETS)}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision: {self.precision!r}, expected auto, bf16 or fp32")
        for name in ("epochs", "batch_size", "accumulation", "eval_batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
        for name in ("lr", "clip_norm", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected more than 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 <= x < 1")


# What else a preset changes: small corpora need small batches, hence more steps. LAMB turns every
# tensor by the same share of its norm, noise or not, which a batch of 16 does not survive at a
# useful rate: without weight decay it is Adam.
RECIPES = {
    "mini": dict(epochs=36, batch_size=16, lr=0.0012, weight_decay=0.0, warmup_epochs=4,
                 hold_epochs=8, lr_gamma=0.88, ema_decay=0.995, eval_batch_size=64),
    "demo": dict(epochs=18, batch_size=32, warmup_epochs=2, hold_epochs=8, lr_gamma=0.7,
                 ema_decay=0.99, loader_workers=2),
}  # fmt: skip


# ------------------------------------------------------------------------------ flags and ranks


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag for each field of a config dataclass; absent ones keep the preset's value."""
    for field in fields(config):
        flag = "--" + field.name.replace("_", "-")
        options: dict = {"default": argparse.SUPPRESS, "required": field.default is MISSING}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type == tuple[str, ...]:
            options.update(nargs="+")
        else:
            options.update(type=field.type)
        parser.add_argument(flag, **options)


def parse_configs(words: Sequence[str]) -> tuple[TrainConfig, ModelConfig, FeatureConfig]:
    """Command line -> the three configs; a wrong flag or value ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    for config in (TrainConfig, ModelConfig, FeatureConfig):
        add_flags(parser.add_argument_group(config.__name__), config)
    given = vars(parser.parse_args(words))

    def of(config: type) -> dict:
        return {f.name: given[f.name] for f in fields(config) if f.name in given}

    try:
        preset = given.get("preset", TrainConfig.preset)
        train = TrainConfig(**{**RECIPES.get(preset, {}), **of(TrainConfig)})
        features = FeatureConfig(**of(FeatureConfig))
        model = replace(PRESETS[preset], feature_size=features.feature_size, **of(ModelConfig))
    except ValueError as error:
        parser.error(str(error))
    return replace(train, train_splits=tuple(train.train_splits)), model, features


class Ranks(NamedTuple):
    """Who this process is among those that train together."""

    rank: int
    world: int
    local_rank: int


def init_ranks(timeout_s: float) -> Ranks:
    """Reads the launcher's variables; with more than one rank starts the process group (gloo).

    Intel MPI and MPICH set PMI_*, Open MPI OMPI_*, Slurm SLURM_*, torchrun RANK and WORLD_SIZE.
    """
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if names[0] in os.environ and names[1] in os.environ:
            ranks = Ranks(*(int(os.environ.get(name, 0)) for name in names))
            break
    else:
        ranks = Ranks(0, 1, 0)
    if ranks.world > 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(
            "gloo", rank=ranks.rank, world_size=ranks.world, timeout=timedelta(seconds=timeout_s)
        )
    return ranks


def all_sum(x: Tensor, ranks: Ranks) -> Tensor:
    """Sum over the ranks, in place."""
    if ranks.world > 1:
        dist.all_reduce(x)
    return x


def processor_multiplies_bf16() -> bool:
    """AMX or AVX-512 (x86) and BF16 (Arm) name themselves in the processor's flags."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


# ------------------------------------------------------------------------------------ optimiser


def lr_at(step: int, epoch: int, lr: float,  # noqa: PLR0913 - the schedule's own parameters
          warmup_epochs: float, hold_epochs: float, steps_per_epoch: int, gamma: float,
          lr_min: float) -> float:  # fmt: skip
    """Learning rate of a step; step and epoch count from 1.

    Linear warm-up, hold, then a factor `gamma` per epoch (constant inside an epoch), never less
    than `lr_min`: common/optimizers.py:20-46 of the original. Its demo prints 4.52e-04,
    6.77e-04, 9.03e-04 for steps 1, 2, 3.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        scale = (step + 1) / (warmup_steps + 1)
    elif step < warmup_steps + hold_epochs * steps_per_epoch:
        scale = 1.0
    else:
        scale = gamma ** (epoch - warmup_epochs - hold_epochs)
    return max(scale * lr, lr_min)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most `max_norm`; returns the norm."""
    grads = [p.grad for p in parameters]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if norm > max_norm:
        torch._foreach_div_(grads, norm / max_norm)
    return norm.item()


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments, You et al. (2019), arXiv:1904.00962, as in apex FusedLAMB.

    Adam's update plus weight decay, times the ratio of the norms of parameter and update. A
    tensor of which either norm is zero moves with the plain learning rate; IPEX's Lamb has no
    such rule, and there a bias that starts at zero stays zero. Without weight decay the ratio
    is 1, and LAMB is Adam: the rule of multi_tensor_lamb.cu. Clipping is `clip_gradients`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float],
                 epsilon: float, weight_decay: float) -> None:  # fmt: skip
        defaults = dict(lr=lr, betas=betas, epsilon=epsilon, weight_decay=weight_decay, step=0)
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            means = [self.state[p]["mean"] for p in params]
            squares = [self.state[p]["square"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

            updates = torch._foreach_div(squares, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(updates)
            torch._foreach_add_(updates, group["epsilon"])
            torch._foreach_reciprocal_(updates)
            torch._foreach_mul_(updates, means)
            torch._foreach_div_(updates, 1 - beta1 ** group["step"])
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])

            if group["weight_decay"] != 0:
                ratios = torch.stack(torch._foreach_norm(params)) / torch.stack(
                    torch._foreach_norm(updates)
                )
                # 0/x, x/0 and 0/0: the plain learning rate.
                ratios = torch.where(ratios.isfinite() & (ratios > 0), ratios, 1.0)
                torch._foreach_mul_(updates, ratios.tolist())
            torch._foreach_add_(params, updates, alpha=-group["lr"])


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for parameters and buffers."""
    averaged, current = ema.state_dict(), model.state_dict()
    torch._foreach_lerp_(list(averaged.values()), list(current.values()), 1 - decay)


# -------------------------------------------------------------------------------- one step


class Trainer(NamedTuple):
    """What a step works on."""

    cfg: TrainConfig
    ranks: Ranks
    model: Transducer
    parallel: nn.Module  # the model, wrapped by DistributedDataParallel if there are many ranks
    ema: Transducer
    optimizer: Lamb
    dtype: torch.dtype  # of the matrix products


def make_trainer(cfg: TrainConfig, model_cfg: ModelConfig, ranks: Ranks) -> Trainer:
    torch.manual_seed(cfg.seed)  # every rank starts from the same weights
    model = Transducer(model_cfg)
    parallel = model
    if ranks.world > 1:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = Lamb(
        model.parameters(), cfg.lr, (cfg.beta1, cfg.beta2), cfg.epsilon, cfg.weight_decay
    )
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and processor_multiplies_bf16())
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Trainer(cfg, ranks, model, parallel, copy.deepcopy(model).eval(), optimizer, dtype)


def step_moments(trainer: Trainer, batches: Sequence[Batch]) -> Tensor | None:
    """BatchNorm statistics of the whole step, all micro-batches of all ranks."""
    norm = trainer.model.encoder.feature_norm
    if norm is None:
        return None
    moments = sum(norm.moments(b.feats, b.feat_lens) for b in batches)
    norm.update(all_sum(moments, trainer.ranks))
    return moments


def batch_loss(trainer: Trainer, batch: Batch, moments: Tensor | None) -> Tensor:
    """(B,) costs in nats."""
    model = trainer.model
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
        encoded, enc_lens, predicted = trainer.parallel(
            batch.feats, batch.feat_lens, batch.targets, moments
        )
        output = model.joint_network.output
        return joint_transducer_loss(
            encoded, predicted, output.weight, output.bias, batch.targets, enc_lens,
            batch.target_lens, model.cfg.blank, model.cfg.joint_dropout, reduction="none",
        )  # fmt: skip


def check_finite(costs: Tensor, batch: Batch, step: int, ranks: Ranks) -> None:
    """Raises on every rank if a cost on any of them is not finite."""
    bad = [i for i, ok in zip(batch.ids, costs.isfinite().tolist(), strict=True) if not ok]
    if all_sum(torch.tensor(len(bad)), ranks) > 0:
        where = f"of {', '.join(bad)}" if bad else "on another rank"
        raise FloatingPointError(f"step {step}: rank {ranks.rank}: loss {where} is not finite")


def train_step(trainer: Trainer, batches: Sequence[Batch], step: int, lr: float) -> tuple:
    """One optimiser step over all micro-batches: returns mean cost of this rank, gradient norm.

    Every utterance of the global batch weighs the same, so accumulation and ranks change
    nothing but the order of summation. The random numbers of dropout depend on (seed, step,
    rank) alone: a resumed run draws what the uninterrupted one draws.
    """
    cfg, ranks = trainer.cfg, trainer.ranks
    state = np.random.SeedSequence((cfg.seed, step, ranks.rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
    trainer.parallel.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    moments = step_moments(trainer, batches)
    count = sum(len(b.ids) for b in batches)
    total = 0.0
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        # Gradients are summed over the ranks during the last backward pass only.
        with nullcontext() if last or ranks.world == 1 else trainer.parallel.no_sync():
            costs = batch_loss(trainer, batch, moments)
            check_finite(costs.detach(), batch, step, ranks)
            (costs.sum() / count).backward()
        total += costs.detach().sum().item()
    grad_norm = clip_gradients(trainer.model.parameters(), cfg.clip_norm)
    if not math.isfinite(grad_norm):  # the same on every rank
        raise FloatingPointError(f"step {step}: gradient norm is {grad_norm}")
    trainer.optimizer.param_groups[0]["lr"] = lr
    trainer.optimizer.step()
    update_ema(trainer.ema, trainer.model, cfg.ema_decay)
    return total / count, grad_norm


def evaluate(trainer: Trainer, tokenizer: Tokenizer, utterances: Sequence[data.Utterance],
             features: FeatureConfig) -> dict:  # fmt: skip
    """WER of the averaged weights; every rank decodes its share of the batches, in float32."""
    started = time.perf_counter()
    cfg, ranks = trainer.cfg, trainer.ranks
    batches = decode.evaluation_batches(utterances, cfg.eval_batch_size)
    loader = data.batch_loader(
        data.SpeechDataset(utterances, None, features),
        batches[ranks.rank :: ranks.world],
        cfg.loader_workers,
    )
    texts = decode.decode_batches(trainer.ema, tokenizer, loader)
    mine = [u for u in utterances if u.id in texts]
    counts = decode.word_errors([texts[u.id] for u in mine], [u.text for u in mine])
    errors, words = all_sum(torch.tensor(counts), ranks).tolist()
    seconds = time.perf_counter() - started
    return {
        "wer": decode.word_error_rate(errors, words), "errors": errors, "words": words,
        "rtf": seconds / sum(u.duration_s for u in utterances), "seconds": seconds,
    }  # fmt: skip


# ---------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Writes beside `path` and renames, so that `path` is always whole."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def list_checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted(out.glob("checkpoint-*.pt"))


class Progress:
    """Where a run is: epoch and step count from 1, `batch` steps of the epoch are done."""

    def __init__(self) -> None:
        self.epoch, self.batch, self.step = 1, 0, 0
        self.best_wer = math.inf
        self.evaluated = 0  # step of the newest evaluation


def write_checkpoint(trainer: Trainer, progress: Progress, tokenizer: Tokenizer,
                     features: FeatureConfig, is_best: bool = False) -> None:  # fmt: skip
    """checkpoint-<step>.pt, of which the last two stay, and best.pt; rank 0 writes.

    Contents: weights, averaged weights, optimiser state, position (epoch, steps done in it,
    step), best WER, the three configs and the tokenizer. Random numbers need no state: each is
    a function of the seed and the position.
    """
    if trainer.ranks.rank != 0:
        return
    out = Path(trainer.cfg.out)
    checkpoint = {
        "format": 1,
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "progress": vars(progress),
        "train_config": asdict(trainer.cfg) | {"train_splits": list(trainer.cfg.train_splits)},
        "model_config": asdict(trainer.model.cfg),
        "feature_config": asdict(features),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
    }
    path = out / f"checkpoint-{progress.step:08d}.pt"
    save_checkpoint(path, checkpoint)
    if is_best:
        partial = out / "best.partial"
        shutil.copyfile(path, partial)
        os.replace(partial, out / "best.pt")
    for old in list_checkpoints(out)[:-2]:
        old.unlink()
    print(f"wrote {path}{' and best.pt' if is_best else ''}", flush=True)


def resume_checkpoint(cfg: TrainConfig, model_cfg: ModelConfig) -> dict | None:
    """The newest checkpoint in the run directory, if --resume asks for it and there is one."""
    present = list_checkpoints(Path(cfg.out))
    if not cfg.resume:
        if present:
            raise ValueError(f"{present[-1]} exists: give --resume to go on, or another --out")
        return None
    if not present:
        return None
    checkpoint = decode.load_checkpoint(present[-1])
    stored = ModelConfig(**checkpoint["model_config"])
    for field in fields(ModelConfig):
        old, new = getattr(stored, field.name), getattr(model_cfg, field.name)
        # The tokenizer may have found fewer pieces than asked for.
        if old != new and field.name != "vocab_size":
            raise ValueError(f"{present[-1]} has {field.name} {old}, this run {new}")
    return checkpoint


# ----------------------------------------------------------------------------------- the loop


class Log:
    """log.jsonl and the console, on rank 0 only."""

    def __init__(self, out: Path, ranks: Ranks) -> None:
        self.file = None
        if ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.file = (out / "log.jsonl").open("a", encoding="utf-8")

    def write(self, event: str, **values: object) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"event": event, **values}) + "\n")
            self.file.flush()

    def say(self, line: str) -> None:
        if self.file is not None:
            print(line, flush=True)


def git_commit() -> str | None:
    """Of the folder this file is in, with -dirty behind it if files changed since."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def describe_start(trainer: Trainer, features: FeatureConfig) -> dict:
    """What a reader of log.jsonl needs to repeat the run."""
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "ranks": trainer.ranks.world, "threads": torch.get_num_threads(),
        "precision": str(trainer.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "train_config": asdict(trainer.cfg), "model_config": asdict(trainer.model.cfg),
        "feature_config": asdict(features),
    }  # fmt: skip


def groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(islice(items, size)):
        yield group


class Run:
    """One training run: the data, the loop over epochs and steps, and what they report."""

    def __init__(self, trainer: Trainer, features: FeatureConfig, tokenizer: Tokenizer,
                 train: Sequence[data.Utterance], dev: Sequence[data.Utterance],
                 log: Log) -> None:  # fmt: skip
        self.trainer, self.features, self.tokenizer, self.log = trainer, features, tokenizer, log
        self.train, self.dev = train, dev
        self.progress = Progress()
        self.started = self.saved = time.monotonic()
        cfg = trainer.cfg
        self.global_batch = cfg.batch_size * cfg.accumulation * trainer.ranks.world
        self.steps_per_epoch = len(train) // self.global_batch

    def epoch_loader(self) -> torch.utils.data.DataLoader:
        """This rank's micro-batches of the current epoch that are not done yet."""
        cfg, ranks, epoch = self.trainer.cfg, self.trainer.ranks, self.progress.epoch
        order = data.bucket_batches(
            [u.duration_s for u in self.train], self.global_batch, self.features.num_buckets,
            np.random.default_rng((cfg.seed, epoch)),
        )  # fmt: skip
        mine = order[self.progress.batch :, ranks.rank :: ranks.world]
        dataset = data.SpeechDataset(self.train, self.tokenizer, self.features, cfg.seed, epoch)
        return data.batch_loader(
            dataset, mine.reshape(-1, cfg.batch_size).tolist(), cfg.loader_workers
        )

    def out_of_time(self) -> bool:
        """Rank 0 decides, so that all ranks stop at the same step."""
        late = 0 < self.trainer.cfg.time_limit_s < time.monotonic() - self.started
        return all_sum(torch.tensor(int(late and self.trainer.ranks.rank == 0)),
                       self.trainer.ranks) > 0  # fmt: skip

    def run_epoch(self) -> str | None:
        """Returns the reason to stop before the epoch's end, if there is one."""
        cfg, progress = self.trainer.cfg, self.progress
        epoch_started = waited_from = time.monotonic()
        losses, utterances = [], 0
        for batches in groups(self.epoch_loader(), cfg.accumulation):
            data_s = time.monotonic() - waited_from
            progress.step += 1
            progress.batch += 1
            lr = lr_at(
                progress.step, progress.epoch, cfg.lr, cfg.warmup_epochs, cfg.hold_epochs,
                self.steps_per_epoch, cfg.lr_gamma, cfg.lr_min,
            )  # fmt: skip
            loss, grad_norm = train_step(self.trainer, batches, progress.step, lr)
            step_s = time.monotonic() - waited_from
            self.report_step(loss, lr, grad_norm, step_s, data_s)
            losses.append(loss)
            utterances += self.global_batch
            if self.out_of_time():
                return "time limit"
            if time.monotonic() - self.saved > cfg.checkpoint_every_s:
                self.save()
            waited_from = time.monotonic()
        seconds = time.monotonic() - epoch_started
        loss, rate = sum(losses) / len(losses), utterances / seconds
        self.log.write("epoch", epoch=progress.epoch, loss=loss, utts_per_s=rate, seconds=seconds)
        self.log.say(
            f"epoch {progress.epoch} | avg train utts/s {rate:.1f} | avg loss {loss:.2f} | "
            f"took {seconds:.1f} s"
        )
        return None

    def report_step(self, loss: float, lr: float, grad_norm: float, step_s: float,
                    data_s: float) -> None:  # fmt: skip
        progress, cfg = self.progress, self.trainer.cfg
        rate = self.global_batch / step_s
        self.log.write(
            "step", step=progress.step, epoch=progress.epoch, loss=loss, lr=lr,
            grad_norm=grad_norm, utts_per_s=rate, step_s=step_s, data_s=data_s,
        )  # fmt: skip
        if progress.batch % cfg.log_every == 1 or cfg.log_every == 1:
            self.log.say(
                f"epoch {progress.epoch} | iter {progress.batch}/{self.steps_per_epoch} | "
                f"loss {loss:.2f} | utts/s {rate:.1f} | took {step_s:.2f} s | lrate {lr:.2e} | "
                f"grad norm {grad_norm:.2f} | data wait {data_s:.2f} s"
            )
        if progress.step == 50:
            left = (cfg.epochs * self.steps_per_epoch - 50) / 50
            hours = (time.monotonic() - self.started) * left / 3600
            self.log.say(f"projected: {hours:.2f} h for the rest of {cfg.epochs} epochs")

    def save(self, is_best: bool = False) -> None:
        write_checkpoint(self.trainer, self.progress, self.tokenizer, self.features, is_best)
        self.saved = time.monotonic()

    def evaluate(self, epoch: int) -> float:
        """Scores the dev split and writes a checkpoint."""
        result = evaluate(self.trainer, self.tokenizer, self.dev, self.features)
        hours = (time.monotonic() - self.started) / 3600
        self.log.write("eval", epoch=epoch, step=self.progress.step, hours=hours, **result)
        self.log.say(f"epoch {epoch} | dev ema wer {100 * result['wer']:.2f} % | "
                     f"{result['errors']:,} errors in {result['words']:,} words | "
                     f"rtf {result['rtf']:.4f} | took {result['seconds']:.1f} s")  # fmt: skip
        is_best = result["wer"] < self.progress.best_wer
        self.progress.best_wer = min(result["wer"], self.progress.best_wer)
        self.progress.evaluated = self.progress.step
        self.save(is_best)
        return result["wer"]

    def run(self) -> str:
        """Trains until a limit is reached and returns which."""
        cfg, progress = self.trainer.cfg, self.progress
        while progress.epoch <= cfg.epochs:
            if progress.best_wer <= cfg.target_wer:
                return "target wer"
            epoch, reason = progress.epoch, None
            if progress.batch < self.steps_per_epoch:  # a checkpoint may stand at its end
                reason = self.run_epoch()
            if progress.batch == self.steps_per_epoch:
                progress.epoch, progress.batch = epoch + 1, 0
            self.evaluate(epoch)
            if reason is not None:
                return reason
        return "epochs"


def load_corpus(cfg: TrainConfig, features: FeatureConfig, log: Log) -> tuple[list, list]:
    """Training utterances of all splits without the long ones, and the whole dev split."""
    train = [u for split in cfg.train_splits for u in data.read_split(cfg.data, split, features)]
    dev = data.read_split(cfg.data, cfg.dev_split, features)
    train, note = data.drop_long(train, features)
    for name, utterances in (("train", train), ("dev", dev)):
        hours = sum(u.duration_s for u in utterances) / 3600
        log.say(f"{name}: {len(utterances):,} utterances, {hours:.2f} h")
    log.say(f"train: longer than {features.max_utterance_s} s: {note}")
    return train, dev


def main() -> None:
    # 1 configs and ranks
    cfg, model_cfg, features = parse_configs(sys.argv[1:])
    ranks = init_ranks(cfg.timeout_s)
    log = Log(Path(cfg.out), ranks)
    # Denormal numbers, which small LSTM gates produce, are many times slower to multiply.
    torch.set_flush_denormal(True)
    checkpoint = resume_checkpoint(cfg, model_cfg)

    # 2 data
    train, dev = load_corpus(cfg, features, log)
    if checkpoint is None:
        model_proto = data.train_tokenizer((u.text for u in train), model_cfg.vocab_size)
    else:
        model_proto = checkpoint["tokenizer"].numpy().tobytes()
    tokenizer = Tokenizer(model_proto)
    if tokenizer.vocab_size != model_cfg.vocab_size:
        log.say(f"vocabulary: {tokenizer.vocab_size} classes; the texts do not give "
                f"{model_cfg.vocab_size}")  # fmt: skip
        model_cfg = replace(model_cfg, vocab_size=tokenizer.vocab_size)

    # 3 model and optimiser
    trainer = make_trainer(cfg, model_cfg, ranks)
    run = Run(trainer, features, tokenizer, train, dev, log)
    if checkpoint is not None:
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.ema.load_state_dict(checkpoint["ema"])
        trainer.optimizer.load_state_dict(checkpoint["optimizer"])
        vars(run.progress).update(checkpoint["progress"])
        log.say(f"resumed at step {run.progress.step}, epoch {run.progress.epoch}")

    # 4 say what is about to happen
    start = describe_start(trainer, features)
    log.write("start", **start)
    log.say(f"model: {start['parameters']:,} parameters, {tokenizer.vocab_size} classes; "
            f"{ranks.world} ranks x {start['threads']} threads, {start['precision']}; "
            f"{run.steps_per_epoch} steps of {run.global_batch} utterances an epoch; "
            f"torch {torch.__version__}, commit {start['commit']}")  # fmt: skip
    if run.global_batch < 64:
        log.say(f"warning: a global batch of {run.global_batch} is under 64: gradients are noisy; "
                "raise --batch-size or --accumulation if the WER stays at 100 %")  # fmt: skip

    # 5 train
    reason = run.run()
    log.write("end", reason=reason, best_wer=run.progress.best_wer, step=run.progress.step)
    log.say(f"end: {reason}, best dev wer {100 * run.progress.best_wer:.2f} %")
    if ranks.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
