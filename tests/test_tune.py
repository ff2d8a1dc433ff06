# SPDX-License-Identifier: Apache-2.0
"""tune.py reads its file, runs, prunes and resumes trials, and reports the best.

Trials run a stand-in for run.sh that writes the log.jsonl of a training run of known WER; the
tuners, their ends and the studies are real.
"""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import TrialState
from tones import REPO

from recipe import RECIPES
from tools import tune

# Three epochs of 10 s by its log. The last WER is 0.1 plus 100 times the distance of lr from 0.004.
# Above lr 0.02 it fails. Trials from number HOPELESS on have WER 1 and take minutes unless they are
# ended. The second epoch waits for the file that GO names.
STAND_IN = """
import argparse, json, os, pathlib, sys, time
argv = sys.argv[1:]
if os.environ.get("DRY_RUN") == "1":
    print("corpus  demo in d")
    print("launch  env OMP_NUM_THREADS=2 python train.py --data d --train-splits t --dev-split e"
          " --out out/demo --preset demo " + " ".join(argv))
    sys.exit()
parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.004)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--out", type=pathlib.Path)
args, _ = parser.parse_known_args(argv)
(args.out / "argv").open("a").write(" ".join(argv) + "\\n")
(args.out / "pid").write_text(str(os.getpid()))
log = (args.out / "log.jsonl").open("a")
done = (args.out / "log.jsonl").read_text().count('"eval"')
def write(event, **values):
    log.write(json.dumps({"event": event, **values}) + "\\n")
    log.flush()
write("start")
for epoch in range(done + 1, args.epochs + 1):
    write("step", step=epoch)
    if args.lr > 0.02:
        print("train.py: step 1: gradient norm is nan\\n", file=sys.stderr)
        print("=" * 60, file=sys.stderr)  # as torchrun ends its report
        sys.exit(3)
    while epoch == 2 and not os.path.exists(os.environ.get("GO", "/")):
        time.sleep(0.05)
    hopeless = int(args.out.name[-4:]) >= int(os.environ.get("HOPELESS", 99))
    wer = 1 if hopeless else min(1, 0.3 / epoch + 100 * abs(args.lr - 0.004))
    write("eval", epoch=epoch, wer=wer, cer=wer / 2, hours=10 * epoch / 3600)
    time.sleep(300 if hopeless and epoch < args.epochs else float(os.environ.get("EPOCH_S", 0)))
sys.exit(int(os.environ.get("END", 0)))
"""

CONFIG = """\
model_parameter:
  project: sda
  experiment: rnnt
  parameters:
  - {name: learning_rate, transformation: log, type: double, bounds: {min: 1e-3, max: 1.0e-2}}
  - bounds: {min: 1, max: 10}
    name: ctc_epochs
    type: int
metrics:
- {name: training_time, objective: minimize, threshold: 43200}
- {name: WER, objective: minimize, threshold: 0.25}
observation_budget: 6
"""
LR = CONFIG.splitlines()[4]

# A tuner that takes a trial over when it has had no heartbeat for 10 s instead of 180.
TUNER = ("from tools import tune; tune.HEARTBEAT_S, tune.GRACE_S, tune.POLL_S = 1, 10, 0.05; "
         "tune.main()")


class Case:
    """A folder with a stand-in, a file that describes a search, and tuners that use both."""

    def __init__(self, root: Path):
        self.root, self.out = root, root / "study"
        self.config, self.stand_in = root / "tune.yaml", root / "stand_in.py"
        self.stand_in.write_text(STAND_IN)
        self.config.write_text(CONFIG)
        self.started: list[subprocess.Popen] = []

    def command(self, *argv: str) -> list[str]:
        return ["tune.py", "--config", str(self.config), "--out", str(self.out),
                "--run", f"{sys.executable} {self.stand_in}", *argv]

    def start(self, *argv: str, **env: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", TUNER, *self.command(*argv)[1:]], cwd=REPO, text=True,
            env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        self.started.append(process)
        return process

    def run(self, *argv: str, **env: str) -> tuple[str, str | None]:
        """A tuner in this process: its output and its error message or None."""
        output, error = io.StringIO(), None
        with (
            mock.patch.object(sys, "argv", self.command(*argv)),
            mock.patch.dict(os.environ, env),
            mock.patch.multiple(tune, POLL_S=0.05, HEARTBEAT_S=1, GRACE_S=10),
            mock.patch.object(optuna.samplers, "TPESampler", partial(TPESampler, seed=1)),
            contextlib.redirect_stdout(output),
        ):
            try:
                tune.main()
            except SystemExit as end:
                error = end.code
        return output.getvalue(), error

    def complete(self, *argv: str, **env: str) -> str:
        """The output of a tuner in this process that ends without an error."""
        output, error = self.run(*argv, **env)
        assert error is None
        return output

    def trials(self) -> list:
        storage = f"sqlite:///{self.out}/study.db"
        return optuna.load_study(study_name=None, storage=storage).get_trials()

    def change(self, old: str, new: str) -> None:
        assert CONFIG.count(old) == 1, old
        self.config.write_text(CONFIG.replace(old, new))


@pytest.fixture(autouse=True)
def _restore_style():
    with matplotlib.rc_context():  # Optuna sets a style for all pictures
        yield


@pytest.fixture
def case(tmp_path):
    case = Case(tmp_path)
    yield case
    for process in case.started:
        process.kill()
        process.communicate()


def wait_for(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- the file ---------------------------------------------------------------------------------


def test_the_file_of_the_original(case):
    search = tune.read_search(case.config)
    assert search.name == "sda/rnnt"
    assert search.space == {
        "lr": optuna.distributions.FloatDistribution(1e-3, 1e-2, log=True),
        "ctc_epochs": optuna.distributions.IntDistribution(1, 10),
    }
    assert search.thresholds == [43200, 0.25]
    assert search.budget == 6


def test_lists_and_no_threshold(case):
    case.change(LR, "  - {name: stack, type: int, grid: [4, 6]}\n"
                    "  - {name: train_splits, type: categorical, categorical_values: [a b, a]}")
    case.config.write_text(case.config.read_text().replace(", threshold: 0.25", ""))
    search = tune.read_search(case.config)
    assert search.space["stack"].choices == (4, 6)
    assert search.space["train_splits"].choices == ("a b", "a")
    assert search.thresholds == [43200, float("inf")]


def test_values_become_flags():
    params = {"stack": 4, "normalization": "False", "ipex": True, "train_splits": "a b", "lr": 1e-5}
    assert tune.flags(params) == ["--stack", "4", "--no-normalization", "--ipex", "--train-splits",
                                  "a", "b", "--lr", "1e-05"]


def test_settings_of_the_machine_are_named_as_without_effect(case, capsys):
    case.config.write_text(CONFIG + "ppn: 2\nhosts:\n- localhost\n")
    tune.read_search(case.config)
    output = capsys.readouterr().out
    assert f"{case.config}:13: ppn has no effect" in output
    assert f"{case.config}:14: hosts has no effect" in output


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("learning_rate", "out", 5, "out cannot be searched"),
        ("    name: ctc_epochs", "    name: lr", 6, "lr stands twice"),
        ("    type: int", "    type: integer", 6, "integer: expected double or int or categorical"),
        ("{min: 1, max: 10}", "{min: 1, max: ten}", 6, "ctc_epochs: invalid literal for int()"),
        ("{min: 1, max: 10}", "{min: 11, max: 10}", 6, "got (low=11, high=10)"),
        ("transformation: log", "transformation: exp", 5, "lr: exp: expected log"),
        (LR, "  - {name: stack, type: int, grid: 46}", 5, "stack: 46, expected a list"),
        (LR, "  - {name: stack, type: int, grid: [4], bounds: {}}", 5, "stack: expected bounds"),
        (LR, "  - stack", 4, "stack: expected a mapping with name, type"),
        ("  experiment: rnnt\n", "", 1, "expected a mapping with project, experiment, parameters"),
        ("name: WER", "name: CER", 11, "CER: expected training_time or WER"),
        ("name: WER", "name: training_time", 11, "training_time stands twice"),
        ("- {name: WER, objective: minimize, threshold: 0.25}\n", "", 9,
         "metrics: expected both of training_time and WER"),
        ("observation_budget: 6", "observation_budget: 0", 12, "0, expected at least 1"),
        ("observation_budget: 6", "observation_budget: [6]", 12, "not 'list'"),
    ],
)
def test_a_wrong_value_is_an_error_that_shows_it_and_its_line(case, old, new, line, message):
    case.change(old, new)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        tune.read_search(case.config)
    assert str(error.value).startswith(f"{case.config}:{line}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "None: expected a mapping"),
        (b"a: 1\nb: \xff\n", "invalid start byte"),
        (b"a: 1\n---\nb: 2\n", "line 2"),
        (b"[" * 5000, "recursion"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(case, content, message):
    case.config.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(case.config))) as error:
        tune.read_search(case.config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("{name: beta1, type: double, bounds: {min: 0.5, max: 1.5}}",
         "beta1: 1.5, expected 0 <= x < 1"),
        ("{name: learning_rat, type: double, bounds: {min: 1, max: 2}}",
         "unrecognized arguments: --learning-rat 1.0"),
        ("{name: normalization, type: categorical, categorical_values: [true, yes]}",
         "unrecognized arguments: yes"),
    ],
)
def test_values_that_train_py_refuses_end_the_search_before_it_begins(case, parameter, message):
    case.change(LR, f"  - {parameter}")
    _, error = case.run()
    assert error.startswith(f"tune.py: {case.config}:5: ")
    assert message in error
    assert not case.out.exists()


def test_flags_that_train_py_refuses_end_the_search_before_it_begins(case):
    assert "unrecognized arguments: --epoch 3" in case.run("--epoch", "3")[1]
    assert not case.out.exists()


def test_a_command_that_does_not_launch_is_an_error(case):
    case.stand_in.write_text("import sys; sys.exit('CORPUS=timit, expected demo')")
    assert "CORPUS=timit, expected demo" in case.run()[1]


# ---- the search -------------------------------------------------------------------------------


def test_a_search_from_beginning_to_end(case):
    output = case.complete("--epochs", "3", RANKS="1", OMP_NUM_THREADS="1")
    trials = case.trials()
    assert len(trials) == 6
    # The demo preset's own values come first.
    assert trials[0].params == {"lr": 0.004, "ctc_epochs": 2}
    assert trials[0].values == [30.0, pytest.approx(0.1)]
    for t in trials:
        assert 1e-3 <= t.params["lr"] <= 1e-2
        expected = f"--epochs 3 --lr {t.params['lr']} --ctc-epochs {t.params['ctc_epochs']}"
        folder = case.out / f"trial-{t.number:04d}"
        assert (folder / "argv").read_text() == f"{expected} --out {folder}\n"
    lines = output.splitlines()
    assert lines[-1] == (
        f"env RANKS=1 OMP_NUM_THREADS=1 {sys.executable} {case.stand_in} --epochs 3 --lr 0.004"
        f" --ctc-epochs 2 --out {case.out}/best"
    )
    assert lines[-2] == "best: trial 0, WER 10.00 %, CER 5.00 % after 30 s"
    header = next(i for i, line in enumerate(lines) if line.startswith("trial  state"))
    rows = [re.match(r"\d +(complete|pruned) ", row) for row in lines[header + 1 : header + 7]]
    assert all(rows)
    assert (case.out / "pareto.png").stat().st_size > 5000


def test_constraints_follow_the_thresholds(case):
    case.change("threshold: 0.25", "threshold: 0.15")
    case.config.write_text(case.config.read_text().replace("43200", "29"))
    output = case.complete()
    first = case.trials()[0]
    assert first.constraints == {"training_time": 1.0, "WER": pytest.approx(-0.05)}
    assert "no trial meets all thresholds" in output


def test_a_default_that_is_not_searched_leaves_the_others_in_the_first_trial(case):
    form = "  - {name: %s, type: categorical, categorical_values: [%s]}\n"
    case.change("metrics:\n", form % ("precision", "bf16, fp32") + form % ("train_splits", "a b, t")
                + "metrics:\n")
    output = case.complete()
    trial = case.trials()[0]
    assert (trial.params["lr"], trial.params["ctc_epochs"]) == (0.004, 2)
    assert trial.params["train_splits"] == "t"
    assert trial.params["precision"] in ("bf16", "fp32")
    assert "precision: auto, which train.py would take, is not searched" in output


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_report_prefers_a_feasible_trial_and_prints_importances(tmp_path, capsys):
    study = optuna.create_study(directions=["minimize"] * 2)
    for lr, seconds, wer in ((0.1, 200, 0.1), (0.2, 90, 0.3), (0.3, 95, 0.2), (0.4, 50, 0.6)):
        study.enqueue_trial({"lr": lr})
        trial = study.ask({"lr": optuna.distributions.FloatDistribution(0, 1)})
        trial.set_constraint("training_time", seconds - 100)
        trial.set_constraint("WER", wer - 0.5)
        trial.set_user_attr("cer", wer / 2)
        study.tell(trial, [seconds, wer])
    tune.show_results(study, tmp_path, ["run"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[5] for line in lines[1:5]] == ["no", "yes", "yes", "no"]
    assert any(line.startswith("WER: share of variance (functional ANOVA): lr") for line in lines)
    assert lines[-2] == "best: trial 2, WER 20.00 %, CER 10.00 % after 95 s"
    assert lines[-1] == f"run --lr 0.3 --out {tmp_path}/best"


def test_worse_than_the_median_at_the_same_epoch_is_hopeless():
    study = optuna.create_study(directions=["minimize"] * 2)
    for first, second in ((0.9, 0.5), (0.8, 0.4), (0.7, 0.3)):
        study.add_trial(optuna.create_trial(
            values=[1.0, second], user_attrs={"wers": {"1": first, "2": second}}))
    assert tune.prune_reason(study, 3, {"1": 0.81}) == (
        "WER 0.810 after epoch 1, median of 3 others 0.800"
    )
    assert tune.prune_reason(study, 3, {"1": 0.8}) is None
    assert tune.prune_reason(study, 3, {"1": 0.81, "2": 0.4}) is None
    assert tune.prune_reason(study, 3, {"1": 0.81, "2": 0.41}) is not None
    # No other trial has an epoch 3.
    assert tune.prune_reason(study, 3, {"1": 0.81, "2": 0.41, "3": 0.9}) is None
    assert tune.prune_reason(study, 0, {"1": 0.9}) is None  # two others are too few


def test_hopeless_trials_are_ended_with_all_their_processes(case):
    # There is a bash between tuner and trial, as run.sh is one.
    wrapper = case.root / "run.sh"
    wrapper.write_text(f'{sys.executable} {case.stand_in} "$@"\nexit\n')
    output = case.complete("--run", f"bash {wrapper}", HOPELESS="4")
    trials = case.trials()
    assert [t.number for t in trials if t.state == TrialState.PRUNED][-2:] == [4, 5]
    for t in trials[4:]:
        assert re.fullmatch(r"WER 1.000 after epoch 1, median of \d others 0\.\d+; CER \d\.\d+",
                            t.user_attrs["reason"])
        assert not is_alive(int((case.out / f"trial-{t.number:04d}/pid").read_text()))
        assert t.user_attrs["reason"] in output


def test_trials_are_complete_after_the_last_epoch_and_after_a_time_limit(case):
    """The last epoch is too late to end a hopeless trial; status 75 is that of a time limit."""
    case.complete("--epochs", "1", HOPELESS="4", END="75")
    assert [t.state for t in case.trials()] == [TrialState.COMPLETE] * 6


def test_a_failed_trial_keeps_its_reason_and_the_search_goes_on(case):
    case.change("max: 1.0e-2", "max: 1")
    output = case.complete()
    trials = case.trials()
    assert len(trials) == 6
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert failed
    assert {t.user_attrs["reason"] for t in failed} == {
        "status 3, 0 evaluations: train.py: step 1: gradient norm is nan"
    }
    assert "gradient norm is nan" in output


def test_values_that_need_each_other_can_be_searched_together(case):
    case.change("  - bounds: {min: 1, max: 10}\n    name: ctc_epochs\n    type: int\n",
                "  - {name: speed_min, type: double, bounds: {min: 0.8, max: 1.2}}\n"
                "  - {name: speed_max, type: double, bounds: {min: 1.2, max: 1.4}}\n")
    search = tune.read_search(case.config)
    command = [sys.executable, str(case.stand_in)]
    assert tune.check_values(search, command)["speed_max"] > 1
    search.space["speed_max"] = optuna.distributions.FloatDistribution(0.5, 0.7)
    with pytest.raises(ValueError, match="--speed-max 0.5: .*speed_max: .*, expected at least"):
        tune.check_values(search, command)


def test_a_resumed_trial_is_not_judged_again_by_its_old_epochs(tmp_path):
    study = optuna.create_study(directions=["minimize"] * 2)
    for _ in range(tune.MIN_RIVALS):  # they finished while the trial was cut off
        study.add_trial(optuna.create_trial(
            values=[1.0, 0.1], user_attrs={"wers": {"1": 0.4, "2": 0.3, "3": 0.2}}))
    evaluation = '{"event": "eval", "epoch": %d, "wer": %g, "cer": 0.1, "hours": 0.25}\n'
    log = tmp_path / "log.jsonl"
    log.write_text(evaluation % (1, 0.9) + evaluation % (2, 0.25))
    command = [sys.executable, "-c", f"open({str(log)!r}, 'a').write({evaluation % (3, 0.1)!r})"]
    assert tune.run_trial(study.ask(), 4, command, tmp_path) == [900, 0.1]


def test_a_search_in_which_all_fails_is_an_error(case):
    case.change("min: 1e-3, max: 1.0e-2", "min: 0.1, max: 1")
    output, error = case.run()
    assert "no trial was completed" in error
    assert "lr: 0.004, which train.py would take, is not searched" in output
    assert len(case.trials()) == 6


# ---- crashes and several tuners ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_tuner_ends_its_trial_and_the_same_command_resumes_it(case, number):
    go, folder = case.root / "go", case.out / "trial-0000"
    tuner, log = case.start(GO=str(go)), folder / "log.jsonl"
    wait_for(lambda: log.exists() and '"step": 2' in log.read_text())  # in its second epoch
    trial = int((folder / "pid").read_text())
    assert is_alive(trial)
    tuner.send_signal(number)
    _, errors = tuner.communicate(timeout=300)
    if number == signal.SIGINT:
        assert tuner.returncode == 130
        assert errors.endswith("tune.py: interrupted; the same command goes on\n")
    wait_for(lambda: not is_alive(trial))

    go.touch()
    output = case.complete(GO=str(go))
    trials = case.trials()
    assert len(trials) == 7  # six, and the trial that was cut off
    assert [t.number for t in trials if t.state == TrialState.FAIL] == [0]
    (again,) = [t for t in trials[1:] if t.user_attrs["folder"] == "trial-0000"]
    assert again.params == trials[0].params
    assert again.values == [30.0, pytest.approx(0.1)]
    assert (folder / "argv").read_text().count("\n") == 2
    assert log.read_text().count('"eval"') == 3
    assert "cut off; goes on under another number" in output


@pytest.mark.slow
def test_a_finished_search_is_reported_widened_and_not_mixed_with_another(case):
    first = case.complete()
    before = [t.datetime_complete for t in case.trials()]
    again = case.complete()
    assert again.splitlines()[-2:] == first.splitlines()[-2:]
    assert [t.datetime_complete for t in case.trials()] == before
    case.change("observation_budget: 6", "observation_budget: 7")
    case.run()
    assert len(case.trials()) == 7
    assert "take another --out" in case.run("--epochs", "3")[1]
    assert "take another --out" in case.run(RANKS="2")[1]
    assert case.run(SSH="my-ssh")[1] is None
    for old, new in (("max: 10", "max: 9"), ("experiment: rnnt", "experiment: other")):
        case.change(old, new)
        assert "take another --out" in case.run()[1]
    assert len(case.trials()) == 7


def test_a_damaged_study_is_an_error_that_names_it(case):
    case.out.mkdir()
    (case.out / "study.db").write_bytes(b"no database" * 100)
    assert f"{case.out}/study.db: " in case.run()[1]


@pytest.mark.slow
def test_two_tuners_share_one_study(case):
    tuners = [case.start(EPOCH_S="0.3") for _ in range(2)]
    results = [tuner.communicate(timeout=240) for tuner in tuners]
    assert [t.returncode for t in tuners] == [0, 0], results
    trials = case.trials()
    assert 6 <= len(trials) <= 7  # the last trials of both may begin at the same moment
    assert all(t.state.is_finished() for t in trials)
    ran = [re.findall(r"^trial (\d+) in", out, re.MULTILINE) for out, _ in results]
    assert all(ran), ran
    assert sorted(map(int, ran[0] + ran[1])) == list(range(len(trials)))
    # Both waited for the last trial and report the same.
    assert results[0][0].splitlines()[-1] == results[1][0].splitlines()[-1]


# ---- with run.sh itself -----------------------------------------------------------------------


def test_run_sh_shows_its_launch(case):
    """The real run.sh: its dry run is what parameters are checked against."""
    search = tune.read_search(case.config)
    defaults = tune.check_values(search, ["env", "CORPUS=demo", "bash", "run.sh", "--epochs", "5"])
    assert defaults["epochs"] == 5
    assert defaults["preset"] == "demo"
    assert defaults["ctc_epochs"] == RECIPES["demo"]["ctc_epochs"]
    tune.check_values(tune.read_search(REPO / "docs/tune-demo.yaml"), ["bash", "run.sh"])
