# SPDX-License-Identifier: Apache-2.0
"""What a training run shows of itself: console, logs, curves, warnings, profile.

train.py calls everything here; bench.py compares runs with `read_run` and `draw_curves`. Knows of
no model, configuration or group of ranks: only rank 0 shows anything.
"""

import json
import math
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ curves


def read_run(out: Path) -> tuple[list[dict], list[dict]]:
    """Steps and evaluations of a log.jsonl, each with its epochs and hours since the start.

    Hours are those spent in steps and evaluations. An evaluation has its epoch's mean loss and
    utterances/s, which are not a number if the log begins after that epoch.
    """
    steps, evals, seconds, done = [], [], 0.0, set()
    for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut off in the middle when the run was killed
            continue
        seconds += record.get("step_s", 0.0) + (record["seconds"] if "wer" in record else 0.0)
        record["hours"] = seconds / 3600
        if record["event"] in ("step", "eval"):
            (steps if record["event"] == "step" else evals).append(record)
        if record["event"] == "epoch":
            done.add(record["epoch"])
    epochs = defaultdict(list)
    for record in steps:
        epochs[record["epoch"]].append(record)
    longest = max(map(len, epochs.values()), default=1)
    for epoch, own in epochs.items():  # other ranks or batches after a restart: other lengths
        size = len(own) if epoch in done else longest
        for i, record in enumerate(own, 1):
            record["epochs"] = epoch - 1 + i / size
    for record in evals:
        own = epochs[record["epoch"]]
        record["epochs"] = own[-1]["epochs"] if own else record["epoch"]
        spent_s = sum(r["step_s"] for r in own) or math.nan
        record["utts_per_s"] = sum(r["utts_per_s"] * r["step_s"] for r in own) / spent_s
        record["loss"] = statistics.fmean(r["loss"] for r in own) if own else math.nan
    return steps, evals


def draw_curves(runs: dict[str, tuple[list[dict], list[dict]]], png: Path) -> None:
    """Loss, dev WER, learning rate and speed of some runs, against epochs and against hours."""
    figure = Figure(figsize=(9, 9), dpi=100)
    axes = figure.subplots(4, 2, sharex="col", sharey="row")
    # A layout engine would draw everything twice, and this runs in every epoch.
    figure.subplots_adjust(0.1, 0.05, 0.985, 0.985, wspace=0.04, hspace=0.08)
    panels = {"loss": "training loss, nats", "wer": "dev WER, %", "lr": "learning rate",
              "utts_per_s": "utterances/s"}
    for name, (steps, evals) in runs.items():
        size = -(-len(steps) // 100) or 1  # a hundred means can be read, all steps cannot
        parts = [steps[i : i + size] for i in range(0, len(steps), size)]
        scores = [r | {"wer": min(100.0, 100 * r["wer"])} for r in evals]
        for row, key in zip(axes, panels, strict=True):
            groups, marker = ([[r] for r in scores], ".") if key == "wer" else (parts, "")
            for ax, x in zip(row, ("epochs", "hours"), strict=True):
                xs, ys = ([statistics.fmean(r[k] for r in g) for g in groups] for k in (x, key))
                ax.plot(xs, ys, marker=marker, linewidth=1, label=name)
    for row, label in zip(axes, panels.values(), strict=True):
        row[0].set(ylabel=label, ylim=(0, None))
        for ax in row:
            ax.locator_params(nbins=4)  # ticks are what takes the time
            ax.grid(alpha=0.3)
    for ax, label in zip(axes[-1], ("epochs", "hours"), strict=True):
        ax.set(xlabel=label, xlim=(0, None))
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 1].legend(loc="upper right")
    figure.savefig(png)


# --------------------------------------------------------------------------------- console and logs


def hide_bar(rank: int) -> bool | None:
    """tqdm's `disable`: one progress bar, on rank 0, and None lets tqdm look for a terminal."""
    return None if rank == 0 else True


def summary_writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard: pip install tensorboard") from error
    return SummaryWriter


class Log:
    """Console, log.jsonl, mllog.log, curves.png and TensorBoard's files, on rank 0 only."""

    def __init__(self, out: Path, rank: int, tensorboard: bool = False) -> None:
        self.out = out if rank == 0 else None
        self.open_board = summary_writer() if tensorboard and rank == 0 else None
        self.board = None
        self.signs: set[str] = set()  # bad ones that were there when last looked

    def append(self, name: str, line: str) -> None:
        path = self.out / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:  # of writing, it does not name the file
            raise type(error)(f"{path} could not be written: {error.strerror}") from error

    def write(self, event: str, **values: object) -> None:
        """A line of log.jsonl, and its fractions for TensorBoard."""
        if self.out is None:
            return
        self.append("log.jsonl", json.dumps({"event": event, **values}))
        if self.open_board is not None:
            # What a run that was killed wrote after its last checkpoint comes again.
            self.board = self.board or self.open_board(self.out, purge_step=values["step"])
            for key, value in values.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{key}", value, values["step"])
            if event != "step":
                self.board.flush()

    def mllog(self, key: str, value: object = None, at_s: float | None = None,
              **metadata: object) -> None:
        """An event in the form of the package mlperf_logging, with the line of the caller.

        Args:
            at_s: when it happened, if not now, in seconds of time.time().
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
        self.append("mllog.log", f":::MLLOG {json.dumps(event)}")

    def say(self, line: str) -> None:
        if self.out is not None:
            tqdm.write(line)  # above the progress bar, if there is one
            sys.stdout.flush()

    def warn(self, sign: str, present: bool, line: str) -> None:
        """Says so when a bad sign appears, not again as long as it stays."""
        if present and sign not in self.signs:
            self.say(f"warning: {line}")
        (self.signs.add if present else self.signs.discard)(sign)

    def draw(self) -> None:
        if self.out is not None:
            draw_curves({self.out.name: read_run(self.out)}, self.out / "curves.png")

    def rewind(self, step: int, evaluated: int) -> None:
        """Removes from log.jsonl what comes again when a run goes on from a checkpoint.

        Args:
            step: the last one before the checkpoint.
            evaluated: the step of its last evaluation.
        """
        path = None if self.out is None else self.out / "log.jsonl"
        if path is None or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # cut off in the middle when the run was killed
                continue
            if record["step"] <= (evaluated if record["event"] == "eval" else step):
                kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


# ---------------------------------------------------------------------------------------- warnings


def warn_of_epoch(log: Log, loss: float, previous_loss: float, best_wer: float) -> None:
    """Means of an epoch and of the one before, infinite if there is none."""
    # At a low WER a flat loss is the end that every training comes to.
    log.warn("flat", best_wer > 0.5 and loss > 0.99 * previous_loss,
             f"the loss is flat, {loss:.2f} after {previous_loss:.2f} an epoch ago: look at --lr "
             "and --warmup-epochs, then at the corpus (python -m tools.prepare check)")


def warn_of_evaluation(log: Log, result: dict, is_warm: bool) -> None:
    """Before the end of the warm-up a transducer may be as bad as it likes."""
    blank = is_warm and result["labels"] < result["words"] / 10
    log.warn("blank", blank,
             f"(almost) all hypotheses are blank, {result['labels']:,} symbols for "
             f"{result['words']:,} words: usual for some epochs while the loss falls; if it does "
             "not, look at --lr and at the transcripts")
    log.warn("wer", is_warm and not blank and result["wer"] >= 1,
             "WER is 100 % or more after the warm-up: usual for some epochs while the loss falls; "
             "if it does not, look at --lr, --vocab-size and the transcripts")


def warn_of_waiting(log: Log, waits: Sequence[float]) -> None:
    """From the shares of the last hundred steps that went by waiting for data. The median: the
    first step of an epoch always waits."""
    usual = statistics.median(waits) if len(waits) >= 20 else 0.0
    # Shares near a third would come and go: the sign stays until it is half of that.
    log.warn("wait", usual > (1 / 6 if "wait" in log.signs else 1 / 3),
             f"{100 * usual:.0f} % of a step goes by waiting for data: more --loader-workers if "
             "there are cores, or a faster disk")


def warn_of_gradient(log: Log, grad_norm: float, norms: Sequence[float]) -> None:
    """Steps of runs that went well had at most 4 times the median of the hundred before."""
    usual = statistics.median(norms) if len(norms) >= 20 else math.inf
    log.warn("gradient", grad_norm > 10 * usual,
             f"the gradient norm is {grad_norm:.1f} where {usual:.1f} was usual: if it stays, look "
             "at --lr and --warmup-epochs, and at this step's recordings")


# ----------------------------------------------------------------------------------------- profile

# Part of a step -> the profiler's names for it: operators, autograd nodes, our record_function.
# WideLstm is made of operators that others use as well, and so in everything else.
PROFILE_PARTS = {
    "oneDNN LSTM": ("aten::lstm", "autograd::engine::evaluate_function: MkldnnRnnLayerBackward0"),
    "joint network and loss": ("JointCosts",
                               "autograd::engine::evaluate_function: JointCostsBackward"),
    "optimiser": ("Optimizer.step#Lamb.step", "clip_gradients", "update_ema"),
    "waiting for data": ("enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__",
                         "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
}
# These run on threads of their own, gradients' behind the backward pass.
PROFILE_ALL_REDUCES = ("gloo:all_reduce", "mpi:all_reduce",
                       "oneccl_bindings_for_pytorch::allreduce")
PROFILE_SKIP, PROFILE_STEPS = 10, 5  # first steps build oneDNN's kernels


def profiled(batches: Iterable, left: int, log: Log) -> Iterator:
    """Hands on the batches of `left` steps, profiling five steps and the waits before them.

    At least one step comes after them, or the caller might not ask for another batch.
    """
    batches = iter(batches)
    yield from islice(batches, min(PROFILE_SKIP, left - PROFILE_STEPS - 1))
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as result:
        yield from islice(batches, PROFILE_STEPS)
        seconds = time.perf_counter() - started
    report_profile(result, seconds, log)
    yield from batches


def report_profile(result: profile, seconds: float, log: Log) -> None:
    """Operators by their own time, what they are parts of, and trace.json."""
    trace = log.out / "trace.json"
    result.export_chrome_trace(str(trace))
    operators = result.key_averages()
    log.say(operators.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60))
    total = {e.key: e.cpu_time_total / 1e6 for e in operators}
    parts = {part: sum(total.get(name, 0.0) for name in names)
             for part, names in PROFILE_PARTS.items()}
    lattice = total.get("lattice", 0.0)
    parts["joint network"] = parts.pop("joint network and loss") - lattice
    parts["lattice of the loss"] = lattice
    parts["everything else"] = seconds - sum(parts.values())
    shares = ", ".join(f"{part} {100 * s / seconds:.1f} %" for part, s in parts.items())
    travel = sum(total.get(name, 0.0) for name in PROFILE_ALL_REDUCES) / seconds
    log.say(f"profile: {PROFILE_STEPS} steps took {seconds:.3f} s: {shares}. The largest part "
            f"is {max(parts, key=parts.get)}. Communication was under way {100 * travel:.1f} % of "
            f"the time. {trace} is for ui.perfetto.dev.")
