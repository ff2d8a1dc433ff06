# SPDX-License-Identifier: Apache-2.0
"""Search hyper-parameters: each trial is one call of run.sh, judged by its time and its WER.

    python -m tools.tune --config tune.yaml  # CORPUS, RANKS ... as for run.sh
    python -m tools.tune --config tune.yaml --out out/a --epochs 6  # other words go to every trial

The file is that of Intel's e2eAIOK; names are fields of train.py's configs (or learning_rate):

    model_parameter:
      project: sda
      experiment: rnnt
      parameters:
      - {name: learning_rate, transformation: log, type: double, bounds: {min: 1e-3, max: 1e-2}}
      - {name: warmup_epochs, type: int, bounds: {min: 1, max: 10}}
      - {name: stack, type: int, grid: [4, 6, 8]}
      - {name: precision, type: categorical, categorical_values: [auto, fp32]}
    metrics:                                                           # threshold is optional
    - {name: training_time, objective: minimize, threshold: 43200}     # s of steps and evaluations
    - {name: WER, objective: minimize, threshold: 0.25}                # best of the run
    observation_budget: 10                                             # trials; failed ones count

The first trial takes the values that train.py would take anyway. --out gets study.db and a folder
for every trial. The same command goes on after a crash: trials that were cut off resume from their
checkpoints. Several hosts share the trials of one --out, on a file system with locks, which SQLite
needs anyway. One tuner a machine: time is measured.

TPE is Bergstra et al. (2011), the median rule of pruning Golovin et al. (2017), "Google Vizier".
"""

import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import matplotlib
import optuna
import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

import train

REPO = Path(__file__).resolve().parent.parent
CONFIGS = (train.TrainConfig, train.ModelConfig, train.FeatureConfig)
FIELDS = {f.name: f.type for config in CONFIGS for f in fields(config)}
PLACES = ("data", "out", "resume", "restart")  # say where, and may differ between hosts
LOCAL = ("DATA", "VENV", "REQUIREMENTS", "SSH", "CGROUPS", "MASTER_ADDR", "MASTER_PORT")  # likewise
METRICS = ("training_time", "WER")
RIVALS = 3  # trials that must have come as far before their median prunes
POLL_S = 0.5

# --------------------------------------------------------------------------------------- the file


def wrong(node: yaml.Node, message: str) -> ValueError:
    return ValueError(f"{node.start_mark.name}:{node.start_mark.line + 1}: {message}")


def read(node: yaml.Node, shape: dict | list | Callable | None) -> Any:  # noqa: ANN401
    """Value of a node of the given shape; ValueError names the line where it is another.

    A shape is a dict (keys with a ? may be missing), a list of one shape (not empty), a function
    from text, or None for the node itself. Functions see the text as it stands: YAML would take
    1e-3 for a word.
    """
    if isinstance(shape, dict) and isinstance(node, yaml.MappingNode):
        shapes, found = {key.rstrip("?"): value for key, value in shape.items()}, {}
        for key, value in node.value:
            name = str(key.value)
            if name not in shapes or name in found:
                raise wrong(key, f"{name}: unknown or twice, expected {', '.join(shapes)}")
            found[name] = read(value, shapes[name])
        for name in shape:
            if not name.endswith("?") and name not in found:
                raise wrong(node, f"{name} is missing")
        return found
    if isinstance(shape, list) and isinstance(node, yaml.SequenceNode) and node.value:
        return [read(item, shape[0]) for item in node.value]
    if shape is None:
        return node
    with contextlib.suppress(KeyError, ValueError):
        if callable(shape) and isinstance(node, yaml.ScalarNode):
            return shape(node.value)
    wanted = {dict: "a mapping", list: "a list with something in it"}.get(type(shape))
    found = {"mapping": "a mapping", "sequence": "a list"}.get(node.id, repr(node.value))
    raise wrong(node, f"expected {wanted or shape.__name__}, not {found}")


def one_of(*choices: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        return choices[choices.index(text)]

    convert.__name__ = " or ".join(choices)
    return convert


def number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


def boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


PARAMETER = {
    "name": None, "type": None, "transformation?": None,
    "bounds?": {"min": None, "max": None}, "grid?": [None], "categorical_values?": [None],
}
# What the original's files say about the machine; here run.sh and the command line say it.
MACHINE = ("save_path", "ppn", "train_batch_size", "eval_batch_size", "iface", "hosts")
FILE = {
    "model_parameter": {"project": str, "experiment": str, "parameters": [None]},
    "metrics": [{"name": None, "objective": one_of("minimize"), "threshold?": number}],
    "observation_budget": None,
} | {f"{key}?": None for key in MACHINE}


def read_parameter(node: yaml.Node) -> tuple[str, BaseDistribution]:
    entry = read(node, PARAMETER)
    name = read(entry["name"], str)
    name = {"learning_rate": "lr"}.get(name, name)
    if name not in FIELDS or name in PLACES:
        raise wrong(entry["name"], f"{name} is no field of train.py's configs to be searched")
    own = {bool: boolean, int: int, float: number}.get(FIELDS[name], str)
    kinds = {"double": number, "int": int, "categorical": own}
    form = read(entry["type"], one_of(*kinds))
    # A float may be searched in whole numbers, as warmup_epochs is in the original's file.
    if kinds[form] is not own and (form, own) != ("int", number):
        raise wrong(entry["type"], f"{name} is {own.__name__}, not {form}")
    values = "categorical_values" if form == "categorical" else "grid"
    log = "transformation" in entry and bool(read(entry["transformation"], one_of("log")))
    if log and "bounds" not in entry:
        raise wrong(entry["transformation"], f"{name}: log is for values between bounds")
    ranges = entry.keys() & {"bounds", "grid", "categorical_values"}
    if ranges == {values}:
        choices = [read(value, kinds[form]) for value in entry[values]]
        if len(set(choices)) < len(choices):
            raise wrong(entry[values][0], f"{name}: a value stands twice")
        return name, CategoricalDistribution(choices)
    if ranges != {"bounds"} or form == "categorical":
        raise wrong(node, f"{name}: expected {values}{' or bounds' * (values == 'grid')} alone")
    low, high = (read(entry["bounds"][key], kinds[form]) for key in ("min", "max"))
    if low >= high or (log and low <= 0):
        raise wrong(entry["bounds"]["min"], f"{name}: min {low}, max {high}, expected "
                    f"{'0 < ' * log}min < max")
    distribution = IntDistribution if form == "int" else FloatDistribution
    return name, distribution(low, high, log=log)


def read_thresholds(metrics: list[dict]) -> list[float]:
    thresholds: dict[str, float] = {}
    for metric in metrics:
        name = read(metric["name"], one_of(*METRICS))
        if name in thresholds:
            raise wrong(metric["name"], f"{name} stands twice")
        thresholds[name] = metric.get("threshold", math.inf)
    if len(thresholds) < len(METRICS):
        raise wrong(metric["name"], f"expected {' and '.join(METRICS)}, not one alone")
    return [thresholds[name] for name in METRICS]


class Search(NamedTuple):
    """What the file asks for."""

    name: str
    space: dict[str, BaseDistribution]  # of fields of train.py's configs
    nodes: dict[str, yaml.Node]  # where the file says so
    thresholds: list[float]  # largest feasible value of each of METRICS, or infinity
    budget: int  # trials


def compose(path: Path) -> yaml.Node:
    try:
        with path.open("rb") as file:
            root = yaml.compose(file)
    except yaml.reader.ReaderError as error:
        text = path.read_bytes()
        if error.encoding == "unicode":  # the position counts characters, not bytes
            text = text.decode()[: error.position].encode()
        line = text[: error.position].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: {error.reason}") from None
    except yaml.YAMLError as error:  # names the line by itself
        raise ValueError(f"{path}: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: lists or mappings too deep inside each other") from None
    if root is None:
        raise ValueError(f"{path}:1: nothing in it")
    return root


def read_search(path: Path) -> Search:
    top = read(compose(path), FILE)
    for key in MACHINE:
        if key in top:
            print(wrong(top[key], f"{key} has no effect: run.sh and words for train.py decide it"))
    model, space, nodes = top["model_parameter"], {}, {}
    for node in model["parameters"]:
        name, distribution = read_parameter(node)
        if name in space:
            raise wrong(node, f"{name} stands twice")
        space[name], nodes[name] = distribution, node
    budget = read(top["observation_budget"], int)
    if budget < 1:
        raise wrong(top["observation_budget"], f"{budget}, expected at least 1")
    name = f"{model['project']}/{model['experiment']}"
    return Search(name, space, nodes, read_thresholds(top["metrics"]), budget)


def flags(params: dict[str, bool | float | str]) -> list[str]:
    """The words for train.py that set the parameters of a trial."""
    words = []
    for name, value in params.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:  # train_splits may be several
            words += [f"--{flag}", *(value.split() if name == "train_splits" else [str(value)])]
    return words


def parse(words: Sequence[str]) -> dict:
    """Words for train.py -> values of all fields. Raises ValueError with train.py's complaint."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            configs = train.parse_configs(words)
    except SystemExit:
        raise ValueError(complaint.getvalue().strip().splitlines()[-1]) from None
    return {name: value for config in configs for name, value in asdict(config).items()}


def complaint_of(words: Sequence[str]) -> str | None:
    try:
        parse(words)
    except ValueError as error:
        return str(error)
    return None


def check_values(search: Search, command: Sequence[str]) -> dict:
    """Asks run.sh what it would launch, and train.py whether it would take what is searched.

    Returns the values of all fields that are not searched, or would be if nothing were.
    """
    result = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, cwd=REPO, text=True,
                            capture_output=True, check=False)
    launch = re.search(r"^launch .* train\.py (.*)$", result.stdout, re.MULTILINE)
    if launch is None:
        raise ValueError(f"DRY_RUN=1 {shlex.join(command)} launches no train.py: {result.stderr}")
    words = shlex.split(launch[1])
    ends = {name: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high)
            for name, d in search.space.items()}
    # One value may ask for another: speed_max for a smaller speed_min.
    around = ({}, {n: v[0] for n, v in ends.items()}, {n: v[-1] for n, v in ends.items()})
    for name, values in ends.items():
        for value in values:
            complaints = [complaint_of([*words, *flags(rest | {name: value})]) for rest in around]
            if all(complaints):
                raise wrong(search.nodes[name], complaints[0])
    return parse(words)


# -------------------------------------------------------------------------------------- one trial

# Ends process group $1 when its own standard input closes without a word, as it also does when the
# tuner is killed: nothing else would end the ranks of a trial then. run.sh gives them two minutes.
GUARD = """read -r ended && exit
kill -TERM -- "-$1"
for _ in {1..1500}; do kill -0 -- "-$1" || exit 0; sleep 0.1; done
kill -KILL -- "-$1"
"""


def follow(path: Path, process: subprocess.Popen) -> Iterator[dict]:
    """Records of a log.jsonl, from its start, as they are written, until the process has ended."""
    position, ended = 0, False
    while not ended:
        ended = process.poll() is not None
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            for line in file:
                if line.endswith(b"\n"):  # else it is still being written
                    position += len(line)
                    # A killed run may leave half a line, which the next one then continues.
                    with contextlib.suppress(json.JSONDecodeError):
                        yield json.loads(line)
        time.sleep(0 if ended else POLL_S)


def hopeless(study: optuna.Study, number: int, wers: dict[str, float]) -> str | None:
    """Why to stop trial `number` now: worse than the median of the others after as many epochs."""
    epoch = list(wers)[-1]
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    trials = [t for t in study.get_trials(deepcopy=False, states=states) if t.number != number]
    rivals = [t.user_attrs["wers"][epoch] for t in trials if epoch in t.user_attrs.get("wers", {})]
    if len(rivals) < RIVALS or wers[epoch] <= (median := statistics.median(rivals)):
        return None
    return f"WER {wers[epoch]:.3f} after epoch {epoch}, median of {len(rivals)} others {median:.3f}"


def run_trial(study: optuna.Study, trial: Trial, epochs: int, command: Sequence[str],
              lock: IO) -> TrialState:
    """Runs the command to its end, or until it is hopeless before the last epoch.

    The trial gets `wers` (epoch -> best so far, at most 1), `clock` (epoch -> seconds by its end),
    `seconds` and, if it is not complete, the `reason`. Whoever has the lock open holds it: the
    trial and its guard, even if the tuner is gone.
    """
    folder, wers, clock, spent = Path(lock.name).parent, {}, {}, {}
    log = folder / "log.jsonl"
    known = log.read_text().count('"event": "eval"') if log.exists() else 0  # was it cut off?
    started = {"start_new_session": True, "pass_fds": [lock.fileno()]}
    with (folder / "run.log").open("ab") as output:
        process = subprocess.Popen(command, cwd=REPO, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=output, **started)
    guard = subprocess.Popen(["bash", "-c", GUARD, "guard", str(process.pid)], bufsize=0,
                             stdin=subprocess.PIPE, stderr=subprocess.DEVNULL,
                             **started)
    try:
        for record in follow(log, process):
            if record["event"] == "step":  # one that is done again after a crash counts once
                spent["step", record["step"]] = record["step_s"]
            if record["event"] == "eval":
                spent["eval", record["epoch"]] = record["seconds"]
                # Above 1 all are equal: how much an untrained model babbles says nothing.
                wers[str(record["epoch"])] = min([1.0, record["wer"], *wers.values()])
                clock[str(record["epoch"])] = sum(spent.values())
                trial.set_user_attr("wers", wers)
                trial.set_user_attr("clock", clock)
                trial.set_user_attr("seconds", sum(spent.values()))
                reason = None
                if len(wers) > known and record["epoch"] < epochs:
                    reason = hopeless(study, trial.number, wers)
                if reason is not None and process.poll() is None:
                    trial.set_user_attr("reason", reason)
                    return TrialState.PRUNED
        guard.stdin.write(b"ended\n")
    finally:
        guard.stdin.close()
        status = process.wait()
        guard.wait()
    if status in (0, train.EXIT_STATUS["time limit"]) and wers:
        return TrialState.COMPLETE
    lines = (folder / "run.log").read_text(errors="replace").strip().splitlines()
    # Launchers add theirs.
    ours = [x for x in lines if x.startswith(("train.py: ", "run.sh: ", "prepare.py: "))]
    said = (ours or lines or ["nothing said"])[-1]
    trial.set_user_attr("reason", f"status {status}, {len(wers)} evaluations: {said}")
    return TrialState.FAIL


# -------------------------------------------------------------------------------------- the study


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[IO | None]:
    """The open file, locked; None if others have it locked and `wait` is false.

    The system takes a lock back when the last process that has the file open is gone, however it
    ended: no heartbeats, no clocks to agree on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file


def folder_of(trial: Trial | FrozenTrial) -> str:
    """Its own, or that of the trial that was cut off and that it continues."""
    return trial.user_attrs.get("folder", f"trial-{trial.number:04d}")


def plain(value: object) -> object:
    """As the file has it: splits, a list in the configs, are words there."""
    return " ".join(value) if isinstance(value, (list, tuple)) else value


def contains(distribution: BaseDistribution, value: object) -> bool:
    try:
        optuna.create_trial(value=0, params={"x": value}, distributions={"x": distribution})
    except ValueError:
        return False
    return True


def enqueue(study: optuna.Study, params: dict, distributions: dict, **attrs: str) -> None:
    """A trial that takes these values; those of other parameters are still to be chosen."""
    study.add_trial(
        optuna.create_trial(state=TrialState.WAITING, params=params, distributions=distributions,
                            user_attrs=attrs)
    )


def open_study(out: Path, search: Search, defaults: dict, env: Sequence[str]) -> optuna.Study:
    """Raises ValueError if the study in `out` was begun with another file, words or environment."""
    asked = {name: repr(distribution) for name, distribution in search.space.items()}
    fixed = {k: v for k, v in defaults.items() if k not in (*PLACES, *asked)}
    fixed["env"] = [setting for setting in env if setting.split("=")[0] not in LOCAL]
    about = json.loads(json.dumps([asked, search.thresholds, fixed]))
    # SQLite waits for other tuners' transactions: 60 s instead of 5.
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{out / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
    )
    refusal = ValueError(f"{out} has a search of another name or with other parameters, "
                         "thresholds, words for train.py or knobs of run.sh: take another "
                         "--out")
    if set(optuna.get_all_study_names(storage)) - {search.name}:
        raise refusal
    study = optuna.create_study(
        study_name=search.name, storage=storage, load_if_exists=True,
        directions=["minimize"] * len(METRICS),
        sampler=optuna.samplers.TPESampler(n_startup_trials=4),
    )
    if study.user_attrs.get("about", about) != about:
        raise refusal
    study.set_user_attr("about", about)
    if not study.trials:
        usual = {name: d for name, d in search.space.items() if contains(d, plain(defaults[name]))}
        enqueue(study, {name: plain(defaults[name]) for name in usual}, usual)
        for name in search.space.keys() - usual:
            print(f"{name}: {plain(defaults[name])}, which train.py would take, is not searched; "
                  "the first trial takes another value")
    return study


def next_trial(study: optuna.Study, out: Path, search: Search) -> Trial | None:
    """None if all that the budget allows have begun. Puts what was cut off into the queue first."""
    for old in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        with locked(out / folder_of(old) / "lock", wait=False) as lock:
            if lock is not None:
                study.tell(old.number, state=TrialState.FAIL)
                enqueue(study, old.params, old.distributions, folder=folder_of(old))
    trials = study.get_trials(deepcopy=False)
    begun = {folder_of(t) for t in trials if t.state != TrialState.WAITING}
    if len(begun) >= search.budget and all(t.state != TrialState.WAITING for t in trials):
        return None
    return study.ask(search.space)


def tune(study: optuna.Study, search: Search, out: Path, epochs: int,
         command: Sequence[str]) -> None:
    """Runs trials until the budget is spent, here and elsewhere."""
    while True:
        with contextlib.ExitStack() as stack:
            with locked(out / "study.lock"):
                trial = next_trial(study, out, search)
                if trial is not None:
                    folder = out / folder_of(trial)
                    lock = stack.enter_context(locked(folder / "lock"))
            if trial is None:
                if not study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    return
                time.sleep(POLL_S)  # others still run some; they may be killed and leave them to us
                continue
            words = flags(trial.params)
            print(f"trial {trial.number} in {folder}: {shlex.join(words)}", flush=True)
            trial.set_user_attr("command", [*command, *words])
            state = run_trial(study, trial, trial.params.get("epochs", epochs),
                              [*command, *words, "--out", str(folder)], lock)
            if state != TrialState.COMPLETE:
                study.tell(trial, state=state)
                continue
            values = [trial.user_attrs["seconds"], min(trial.user_attrs["wers"].values())]
            for metric, value, most in zip(METRICS, values, search.thresholds, strict=True):
                if most < math.inf:
                    trial.set_constraint(metric, value - most)
            study.tell(trial, values)


# ------------------------------------------------------------------------------------- the report


def print_table(study: optuna.Study, search: Search) -> None:
    names = list(search.space)
    rows = [["trial", "state", "seconds", "WER %", "feasible", *names, "reason"]]
    for t in study.get_trials(deepcopy=False):
        attrs = t.user_attrs
        yes = t.state == TrialState.COMPLETE and max(t.constraints.values(), default=0) <= 0
        values = [f"{x:.4g}" if isinstance(x := t.params.get(name), float) else str(x)
                  for name in names]
        cut_off = "cut off; went on under another number" if t.state == TrialState.FAIL else ""
        rows.append([str(t.number), t.state.name.lower(), f"{attrs.get('seconds', 0):.1f}",
                     f"{100 * min(attrs.get('wers', {0: math.nan}).values()):.2f}",
                     "yes" if yes else "no", *values, attrs.get("reason", cut_off)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def print_within(study: optuna.Study, first: FrozenTrial) -> None:
    """What any trial had reached in the time that the first complete one took for all."""
    seconds, wer = first.values
    reached = [(t.user_attrs["wers"][epoch], t.number, epoch)
               for t in study.get_trials(deepcopy=False)
               for epoch, at in t.user_attrs.get("clock", {}).items() if at <= seconds]
    if reached:
        least, number, epoch = min(reached)
        print(f"in the {seconds:.0f} s of trial {first.number}, which ended at WER {100 * wer:.2f} "
              f"%: trial {number} had {100 * least:.2f} % after epoch {epoch}")


def report(study: optuna.Study, search: Search, out: Path) -> None:
    """Table, picture, importances and the best trial's command; ValueError if none is complete."""
    print_table(study, search)
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
    for i, metric in enumerate(METRICS):
        try:
            shares = optuna.importance.get_param_importances(
                study, target=lambda trial, i=i: trial.values[i],
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=1),
            )
        except (RuntimeError, ValueError) as error:  # too few trials, or all of them alike
            print(f"{metric}: no importances: {error}")
        else:
            print(f"{metric}: share of variance (functional ANOVA):",
                  ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    feasible = [t for t in complete if max(t.constraints.values(), default=0) <= 0]
    if not feasible:
        print("no trial meets all thresholds; what follows has the lowest WER")
    best = min(feasible or complete, key=lambda t: t.values[::-1])
    seconds, wer = best.values
    print_within(study, complete[0])
    print(f"best: trial {best.number}, WER {100 * wer:.2f} % after {seconds:.0f} s")
    print(shlex.join([*best.user_attrs["command"], "--out", str(out / "best")]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, help="what to search")
    parser.add_argument("--out", type=Path, default=Path("out/tune"), help="study and trials")
    parser.add_argument("--run", default="bash run.sh", metavar="COMMAND",
                        help="what runs a trial, given words for train.py")
    args, words = parser.parse_known_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    out = args.out.resolve()
    # Knobs of run.sh that are set belong to the command that repeats a trial.
    source = (REPO / "run.sh").read_text()
    knobs = re.findall(r"^([A-Z]+)=\$\{\1:-", source, re.MULTILINE)
    knobs += re.findall(r"\bdecide ([A-Z_]+) ", source)
    env = [f"{k}={os.environ[k]}" for k in dict.fromkeys(knobs)
           if k in os.environ and k not in ("OUT", "DRY_RUN")]
    command = [*(["env", *env] if env else []), *shlex.split(args.run), *words]
    try:
        search = read_search(args.config)
        defaults = check_values(search, command)
        with locked(out / "study.lock"):
            study = open_study(out, search, defaults, env)
        tune(study, search, out, defaults["epochs"], command)
        report(study, search, out)
    except (OSError, ValueError) as error:
        sys.exit(f"tune.py: {error}")
    except (OptunaError, SQLAlchemyError) as error:
        sys.exit(f"tune.py: {out}/study.db: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("tune.py: interrupted; the same command goes on")


if __name__ == "__main__":
    main()
