# SPDX-License-Identifier: Apache-2.0
"""mllog.log satisfies MLPerf's compliance checker and has the values in force.

    python -m pytest tests/test_mllog.py        # the checker: pip install mlperf-logging==4.1.68

Short runs of train.main on tones, evaluation replaced by a fixed score: one with the values that
the closed division fixes and 2703 dev utterances, one of the demo recipe. test_oracles.py compares
the closed log with a minimal compliant one and edits both logs.
"""

import json
import os
from pathlib import Path

import pytest
from tones import TINY, run_here, tiny_corpus, write_tones

import recipe
import report
import train

DEV_UTTERANCES = 2703  # of dev-clean; the closed division fixes it
CLOSED = [
    "--train-splits", "train", "--dev-split", "dev-clean", "--preset", "baseline",
    "--batch-size", "8",
    "--enc-hidden", "16", "--pred-hidden", "8", "--joint-hidden", "8", "--vocab-size", "20",
    "--loader-workers", "0", "--target-wer", "0.058", "--submission-division", "closed",
    "--submission-org", "Ours", "--seed", "2021",
]


def write_links(root, split, count):
    """`count` utterances with one recording."""
    (path,) = write_tones(root, split, ["ONE"], [0.1])
    ids = [f"1-2-{i:04d}" for i in range(count)]
    for name in ids[1:]:
        os.link(path, path.with_name(f"{name}.flac"))
    lines = "".join(f"{name} ONE\n" for name in ids)
    (path.parent / "1-2.trans.txt").write_text(lines, encoding="utf-8")


def run_main(argv, wers):
    """Runs train.main in this process, its evaluations replaced by `wers`; returns mllog.log."""
    scores = iter(wers)

    def evaluate(*_):
        return {"wer": next(scores), "cer": 0.1, "errors": 1, "words": 20, "rtf": 0.1,
                "seconds": 0.1, "frames": 99, "labels": 20}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", evaluate)
        run_here(*argv)
    return argv[argv.index("--out") + 1] / "mllog.log"


def read(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tiny_corpus(tmp_path_factory.mktemp("corpus"))
    write_links(root, "dev-clean", DEV_UTTERANCES)
    return root


@pytest.fixture(scope="module")
def closed(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("closed")
    return read(run_main(["--data", corpus, "--out", out, *CLOSED], [0.0579]))


@pytest.fixture(scope="module")
def opened(corpus, tmp_path_factory):
    """A run of one epoch in the open division, which is the default."""
    out = tmp_path_factory.mktemp("open")
    return read(run_main(["--data", corpus, "--out", out, *TINY, "--epochs", "1"], [0.2]))


def judge(lines, folder, ruleset="1.0.0"):
    """The verdict of mlperf_logging's checker on a list of events."""
    checker = pytest.importorskip(
        "mlperf_logging.compliance_checker.mlp_compliance",
        reason="pip install mlperf-logging==4.1.68",
    )
    path = folder / "edited.log"
    text = "".join(f":::MLLOG {json.dumps(line)}\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    check = checker.make_checker("training", ruleset, quiet=True, werror=False)
    return "pass" if check.check_file(str(path), f"training_{ruleset}/common.yaml") else "FAIL"


# -------------------------------------------------------------------------- contents of the log


def one(lines, key):
    (line,) = [line for line in lines if line["key"] == key]
    return line


def test_events_come_in_mlperfs_order(opened):
    intervals = [line["key"] for line in opened if line["event_type"] != "POINT_IN_TIME"]
    assert intervals == [
        "init_start", "init_stop", "run_start", "block_start", "epoch_start", "epoch_stop",
        "eval_start", "eval_stop", "block_stop", "run_stop",
    ]
    times = [line["time_ms"] for line in opened]
    assert times == sorted(times)
    kinds = {line["key"].rpartition("_")[2]: line["event_type"] for line in opened}
    assert (kinds["start"], kinds["stop"]) == ("INTERVAL_START", "INTERVAL_END")


def test_every_line_names_the_source_line_that_wrote_it(opened):
    sources = {path.name: path.read_text(encoding="utf-8").splitlines()
               for path in (Path(train.__file__), Path(report.__file__))}
    for line in opened:
        file, number = line["metadata"]["file"], line["metadata"]["lineno"]
        assert ".mllog(" in sources[file][number - 1]


def test_settings_are_those_of_the_configs(opened):
    values = {line["key"]: line["value"] for line in opened}
    expected = {
        "opt_base_learning_rate": 0.2, "opt_learning_rate_warmup_epochs": 1,
        "model_eval_ema_factor": 0.7,
        "data_train_num_buckets": 2, "data_train_max_duration": 1.0, "global_batch_size": 2,
        "opt_lamb_learning_rate_decay_poly_power": 0.7,
        "opt_lamb_learning_rate_hold_epochs": 8,
        "train_samples": 8, "eval_samples": 3, "eval_accuracy": 0.2,
        "submission_division": "open",
    }
    assert {key: values[key] for key in expected} == expected
    factor = one(opened, "model_eval_ema_factor")
    assert factor["metadata"]["warm_up"] == "min(factor, (1 + step) / (10 + step))"


def test_settings_that_are_not_in_force_are_marked():
    """The demo's rate is held for half of the epochs, and --init replaces the first weights."""
    class Recorder(dict):
        def mllog(self, key, _value, **metadata):
            self[key] = metadata

    argv = ["--data", ".", "--train-splits", "a", "--dev-split", "b", "--out", ".",
            "--preset", "demo"]
    notes, init_notes = Recorder(), Recorder()
    for recorder, words in ((notes, []), (init_notes, ["--init", "best.pt"])):
        cfg, model_cfg, features = recipe.parse_configs([*argv, *words])
        report.mllog_settings(recorder, cfg, model_cfg, features)
    marked = {key for key, metadata in notes.items() if "not_in_force" in metadata}
    assert marked == {"opt_lamb_learning_rate_hold_epochs", "opt_learning_rate_alt_decay_func",
                      "opt_lamb_learning_rate_decay_poly_power"}
    scale = init_notes["model_weights_initialization_scale"]
    assert scale == {"not_in_force": "weights of best.pt"}


@pytest.mark.parametrize(
    ("argv", "wer", "status"),
    [
        (["--target-wer", "0.5"], 0.5, "success"),
        (["--target-wer", "0.5"], 0.51, "aborted"),
        (["--time-limit-s", "1e-6"], 0.9, "aborted"),
    ],
)
def test_the_run_succeeds_if_it_reaches_its_aim(corpus, tmp_path, argv, wer, status):
    argv = ["--data", corpus, "--out", tmp_path, *TINY, "--epochs", "1", *argv]
    assert one(read(run_main(argv, [wer])), "run_stop")["metadata"]["status"] == status


def test_a_dev_split_without_errors_ends_no_run_that_has_no_target(corpus, tmp_path):
    argv = ["--data", corpus, "--out", tmp_path, *TINY, "--epochs", "2"]
    lines = read(run_main(argv, [0.0, 0.5]))
    assert [line["value"] for line in lines if line["key"] == "eval_accuracy"] == [0.0, 0.5]
    assert one(lines, "run_stop")["metadata"]["status"] == "success"


def test_a_resumed_run_starts_once_and_repeats_its_settings(corpus, tmp_path):
    argv = ["--data", corpus, "--out", tmp_path, *TINY, "--epochs", "2"]
    run_main([*argv, "--time-limit-s", "1e-6"], [0.9])
    lines = read(run_main([*argv, "--resume"], [0.8, 0.7]))
    one(lines, "run_start")
    assert [line["value"] for line in lines if line["key"] == "eval_accuracy"] == [0.9, 0.8, 0.7]
    assert [line["value"] for line in lines if line["key"] == "seed"] == [1, 1]
    assert judge(lines, tmp_path) == "pass"


# ------------------------------------------------------------------- verdict of MLPerf's checker


# All rulesets that have rnnt.
@pytest.mark.parametrize("ruleset", ["1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0"])
def test_both_divisions_pass(closed, opened, tmp_path, ruleset):
    verdicts = [judge(lines, tmp_path, ruleset) for lines in (closed, opened)]
    assert verdicts == ["pass", "pass"]
