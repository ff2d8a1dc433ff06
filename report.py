# SPDX-License-Identifier: Apache-2.0
"""Shows a training run: console, log.jsonl, MLPerf's log, curves, warnings, profile.

    steps, evals = read_run(Path("out/demo"))
    draw_curves({"demo": (steps, evals)}, Path("curves.png"))

train.py uses all of this; a log and a progress bar are silent on other ranks than 0. `python -m
tools.bench` uses the reader, the curves and the profile. Arguments are plain values and config
dataclasses: no model, no group of ranks.

log.jsonl has one object a line; `event` is start, step, epoch, eval or end. A step, an epoch and
an eval carry `epoch`, from 1 (0 in an eval before the first step), and `step`; a step and an eval
also `epochs`, which is fractional, and `hours`, the time spent in steps and evaluations since the
run began, over all restarts.
"""

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ curves


def read_log(path: Path) -> Iterator[dict]:
    """The records of a log.jsonl; a line that was cut off when the run was killed is left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def read_run(out: Path) -> tuple[list[dict], list[dict]]:
    """Records of all steps and of all evaluations in the log.jsonl of a run directory."""
    records = list(read_log(out / "log.jsonl"))
    steps, evals = ([r for r in records if r["event"] == kind] for kind in ("step", "eval"))
    return steps, evals


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """An OSError of writing does not name the file: raises another one that does."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"{path} could not be written: {error.strerror}") from error


def transducer_evals(evals: Sequence[dict]) -> list[dict]:
    """Evaluations without those of the CTC head, whose WER says nothing about the transducer."""
    return [e for e in evals if e.get("search") != "ctc"]


def plot_means(row: Sequence[Any], parts: Sequence[list[dict]], key: str, colour: str,
               style: dict) -> None:
    """Draws the mean of `key` over every part, against epochs (left) and hours (right)."""
    for ax, x in zip(row, ("epochs", "hours"), strict=True):
        xs, ys = ([statistics.fmean(r[k] for r in part) for part in parts] for k in (x, key))
        ax.plot(xs, ys, linewidth=1, color=colour, **style)


def draw_curves(runs: dict[str, tuple[list[dict], list[dict]]], png: Path) -> None:
    """Loss, dev WER, learning rate and speed of some runs, against epochs and against hours.

    The loss that training minimises is solid. The losses of the CTC heads, without their weights,
    are dashed (pieces) and dotted (characters).

    Args:
        runs: name in the legend -> steps and evaluations, as `read_run` returns them.
    """
    figure = Figure(figsize=(9, 9), dpi=100)
    axes = figure.subplots(4, 2, sharex="col", sharey="row")
    # Fixed margins: a layout engine draws everything twice, and this runs in every epoch.
    figure.subplots_adjust(0.1, 0.05, 0.985, 0.985, wspace=0.04, hspace=0.08)
    panels = {"loss": "training loss, nats", "wer": "dev WER, %", "lr": "learning rate",
              "utts_per_s": "utterances/s"}
    for number, (name, (steps, evals)) in enumerate(runs.items()):
        size = -(-len(steps) // 100) or 1  # steps per point: the curves have at most 100 points
        parts = [steps[i : i + size] for i in range(0, len(steps), size)]
        scores = [[r | {"wer": min(100.0, 100 * r["wer"])}] for r in evals]
        for row, key in enumerate(panels):
            style = {"label": name, "marker": "." if key == "wer" else ""}
            plot_means(axes[row], scores if key == "wer" else parts, key, f"C{number}", style)
        for key, part, line in (("ctc_loss", "CTC", "--"), ("char_loss", "characters", ":")):
            if any(key in r for r in steps):
                style = {"label": f"{name}: {part}", "linestyle": line}
                plot_means(axes[0], parts, key, f"C{number}", style)
    for row, label in zip(axes, panels.values(), strict=True):
        row[0].set(ylabel=label, ylim=(0, None))
        for ax in row:
            ax.locator_params(nbins=4)  # drawing the ticks takes most of the time
            ax.grid(alpha=0.3)
    for ax, label in zip(axes[-1], ("epochs", "hours"), strict=True):
        ax.set(xlabel=label, xlim=(0, None))
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].legend(loc="upper right")
    with named_in_errors(png):
        figure.savefig(png)


# ------------------------------------------------------------------------------------- the machine


def processor_info() -> str:
    """The text of /proc/cpuinfo, empty on systems without it."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def processor_name() -> str:
    lines = [x for x in processor_info().splitlines() if x.startswith("model name")]
    return lines[0].partition(": ")[2] if lines else platform.processor() or "CPU"


def git_commit() -> str | None:
    """Commit of the folder that holds this file, ending in -dirty if files changed since."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def describe_start(ranks: int, dtype: torch.dtype, parameters: int, **configs: Any) -> dict:
    """The facts that a reader of log.jsonl needs to repeat the run.

    Args:
        dtype: of the matrix products.
        parameters: their number in the model.
        configs: the config dataclasses by the names that they get in the record.
    """
    return {
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "ranks": ranks, "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."), "parameters": parameters,
        **{name: asdict(config) for name, config in configs.items()},
    }


# ---------------------------------------------------------------------------------- the log files


def progress_bar(items: Iterable, rank: int, **options: Any) -> tqdm:
    """tqdm, on rank 0 and on terminals only; it disappears at its end."""
    return tqdm(items, leave=False, disable=None if rank == 0 else True, **options)


def summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: pip install tensorboard") from error
    return SummaryWriter


def to_json(record: dict) -> str:
    """A record of numbers, texts and records; null stands for NaN and the infinities.

    NaN is a mean before the first step, infinity the best WER before the first evaluation.
    """
    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: clean(x) for name, x in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(record))


class Log:
    """Writes console, log.jsonl, mllog.log, curves.png and TensorBoard's files, on rank 0 only."""

    def __init__(self, out: Path, rank: int, tensorboard: bool = False) -> None:
        self.out = out if rank == 0 else None
        self.open_board = summary_writer() if tensorboard and rank == 0 else None
        self.board = None
        self.has_reader = True  # until the reader of standard output ends, as in `| head`

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one.

        Nothing is raised where nobody reads it any more: train.Stopper then stops all ranks.
        """
        if self.out is None:
            return
        try:
            tqdm.write(line)
            sys.stdout.flush()
        except BrokenPipeError:
            self.has_reader = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # later lines are no errors

    def warn(self, message: str) -> None:
        self.say(f"warning: {message}")

    def append(self, name: str, line: str) -> None:
        path = self.out / name
        with named_in_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write(self, event: str, **values: Any) -> None:
        """Appends a record to log.jsonl and hands its floats to TensorBoard."""
        if self.out is None:
            return
        self.append("log.jsonl", to_json({"event": event, **values}))
        if self.open_board is not None:
            # purge_step hides the steps that a killed run wrote after its last checkpoint: those
            # from this number on.
            self.board = self.board or self.open_board(self.out, purge_step=values["step"] + 1)
            for key, value in values.items():
                if isinstance(value, float) and math.isfinite(value):
                    self.board.add_scalar(f"{event}/{key}", value, values["step"])
            if event != "step":
                self.board.flush()

    def mllog(self, key: str, value: object = None, at_s: float | None = None,
              **metadata: object) -> None:
        """Appends an event to mllog.log in the form of the package mlperf_logging.

        The event names the source line of the caller, as MLPerf asks.

        Args:
            at_s: the time of the event, if it is not now, in seconds of time.time().
        """
        if self.out is None:
            return
        kinds = {"start": "INTERVAL_START", "stop": "INTERVAL_END"}
        caller = sys._getframe(1)
        event = {
            "namespace": "", "time_ms": int(1e3 * (at_s or time.time())),
            "event_type": kinds.get(key.rpartition("_")[2], "POINT_IN_TIME"),
            "key": key, "value": value,
            "metadata": {"file": Path(caller.f_code.co_filename).name, "lineno": caller.f_lineno,
                         **metadata},
        }
        self.append("mllog.log", f":::MLLOG {to_json(event)}")

    def draw(self) -> None:
        if self.out is not None:
            draw_curves({self.out.name: read_run(self.out)}, self.out / "curves.png")

    def rewind(self, step: int, evaluated: int) -> None:
        """Removes the records from log.jsonl that a resumed run will write again.

        Args:
            step: the last step that the checkpoint contains.
            evaluated: the step of the last evaluation that the checkpoint contains.
        """
        path = None if self.out is None else self.out / "log.jsonl"
        if path is None or not path.exists():
            return
        kept = [json.dumps(record) + "\n" for record in read_log(path)
                if record["step"] <= (evaluated if record["event"] == "eval" else step)]
        partial = path.with_suffix(".partial")
        with named_in_errors(partial):
            partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


# ------------------------------------------------------------------------- MLPerf's start of a run


def mllog_start(log: Log, division: str, org: str, ranks: int, started_s: float,
                reading_s: float) -> None:
    """The events of MLPerf before training.

    Args:
        division, org: as the submission claims them.
        started_s, reading_s: when the program began and when it began to read its corpus.
    """
    log.mllog("cache_clear", False, at_s=started_s)  # file system caches stay as they are
    log.mllog("init_start", at_s=started_s)
    # MLPerf's checker wants the submission before init_stop from rules 2.0 on.
    log.mllog("submission_benchmark", "rnnt", at_s=started_s)
    log.mllog("submission_division", division, at_s=started_s)
    log.mllog("submission_org", org, at_s=started_s)
    log.mllog("submission_platform", f"{ranks} ranks, {processor_name()}", at_s=started_s)
    log.mllog("submission_status", "onprem", at_s=started_s)
    log.mllog("init_stop", at_s=reading_s)
    log.mllog("run_start", at_s=reading_s)
    for tensor in ("pre_rnn", "post_rnn", "pred_embed", "dec_rnn", "joint_enc", "joint_pred",
                   "joint_net"):
        log.mllog("weights_initialization", tensor=tensor)


def mllog_settings(log: Log, cfg: Any, model_cfg: Any, features: Any, **sizes: int) -> None:
    """Every setting that MLPerf asks of an RNN-T run, with the value in force.

    A resumed run repeats them: MLPerf's checker accepts the same value again and no other one.

    Args:
        cfg, model_cfg, features: TrainConfig, ModelConfig and FeatureConfig.
        sizes: settings that are no fields of these, under MLPerf's names.
    """
    settings = {
        **sizes,
        "seed": cfg.seed,
        "gradient_accumulation_steps": cfg.accumulation,
        "opt_name": "lamb",
        "opt_base_learning_rate": cfg.lr,
        "opt_lamb_learning_rate_min": cfg.lr_min,
        "opt_learning_rate_warmup_epochs": cfg.warmup_epochs,
        "opt_lamb_learning_rate_hold_epochs": cfg.hold_epochs,
        "opt_lamb_learning_rate_decay_poly_power": cfg.lr_gamma,
        "opt_learning_rate_alt_warmup_func": True,  # optimizer.lr_at has this form and no other
        "opt_learning_rate_alt_decay_func": True,
        "opt_lamb_beta_1": cfg.beta1,
        "opt_lamb_beta_2": cfg.beta2,
        "opt_lamb_epsilon": cfg.eps,
        "opt_weight_decay": cfg.weight_decay,
        "opt_gradient_clip_norm": cfg.clip_norm,
        "model_eval_ema_factor": cfg.ema_decay,
        "model_weights_initialization_scale": model_cfg.weights_init_scale,
        "data_train_max_duration": features.max_utterance_s,
        "data_train_num_buckets": features.num_buckets,
        "data_speed_perturbaton_min": features.speed_min,  # MLPerf's spelling
        "data_speed_perturbaton_max": features.speed_max,
        "data_spec_augment_freq_n": features.freq_masks,
        "data_spec_augment_freq_min": 0,  # a mask may be empty
        "data_spec_augment_freq_max": features.freq_mask_max,
        "data_spec_augment_time_n": features.time_masks,
        "data_spec_augment_time_min": 0,
        "data_spec_augment_time_max": features.time_mask_max,
    }
    notes = {"model_eval_ema_factor": {"warm_up": "min(factor, (1 + step) / (10 + step))"}}
    if cfg.hold_share:  # the rate is held and falls in another way than MLPerf's
        held = {"not_in_force": f"held for {cfg.hold_share} of {cfg.epochs} epochs, then linear"}
        for name in ("lamb_learning_rate_hold_epochs", "lamb_learning_rate_decay_poly_power",
                     "learning_rate_alt_decay_func"):
            notes[f"opt_{name}"] = held
    if cfg.init:
        notes["model_weights_initialization_scale"] = {"not_in_force": f"weights of {cfg.init}"}
    for key, value in settings.items():
        log.mllog(key, value, **notes.get(key, {}))


# ---------------------------------------------------------------- console, records and bad signs


class Monitor:
    """Shows every step, epoch and evaluation of a run, and warns of bad signs.

    A warning is printed when its sign appears and not again while the sign stays.

    Args:
        epochs: the most that the run will take.
        log_every: steps between lines on the console; log.jsonl gets all.
    """

    PROJECTION_STEPS = 50  # the remaining time is projected after so many steps of one loss

    def __init__(self, log: Log, steps_per_epoch: int, epochs: int, log_every: int) -> None:
        self.log, self.steps_per_epoch, self.epochs = log, steps_per_epoch, epochs
        self.log_every = log_every
        self.begin_loss()
        self.signs: set[str] = set()  # the signs that were present when last checked
        self.grad_norms: deque[float] = deque(maxlen=100)  # of the last steps
        self.waits: deque[float] = deque(maxlen=100)  # for data, as shares of the last steps

    def begin_loss(self) -> None:
        """Forgets what later steps, which minimise another loss, cannot be compared with."""
        self.steps, self.seconds = 0, 0.0  # of this process
        self.epoch_loss = math.inf  # mean of the last epoch

    def step(self, batch: int, **record: Any) -> None:
        """Writes a step's record; `batch` counts the steps of the epoch."""
        self.log.write("step", **record)
        if batch % self.log_every == 1 or self.log_every == 1:
            parts = "".join(f"{part} loss {record[f'{part}_loss']:.2f} | "
                            for part in ("ctc", "char") if f"{part}_loss" in record)
            self.log.say(
                f"epoch {record['epoch']} | iter {batch}/{self.steps_per_epoch} | "
                f"loss {record['loss']:.2f} | {parts}utts/s {record['utts_per_s']:.1f} | "
                f"took {record['step_s']:.2f} s | lrate {record['lr']:.2e} | "
                f"grad norm {record['grad_norm']:.2f} | data wait {record['data_s']:.2f} s"
            )
        self.check_gradient(record["grad_norm"])
        self.check_waiting(record["data_s"] / record["step_s"])
        self.steps, self.seconds = self.steps + 1, self.seconds + record["step_s"]
        if self.steps == self.PROJECTION_STEPS:
            left = (self.epochs - record["epoch"] + 1) * self.steps_per_epoch - batch
            hours = self.seconds * left / self.steps / 3600
            self.log.say(f"projected: {hours:.2f} h for the rest of {self.epochs} epochs, if their "
                         "steps take as long")

    def epoch(self, best_wer: float, left_out: int, num_unaligned: int = 0, **record: Any) -> None:
        """Writes an epoch's record and compares its loss with that of the epoch before.

        Args:
            left_out: utterances that could not be read.
            num_unaligned: utterances without a CTC alignment of their pieces.
        """
        self.log.write("epoch", **record)
        self.log.say(f"epoch {record['epoch']} | avg train utts/s {record['utts_per_s']:.1f} | "
                     f"avg loss {record['loss']:.2f} | took {record['seconds']:.1f} s")
        if left_out:
            self.log.say(f"epoch {record['epoch']} | {left_out} bad utterances left out")
        if num_unaligned:
            self.log.say(f"epoch {record['epoch']} | {num_unaligned} utterances need more label "
                         "positions than the CTC head has: left out of its loss")
        self.check_loss(record["loss"], best_wer)

    def evaluation(self, is_warm: bool, search: str = "transducer", **record: Any) -> None:
        """Writes an evaluation's record; `is_warm` is true after the warm-up."""
        self.log.write("eval", search=search, **record)
        ctc = "ctc " if search == "ctc" else ""
        self.log.say(f"epoch {record['epoch']} | dev ema {ctc}wer {100 * record['wer']:.2f} % | "
                     f"cer {100 * record['cer']:.2f} % | "
                     f"{record['errors']:,} errors in {record['words']:,} words | "
                     f"rtf {record['rtf']:.4f} | took {record['seconds']:.1f} s")
        if is_warm:  # during the warm-up any WER is normal
            self.check_hypotheses(record["labels"], record["words"], record["wer"])

    def warn(self, sign: str, is_present: bool, message: str) -> None:
        if is_present and sign not in self.signs:
            self.log.warn(message)
        (self.signs.add if is_present else self.signs.discard)(sign)

    def check_gradient(self, grad_norm: float) -> None:
        """Warns of ten times the median norm; runs that ended well had at most four times."""
        usual = statistics.median(self.grad_norms) if len(self.grad_norms) >= 20 else math.inf
        self.grad_norms.append(grad_norm)
        self.warn("gradient", grad_norm > 10 * usual,
                  f"the gradient norm is {grad_norm:.1f} where {usual:.1f} was usual: if it "
                  "stays, look at --lr and --warmup-epochs, and at this step's recordings")

    def check_waiting(self, share: float) -> None:
        """Warns if the median share of waiting is above a third.

        A mean would count the first step of every epoch, which always waits.
        """
        self.waits.append(share)
        usual = statistics.median(self.waits) if len(self.waits) >= 20 else 0.0
        # The sign disappears at half of the share at which it appears, or it would flicker.
        self.warn("wait", usual > (1 / 6 if "wait" in self.signs else 1 / 3),
                  f"{100 * usual:.0f} % of a step goes by waiting for data: more --loader-workers "
                  "if there are cores, or a faster disk")

    def check_loss(self, loss: float, best_wer: float) -> None:
        """Warns of a rising loss, and of a flat one at a high WER; at a low one training may be
        over."""
        before, self.epoch_loss = self.epoch_loss, loss
        diverges = loss > 1.5 * before
        self.warn("diverges", diverges,
                  f"the loss rose from {before:.2f} to {loss:.2f} in an epoch: the run may "
                  "diverge; a lower --lr helps")
        self.warn("flat", not diverges and best_wer > 0.5 and loss > 0.99 * before,
                  f"the loss is flat, {loss:.2f} after {before:.2f} an epoch ago: look at --lr and "
                  "--warmup-epochs, then at the corpus (python -m tools.prepare check)")

    def check_hypotheses(self, labels: int, words: int, wer: float) -> None:
        """Warns of an evaluation with almost no labels, or as many errors as words."""
        is_blank = labels < words / 10
        self.warn("blank", is_blank,
                  f"(almost) all hypotheses are blank, {labels:,} symbols for {words:,} words: "
                  "usual for some epochs while the loss falls; if it does not, look at --lr and at "
                  "the transcripts")
        self.warn("wer", not is_blank and wer >= 1,
                  "WER is 100 % or more after the warm-up: usual for some epochs while the loss "
                  "falls; if it does not, look at --lr, --vocab-size and the transcripts")


# ----------------------------------------------------------------------------------------- profile

# Stage -> the profiler's names for it: operators, autograd nodes and record_function labels.
# WideLstm consists of operators that others use as well, and so counts as everything else.
STAGES = {
    "oneDNN LSTM": ("aten::lstm", "autograd::engine::evaluate_function: MkldnnRnnLayerBackward0"),
    "joint network": ("JointCosts", "autograd::engine::evaluate_function: JointCostsBackward"),
    "lattice of the loss": ("lattice",),
    "band of the lattice": ("ctc_band",),
    "optimiser": ("Optimizer.step#Lamb.step", "clip_gradients", "update_ema"),
    "waiting for data": ("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__",
                         "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
}
# All-reduces run on threads of their own, those of gradients during the backward pass.
ALL_REDUCES = ("gloo:all_reduce", "mpi:all_reduce", "oneccl_bindings_for_pytorch::allreduce")
PROFILE_SKIP, PROFILE_STEPS = 10, 5  # oneDNN builds its kernels in the first steps


def operator_seconds(result: profile, names: Iterable[str]) -> float:
    """Seconds spent in some operators, including the operators that they call."""
    total = {e.key: e.cpu_time_total / 1e6 for e in result.key_averages()}
    return sum(total.get(name, 0.0) for name in names)


def profile_parts(result: profile, seconds: float) -> dict[str, float]:
    """Stage -> seconds, in the thread that trains; the stages add up to `seconds`.

    Args:
        seconds: wall time of everything that was profiled.
    """
    parts = {stage: operator_seconds(result, names) for stage, names in STAGES.items()}
    parts["joint network"] -= parts["lattice of the loss"]  # JointCosts contains the lattice
    parts["everything else"] = seconds - sum(parts.values())
    return parts


def profile_steps(steps: Iterable, left: int, log: Log) -> Iterator:
    """Yields the `left` steps of an epoch, and profiles five of them with the waits for data."""
    steps = iter(steps)
    yield from islice(steps, min(PROFILE_SKIP, left - PROFILE_STEPS))
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as result:
        yield from islice(steps, PROFILE_STEPS)
        seconds = time.perf_counter() - started
    show_profile(result, seconds, log)
    yield from steps


def show_profile(result: profile, seconds: float, log: Log) -> None:
    """Prints operators by their own time and the share of every stage, and writes trace.json."""
    trace = log.out / "trace.json"
    result.export_chrome_trace(str(trace))
    log.say(result.key_averages().table(sort_by="self_cpu_time_total", row_limit=30,
                                        max_name_column_width=60))
    parts = profile_parts(result, seconds)
    shares = ", ".join(f"{stage} {100 * s / seconds:.1f} %" for stage, s in parts.items())
    travel = operator_seconds(result, ALL_REDUCES) / seconds
    log.say(f"profile: {PROFILE_STEPS} steps took {seconds:.3f} s: {shares}. The largest part "
            f"is {max(parts, key=parts.get)}. Communication was under way {100 * travel:.1f} % of "
            f"the time. {trace} is for ui.perfetto.dev.")
