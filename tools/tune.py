# SPDX-License-Identifier: Apache-2.0
"""Search hyper-parameters: each trial is one call of run.sh, judged by its time and its WER.

    python -m tools.tune --config docs/tune-demo.yaml  # CORPUS, RANKS ... as for run.sh
    python -m tools.tune --config FILE --out out/a --epochs 6  # other flags go to every trial

The file is that of Intel's e2eAIOK, explained in docs/tune-demo.yaml. The first trial takes
train.py's own values. --out gets study.db and a folder for every trial. The same command goes on
after a crash: a trial without a heartbeat for three minutes resumes from its checkpoint. Several
hosts with synchronised clocks may share one --out on a file system with locks, which SQLite needs;
hosts that finish at the same moment may exceed the budget by one trial each. Run one tuner a
machine, because time is measured.

TPE is Bergstra et al. (2011), the median rule of pruning Golovin et al. (2017), "Google Vizier".
"""

import argparse
import contextlib
import fcntl
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import matplotlib
import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import OptunaError, TrialPruned
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from checkpoint import load_checkpoint
from recipe import make_configs, parse_flags
from report import read_run, transducer_evals
from tools import launch
from train import EXIT_STATUS

REPO = Path(__file__).resolve().parent.parent
PATHS = ("data", "out", "resume", "restart")  # flags in which hosts may differ: places, begin
LOCAL = ("DATA", "VENV", "REQUIREMENTS", "SSH", "MASTER_ADDR", "MASTER_PORT")  # likewise
METRICS = ("training_time", "WER")
MIN_RIVALS = 3  # trials that must have reached an epoch before their median prunes
POLL_S = 5  # between two looks at a trial's log
HEARTBEAT_S = 15
GRACE_S = 180  # without a heartbeat; run.sh ends a killed tuner's trial within 120 s

# --------------------------------------------------------------------------------------- the file


CONVERT = {"double": float, "int": int, "categorical": str}
# The original's files describe the machine, too; here run.sh and the command line do.
MACHINE = ("save_path", "ppn", "train_batch_size", "eval_batch_size", "iface", "hosts")


class Entry(dict):
    """A mapping of the file; `lines` has the line of each key."""


class Loader(yaml.BaseLoader):
    """Keeps every value as the text in the file, because YAML takes 1e-3 for a string."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Entry:
        entry = Entry(super().construct_mapping(node, deep))
        entry.lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
        return entry


@contextlib.contextmanager
def errors_at(path: Path, line: int) -> Iterator[None]:
    """Errors in the block become ValueErrors that begin with file and line."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}:{line}: {error}") from None


def entries(path: Path, parent: Entry, key: str) -> list[tuple[object, int]]:
    """The entries of a list in the file, each with its line."""
    values, line = parent[key], parent.lines[key]
    with errors_at(path, line):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key}: {values}, expected a list with at least one entry")
    return [(value, min(getattr(value, "lines", {}).values(), default=line)) for value in values]


def mapping(value: object, required: Sequence[str], optional: Sequence[str] = ()) -> dict:
    """Returns `value` if it is a mapping with all required keys and no unknown ones."""
    if not isinstance(value, dict) or not set(required) <= value.keys() <= {*required, *optional}:
        also = f", perhaps {', '.join(optional)}" if optional else ""
        raise ValueError(f"{value}: expected a mapping with {', '.join(required)}{also}")
    return value


def choice(value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{value}: expected {' or '.join(choices)}")
    return value


def read_parameter(entry: object) -> tuple[str, BaseDistribution]:
    """Name of a flag and its distribution; train.py's parser checks the values later."""
    entry = mapping(entry, ("name", "type"), ("transformation", "bounds", "grid",
                                              "categorical_values"))
    name = "lr" if entry["name"] == "learning_rate" else str(entry["name"])
    kind = CONVERT[choice(entry["type"], tuple(CONVERT))]
    if name in PATHS:
        raise ValueError(f"{name} cannot be searched")
    given = entry.keys() - {"name", "type"}
    try:
        if given in ({"grid"}, {"categorical_values"}):
            values = entry.get("grid", entry.get("categorical_values"))
            if not isinstance(values, list):
                raise ValueError(f"{values}, expected a list")
            return name, CategoricalDistribution([kind(value) for value in values])
        if kind is str or given not in ({"bounds"}, {"bounds", "transformation"}):
            raise ValueError("expected bounds of numbers, perhaps with a transformation, or a list")
        is_log = "transformation" in given and choice(entry["transformation"], ("log",)) == "log"
        bounds = mapping(entry["bounds"], ("min", "max"))
        distribution = IntDistribution if kind is int else FloatDistribution
        return name, distribution(kind(bounds["min"]), kind(bounds["max"]), log=is_log)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def read_thresholds(path: Path, top: Entry) -> list[float]:
    """The largest feasible value of each of METRICS, or infinity."""
    thresholds: dict[str, float] = {}
    for entry, line in entries(path, top, "metrics"):
        with errors_at(path, line):
            metric = mapping(entry, ("name", "objective"), ("threshold",))
            name = choice(metric["name"], METRICS)
            choice(metric["objective"], ("minimize",))
            if name in thresholds:
                raise ValueError(f"{name} stands twice")
            thresholds[name] = float(metric.get("threshold", "inf"))
    with errors_at(path, top.lines["metrics"]):
        if len(thresholds) < len(METRICS):
            raise ValueError(f"metrics: expected both of {' and '.join(METRICS)}")
    return [thresholds[name] for name in METRICS]


class Search(NamedTuple):
    """The contents of the file."""

    name: str
    space: dict[str, BaseDistribution]  # by names of train.py's fields
    where: dict[str, str]  # file and line of each of these parameters
    thresholds: list[float]  # see read_thresholds
    budget: int  # trials


def read_search(path: Path) -> Search:
    """Reads the file; ValueError names the line and what is wrong in it."""
    try:
        with path.open("rb") as file:
            top = yaml.load(file, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    with errors_at(path, 1):
        mapping(top, ("model_parameter", "metrics", "observation_budget"), MACHINE)
    model = top["model_parameter"]
    with errors_at(path, top.lines["model_parameter"]):
        mapping(model, ("project", "experiment", "parameters"))
    space, where = {}, {}
    for entry, line in entries(path, model, "parameters"):
        with errors_at(path, line):
            name, distribution = read_parameter(entry)
            if name in space:
                raise ValueError(f"{name} stands twice")
        space[name], where[name] = distribution, f"{path}:{line}"
    thresholds = read_thresholds(path, top)
    with errors_at(path, top.lines["observation_budget"]):
        budget = int(top["observation_budget"])
        if budget < 1:
            raise ValueError(f"observation_budget: {budget}, expected at least 1")
    for key in (key for key in MACHINE if key in top):
        print(f"{path}:{top.lines[key]}: {key} has no effect: run.sh and flags of train.py "
              "decide it")
    return Search(f"{model['project']}/{model['experiment']}", space, where, thresholds, budget)


# ------------------------------------------------------------------------------------ the values


def flags(params: dict[str, object]) -> list[str]:
    """Arguments of train.py for the values of a trial; the file writes lists as words."""
    argv = []
    for name, value in params.items():
        flag, text = name.replace("_", "-"), str(value)
        if text.lower() in ("true", "false"):
            argv.append(f"--{flag}" if text.lower() == "true" else f"--no-{flag}")
        else:
            argv += [f"--{flag}", *(value if isinstance(value, tuple) else text.split())]
    return argv


read_origin = functools.cache(load_checkpoint)  # a search parses the flags of every trial


def parse(argv: Sequence[str]) -> dict:
    """Values of all fields for arguments of train.py; ValueError has its parser's message."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            given = parse_flags(argv)
            origin = read_origin(given["init"]) if "init" in given else None
            configs = make_configs(given, origin)
    except SystemExit:
        raise ValueError(output.getvalue().strip().splitlines()[-1]) from None
    return {name: value for config in configs for name, value in asdict(config).items()}


def refusal(argv: Sequence[str]) -> str:
    """The message with which train.py's parser refuses arguments, or ""."""
    try:
        parse(argv)
    except ValueError as error:
        return str(error)
    return ""


def check_values(search: Search, command: Sequence[str]) -> dict:
    """Asks run.sh for its launch command and train.py's parser about the values to be searched.

    A value may need another one: speed_max a smaller speed_min. So the first values of all
    parameters are tried together, then their second ones, and so on.

    Returns:
        The values of all fields without the search.
    Raises:
        ValueError: train.py's parser refuses values.
    """
    result = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, cwd=REPO, text=True,
                            capture_output=True, check=False)
    launched = re.search(r"^launch .* train\.py (.*)$", result.stdout, re.MULTILINE)
    if launched is None:
        raise ValueError(f"DRY_RUN=1 {shlex.join(command)} launches no train.py: {result.stderr}")
    argv = shlex.split(launched[1])
    defaults = parse(argv)
    ends = {name: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)
            for name, d in search.space.items()}
    for i in range(max(map(len, ends.values()))):
        tried = {name: values[min(i, len(values) - 1)] for name, values in ends.items()}
        if message := refusal([*argv, *flags(tried)]):
            lines = [search.where[name] for name, value in tried.items()
                     if refusal([*argv, *flags({name: value})])]
            raise ValueError(": ".join([*lines[:1], shlex.join(flags(tried)), message]))
    return defaults


def searched_default(distribution: BaseDistribution, default: object) -> object:
    """The value of the search that equals train.py's own, or None."""
    if not isinstance(distribution, CategoricalDistribution):
        return default if distribution.low <= default <= distribution.high else None
    return next((choice for choice in distribution.choices
                 if choice == default or flags({"": choice}) == flags({"": default})), None)


# -------------------------------------------------------------------------------------- one trial


class TrialFailed(Exception):
    """A trial ended without a result; it has a user attribute `reason`."""


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """Runs a command that gets SIGTERM when this block ends, and when this process is killed.

    run.sh then ends all ranks within two minutes.
    """
    on_parents_death = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    with log.open("ab") as output:
        process = subprocess.Popen([*on_parents_death, *command], cwd=REPO, stdout=output,
                                   stdin=subprocess.DEVNULL, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def read_evals(folder: Path) -> list[dict]:
    return transducer_evals(read_run(folder)[1]) if (folder / "log.jsonl").exists() else []


def prune_reason(study: optuna.Study, number: int, wers: dict[str, float]) -> str | None:
    """Why to stop trial `number` now: worse than the median of the others after as many epochs.

    Optuna's MedianPruner refuses studies of two objectives.
    """
    epoch = list(wers)[-1]
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    trials = [t for t in study.get_trials(deepcopy=False, states=states) if t.number != number]
    rivals = [t.user_attrs["wers"][epoch] for t in trials if epoch in t.user_attrs.get("wers", {})]
    if len(rivals) < MIN_RIVALS or wers[epoch] <= (median := statistics.median(rivals)):
        return None
    return f"WER {wers[epoch]:.3f} after epoch {epoch}, median of {len(rivals)} others {median:.3f}"


def run_trial(trial: Trial, epochs: int, command: Sequence[str], folder: Path) -> list[float]:
    """Runs the command to its end, or until the trial is hopeless before the last epoch.

    The trial gets the user attributes `wers` (epoch -> best so far, at most 1), `seconds` and,
    without a result, the `reason`.

    Returns:
        Seconds of steps and evaluations, and the best WER.
    """
    judged = len(read_evals(folder))  # a resumed trial is judged from its next evaluation on
    with started(command, folder / "run.log") as process:
        while process.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
            evals = read_evals(folder)
            if not evals:
                continue
            # A WER above 1 only says how many words an untrained model inserts.
            best = itertools.accumulate((min(1.0, e["wer"]) for e in evals), min)
            wers = {str(e["epoch"]): wer for e, wer in zip(evals, best, strict=True)}
            trial.set_user_attr("wers", wers)
            trial.set_user_attr("cer", min(evals, key=lambda e: e["wer"])["cer"])
            trial.set_user_attr("seconds", seconds := 3600 * evals[-1]["hours"])
            has_more = evals[-1]["epoch"] < epochs and process.returncode is None
            if has_more and len(evals) > judged:
                judged, reason = len(evals), prune_reason(trial.study, trial.number, wers)
                if reason is not None:
                    trial.set_user_attr("reason", f"{reason}; CER {trial.user_attrs['cer']:.3f}")
                    raise TrialPruned
    if process.returncode in (0, EXIT_STATUS["time limit"]) and evals:
        return [seconds, min(wers.values())]
    lines = (folder / "run.log").read_text(errors="replace").strip().splitlines()
    # Launchers print more after the message that matters.
    messages = [x for x in lines if x.startswith(("train.py: ", "run.sh: ", "tools.prepare: "))]
    message = (messages or lines or ["no message"])[-1]
    trial.set_user_attr("reason",
                        f"status {process.returncode}, {len(evals)} evaluations: {message}")
    raise TrialFailed


# -------------------------------------------------------------------------------------- the study


def folder_of(trial: Trial | FrozenTrial) -> str:
    """A retried trial inherits the attribute, and so the folder and the checkpoints."""
    return trial.user_attrs.get("folder", f"trial-{trial.number:04d}")


def open_study(out: Path, search: Search, defaults: dict, env: Sequence[str]) -> optuna.Study:
    """Opens or begins the study in `out`.

    Raises:
        ValueError: it was begun with another file, other flags or another environment.
    """
    space = {name: repr(distribution) for name, distribution in search.space.items()}
    fixed = {k: v for k, v in defaults.items() if k not in (*PATHS, *space)}
    fixed["env"] = [setting for setting in env if setting.split("=")[0] not in LOCAL]
    about = json.loads(json.dumps([search.name, space, search.thresholds, fixed]))
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{out / 'study.db'}", heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        engine_kwargs={"connect_args": {"timeout": 60}},  # s for another tuner's transaction
    )
    study = optuna.create_study(
        study_name="tune", storage=storage, load_if_exists=True,
        directions=["minimize"] * len(METRICS),
        sampler=optuna.samplers.TPESampler(n_startup_trials=4),
    )
    if study.user_attrs.get("about", about) != about:
        raise ValueError(f"{out} has a search of another name or with other parameters, "
                         "thresholds, flags of train.py or knobs of run.sh: take another --out")
    study.set_user_attr("about", about)
    if not study.trials:
        first = {name: searched_default(d, defaults[name]) for name, d in search.space.items()}
        study.enqueue_trial({name: v for name, v in first.items() if v is not None})
        for name in (name for name, value in first.items() if value is None):
            print(f"{name}: {defaults[name]}, which train.py would take, is not searched")
    return study


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> object:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    is_int = isinstance(distribution, IntDistribution)
    method = trial.suggest_int if is_int else trial.suggest_float
    return method(name, distribution.low, distribution.high, log=distribution.log)


def tune(study: optuna.Study, search: Search, out: Path, epochs: int,
         command: Sequence[str]) -> None:
    """Runs trials until the budget is spent, here and by other tuners."""

    def objective(trial: Trial) -> list[float]:
        params = {name: suggest(trial, name, d) for name, d in search.space.items()}
        folder, argv = out / folder_of(trial), [*command, *flags(params)]
        trial.set_user_attr("folder", folder.name)
        print(f"trial {trial.number} in {folder}: {shlex.join(flags(params))}", flush=True)
        folder.mkdir(exist_ok=True)
        try:
            values = run_trial(trial, int(params.get("epochs", epochs)),
                               [*argv, "--out", str(folder)], folder)
        except KeyboardInterrupt:  # Optuna retries trials of killed tuners only
            RetryHeartbeatStaleTrialCallback()(study, study.get_trials()[trial.number])
            raise
        for metric, value, threshold in zip(METRICS, values, search.thresholds, strict=True):
            if threshold < math.inf:
                trial.set_constraint(metric, value - threshold)  # feasible if not positive
        return values

    while True:
        optuna.storages.fail_stale_trials(study)
        trials = study.get_trials(deepcopy=False)
        states = {t.state for t in trials}
        begun = {folder_of(t) for t in trials if t.state != TrialState.WAITING}
        if TrialState.WAITING in states or len(begun) < search.budget:
            study.optimize(objective, n_trials=1, catch=TrialFailed)
        elif TrialState.RUNNING in states:
            time.sleep(POLL_S)  # another tuner may be killed and leave its trial to this one
        else:
            return


# ------------------------------------------------------------------------------------- the report


def is_feasible(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.COMPLETE and max(trial.constraints.values(), default=0) <= 0


def print_table(study: optuna.Study) -> None:
    rows = [["trial", "state", "seconds", "WER %", "CER %", "feasible", "values", "reason"]]
    for t in study.get_trials(deepcopy=False):
        wer = min(t.user_attrs.get("wers", {0: math.nan}).values())
        retried = "cut off; goes on under another number" if t.state == TrialState.FAIL else ""
        rows.append([str(t.number), t.state.name.lower(), f"{t.user_attrs.get('seconds', 0):.1f}",
                     f"{100 * wer:.2f}", f"{100 * t.user_attrs.get('cer', math.nan):.2f}",
                     "yes" if is_feasible(t) else "no",
                     shlex.join(flags(t.params)), t.user_attrs.get("reason", retried)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def print_importances(study: optuna.Study) -> None:
    for i, metric in enumerate(METRICS):
        try:
            shares = optuna.importance.get_param_importances(
                study, target=lambda trial, i=i: trial.values[i],
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=1))
            print(f"{metric}: share of variance (functional ANOVA):",
                  ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
        except (RuntimeError, ValueError) as error:  # too few trials, or equal ones
            print(f"{metric}: no importances: {error}")


def show_results(study: optuna.Study, out: Path, command: Sequence[str]) -> None:
    """Table, picture, importances and the best trial's command; ValueError if none is complete."""
    print_table(study)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        raise ValueError(f"no trial was completed, {out}/trial-*/run.log say why")
    matplotlib.use("Agg")
    ax = optuna.visualization.matplotlib.plot_pareto_front(
        study, target_names=["training time, s", "dev WER"]
    )
    for trial in complete:
        ax.annotate(str(trial.number), trial.values, xytext=(4, 4), textcoords="offset points")
    ax.figure.savefig(out / "pareto.png", dpi=120, bbox_inches="tight")
    print(f"wrote {out}/pareto.png")
    print_importances(study)
    feasible = [t for t in complete if is_feasible(t)]
    if not feasible:
        print("no trial meets all thresholds; the following one has the lowest WER")
    best = min(feasible or complete, key=lambda t: t.values[::-1])
    seconds, wer = best.values
    print(f"best: trial {best.number}, WER {100 * wer:.2f} %, CER "
          f"{100 * best.user_attrs.get('cer', math.nan):.2f} % after {seconds:.0f} s")
    print(shlex.join([*command, *flags(best.params), "--out", str(out / "best")]))


def knobs_in_use() -> list[str]:
    """NAME=VALUE of run.sh's knobs in the environment: the command of a trial repeats them."""
    knobs = re.findall(r"^([A-Z]+)=\$\{\1:-", (REPO / "run.sh").read_text(), re.MULTILINE)
    return [f"{name}={os.environ[name]}" for name in (*knobs, *launch.VARIABLES)
            if name in os.environ and name not in ("OUT", "DRY_RUN")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="what to search")
    parser.add_argument("--out", type=Path, default=Path("out/tune"), help="study and trials")
    parser.add_argument("--run", default="bash run.sh", metavar="COMMAND",
                        help="what runs a trial, given flags of train.py")
    args, argv = parser.parse_known_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    out, env = args.out.resolve(), knobs_in_use()
    command = [*(["env", *env] if env else []), *shlex.split(args.run), *argv]
    try:
        search = read_search(args.config)
        defaults = check_values(search, command)
        out.mkdir(parents=True, exist_ok=True)
        with (out / "study.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one tuner creates the tables and the first trial
            study = open_study(out, search, defaults, env)
        tune(study, search, out, defaults["epochs"], command)
        show_results(study, out, command)
    except BrokenPipeError:
        raise  # tools/__init__.py ends the process
    except (OSError, ValueError) as error:
        sys.exit(f"tune.py: {error}")
    except (OptunaError, SQLAlchemyError) as error:
        sys.exit(f"tune.py: {out}/study.db: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        print("tune.py: interrupted; the same command goes on", file=sys.stderr)
        raise


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
