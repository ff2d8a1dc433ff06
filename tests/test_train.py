# SPDX-License-Identifier: Apache-2.0
"""train.py: steps, averaged weights, ranks, and whole runs on tones.

    python -m pytest tests/test_train.py

Steps run in float64, so that accumulation and two ranks repeat one big batch to the rounding.
"""

import math
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_optimizer import lamb_by_the_formula
from tones import DEV_SECONDS, DEV_TEXTS, REPO, TINY, TRAIN_TEXTS, events, run_train

import data
import decode
import features as front_end
import report
import train
from checkpoint import load_checkpoint
from features import FeatureConfig
from loss import transducer_loss
from model import ModelConfig, Transducer, WideLstm
from optimizer import lr_at
from ranks import Ranks, start_ranks
from recipe import TrainConfig, parse_configs

# ------------------------------------------------------------------------------------- one step

FRONT_END = FeatureConfig(num_mels=2, freq_mask_max=1, align=6, round_frames=4, round_labels=2)
SMALL = ModelConfig(
    feature_size=6, vocab_size=5, enc_hidden=12, pre_layers=1, stack=2, post_layers=1,
    pred_hidden=8, pred_layers=1, joint_hidden=10, enc_dropout=0.0, pred_dropout=0.0,
    joint_dropout=0.0, normalization=True,
)
DROPOUT = replace(SMALL, enc_dropout=0.2, pred_dropout=0.2, joint_dropout=0.2)
ALONE = Ranks(0, 1, 0)


def make_item(number):
    """Utterance `number` for data.collate: each label is a few frames of its own pattern, noisy."""
    rng = np.random.default_rng(number)
    labels = rng.integers(0, 4, rng.integers(1, 5)).tolist()
    frames = np.repeat(np.eye(6)[labels] * 3, rng.integers(3, 7), axis=0)
    feats = torch.tensor(frames + 0.3 * rng.standard_normal(frames.shape))
    utterance = data.Utterance(f"u{number}", "", 1.0, "")
    return feats.to(torch.get_default_dtype()), labels, [x for x in labels for _ in "ab"], utterance


def make_batch(*numbers):
    return data.collate([make_item(n) for n in numbers], FRONT_END)


def spoil(batch, row):
    """The same batch with a NaN in one utterance."""
    feats = batch.feats.clone()
    feats[row, 0, 0] = math.nan
    return batch._replace(feats=feats)


def make_trainer(model_cfg=SMALL, ranks=ALONE, **changes):
    cfg = TrainConfig(**{**dict(
        data="", train_splits=(), dev_split="", out="", precision="fp32", lr=0.02, ema_decay=0.9,
        # A large eps keeps the rounding errors of tiny gradients from becoming large updates.
        eps=1e-3,
    ), **changes})
    return train.make_trainer(cfg, model_cfg, ranks)


def weights_of(trainer):
    """Parameters and buffers of the model and of the average, one dictionary."""
    return {
        f"{owner}.{name}": x.detach().clone()
        for owner in ("model", "ema")
        for name, x in getattr(trainer, owner).state_dict().items()
    }


def are_equal(ours, expected):
    return all(torch.equal(x, expected[name]) for name, x in ours.items())


def assert_close(ours, expected, tolerance):
    assert ours.keys() == expected.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def mean_cost(model, batch):
    """The transducer loss of explicit logits."""
    encoded, enc_lens, predicted, *_ = model(batch.feats, batch.feat_lens, batch.targets)
    return transducer_loss(model.joint(encoded, predicted), batch.targets, enc_lens,
                           batch.target_lens, model.cfg.blank)


@pytest.mark.parametrize("lattice_band", [0, 3])
def test_steps_of_recordings_without_words_drive_the_loss_down(lattice_band):
    trainer = make_trainer(replace(SMALL, ctc_split=2), eps=1e-9, ctc_epochs=1,
                           ctc_weight=0.5, lattice_band=lattice_band)
    items = [(item[0], [], [], item[3]) for item in map(make_item, range(4))]
    batch = data.collate(items, FRONT_END)
    assert batch.targets.shape == (4, 0)
    for epoch in (1, 2):  # the first trains the CTC head alone
        trainer = train.begin_epoch(trainer, epoch)
        results = [train.train_step(trainer, [batch], step, 0.05) for step in range(1, 11)]
        assert results[-1].loss < 0.5 * results[0].loss
        assert results[-1].num_unaligned == 0


def test_a_step_returns_the_mean_cost_and_the_norm_of_its_gradient(float64):
    trainer, batch = make_trainer(), make_batch(0, 1, 2)
    model = make_trainer().model.train()  # the same weights
    cost = mean_cost(model, batch)
    grads = torch.autograd.grad(cost, list(model.parameters()))
    loss, norm, *_ = train.train_step(trainer, [batch], 1, lr=0.02)
    assert loss == pytest.approx(cost.item(), rel=1e-12)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-9)


def test_a_step_is_clipped_lamb_with_the_configs_values(float64):
    settings = dict(beta1=0.7, beta2=0.8, eps=1e-2, weight_decay=0.3, clip_norm=0.1)
    trainer, batch = make_trainer(**settings, ema_decay=0.75), make_batch(0, 1, 2)
    before = weights_of(trainer)
    _, norm, *_ = train.train_step(trainer, [batch], 1, lr=0.05)
    assert norm > 0.1
    for name, param in trainer.model.named_parameters():
        expected = lamb_by_the_formula(
            before[f"model.{name}"], [param.grad], 0.05, (0.7, 0.8), 1e-2, 0.3
        )
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14, msg=name)
    grads = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert grads.norm().item() == pytest.approx(0.1, rel=1e-12)
    after = weights_of(trainer)
    for name in trainer.model.state_dict():
        decay = 2 / 11  # of the first step, on the way to 0.75; the average starts as the model
        expected = decay * before[f"model.{name}"] + (1 - decay) * after[f"model.{name}"]
        torch.testing.assert_close(after[f"ema.{name}"], expected, rtol=1e-12, atol=1e-14)


def test_the_average_follows_the_weights_of_a_short_run():
    trainer, batch = make_trainer(ema_decay=0.999, eps=1e-9), make_batch(0, 1, 2, 3)
    start = mean_cost(trainer.ema, batch).item()
    for step in range(1, 61):
        train.train_step(trainer, [batch], step, lr=0.02)
    # With a decay of 0.999 in all of the 60 steps, 94 % of the average would be the start.
    assert mean_cost(trainer.ema, batch).item() < 0.2 * start


GLOBAL_BATCHES = [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]


def run_steps(trainer, split, lr=0.02):
    """Three steps, the utterances of each cut into micro-batches by `split`: losses and norms."""
    return [
        train.train_step(trainer, [make_batch(*part) for part in split(numbers)], step, lr)[:2]
        for step, numbers in enumerate(GLOBAL_BATCHES, 1)
    ]


def test_accumulated_steps_equal_big_ones(float64):
    """Micro-batches of one and two utterances have to weigh each utterance alike."""
    big, accumulated = make_trainer(), make_trainer()
    expected = run_steps(big, lambda numbers: [numbers])
    results = run_steps(accumulated, lambda numbers: [numbers[:1], numbers[1:3], numbers[3:]])
    # float64: another order of summation.
    assert np.array(results) == pytest.approx(np.array(expected), rel=1e-9)
    assert_close(weights_of(accumulated), weights_of(big), 1e-9)


def test_random_numbers_depend_on_seed_step_and_rank_alone():
    def loss(seed=1, step=1, rank=0, disturb=0):
        trainer = make_trainer(DROPOUT, seed=1)
        trainer = trainer._replace(
            cfg=replace(trainer.cfg, seed=seed), ranks=Ranks(rank, 1, 0)
        )  # the same weights for any seed and rank
        torch.manual_seed(disturb)
        return train.train_step(trainer, [make_batch(0, 1, 2)], step, lr=0.02)[0]

    assert loss() == loss(disturb=99)
    assert len({loss(), loss(seed=2), loss(step=2), loss(rank=1)}) == 4


def test_weights_at_the_start_depend_on_the_seed_alone():
    torch.manual_seed(99)
    one = weights_of(make_trainer(seed=5))
    again, other = weights_of(make_trainer(seed=5)), weights_of(make_trainer(seed=6))
    assert are_equal(one, again)
    embedding = "model.predictor.embed.weight"
    assert not torch.equal(one[embedding], other[embedding])


@pytest.mark.parametrize("look_ahead", [0, 2 * SMALL.stack])
def test_bf16_multiplies_in_bf16_and_keeps_weights_in_float32(look_ahead):
    model_cfg = replace(SMALL, look_ahead=look_ahead)
    exact, rounded = make_trainer(model_cfg), make_trainer(model_cfg, precision="bf16")
    losses = [train.train_step(t, [make_batch(0, 1, 2)], 1, 0.02)[0] for t in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # 8 bits of mantissa
    assert {x.dtype for x in weights_of(rounded).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        ("vendor_id : GenuineIntel flags : fma avx512_bf16 amx_bf16 amx_tile", torch.bfloat16),
        ("vendor_id : GenuineIntel flags : fma avx512f avx512_bf16", torch.float32),
        ("vendor_id : AuthenticAMD flags : fma avx512f avx512_bf16", torch.bfloat16),
        ("vendor_id : AuthenticAMD flags : fma avx2", torch.float32),
        ("Features : fp asimd bf16", torch.bfloat16),
        ("", torch.float32),  # no /proc
    ],
)
def test_auto_precision_is_bf16_where_the_processor_multiplies_it_faster(monkeypatch, words, dtype):
    monkeypatch.setattr(report, "processor_info", lambda: words)
    assert make_trainer(precision="auto").dtype == dtype


@pytest.mark.parametrize(("flags", "expected"), [("amx_bf16", 8), ("avx512_bf16", 0)])
def test_lstms_train_small_batches_in_float32_on_amx(monkeypatch, flags, expected):
    monkeypatch.setattr(report, "processor_info", lambda: flags)
    lstms = [m for m in make_trainer().model.modules() if isinstance(m, WideLstm)]
    assert {lstm.float32_batch for lstm in lstms} == {expected}


def test_a_gradient_that_is_not_finite_changes_no_weights():
    trainer = make_trainer(replace(SMALL, normalization=False))
    trainer.model.joint_network.output.bias.register_hook(lambda grad: grad * math.inf)
    before = weights_of(trainer)
    with pytest.raises(FloatingPointError, match="^step 7: gradient norm is (inf|nan); .*--lr$"):
        train.train_step(trainer, [make_batch(0, 1, 2)], 7, lr=0.02)
    assert are_equal(weights_of(trainer), before)
    assert not trainer.optimizer.state


# ---------------------------------------------------------------------------------------- two ranks


def rank_main(folder):
    """Runs in each of two processes and writes its results to <folder>/rank<r>.pt."""
    torch.set_default_dtype(torch.float64)
    ranks, _ = start_ranks(expected=2, timeout_s=60)
    assert ranks == (int(os.environ["RANK"]), 2, int(os.environ["LOCAL_RANK"]))
    results = {"ranks": tuple(ranks)}
    for name, split in (
        ("plain", lambda numbers: [numbers[ranks.rank :: 2]]),
        ("accumulated", lambda numbers: [[n] for n in numbers[ranks.rank :: 2]]),
    ):
        trainer = make_trainer(ranks=ranks)
        results[name] = run_steps(trainer, split), weights_of(trainer)

    trainer = make_trainer(replace(SMALL, normalization=False), ranks=ranks)
    before, batch = weights_of(trainer), make_batch(2 * ranks.rank, 2 * ranks.rank + 1)
    try:
        train.train_step(trainer, [batch if ranks.rank == 0 else spoil(batch, 1)], 7, lr=0.02)
    except FloatingPointError as error:
        results["message"] = str(error)
    results["unchanged"] = are_equal(weights_of(trainer), before) and not trainer.optimizer.state
    results["no gradient"] = all(p.grad is None for p in trainer.model.parameters())
    torch.save(results, Path(folder) / f"rank{ranks.rank}.pt")
    torch.distributed.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of rank_main in two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
    }
    command = [sys.executable, "-c", f"import test_train; test_train.rank_main({str(folder)!r})"]
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                         stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    return [torch.load(folder / f"rank{r}.pt") for r in range(2)]


@pytest.mark.parametrize("split", ["plain", "accumulated"])
def test_two_ranks_equal_one_with_twice_the_batch(two_ranks, float64, split):
    alone = make_trainer()
    expected = run_steps(alone, lambda numbers: [numbers])
    for results in two_ranks:
        losses = [loss for loss, _ in results[split][0]]  # of all ranks
        assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-9)
        norms = [norm for _, norm in results[split][0]]
        assert norms == pytest.approx([norm for _, norm in expected], rel=1e-9)
        # float64: another order of summation.
        assert_close(results[split][1], weights_of(alone), 1e-9)
    first, second = (results[split][1] for results in two_ranks)
    assert are_equal(first, second)


def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_changes_nothing(two_ranks):
    first, second = (results["message"] for results in two_ranks)
    assert re.search("^step 7: rank 0: loss on another rank is not finite; .*--lr$", first)
    assert re.search("^step 7: rank 1: loss of u3 is not finite; .*--lr$", second)
    # The error comes before the backward pass.
    assert all(results["unchanged"] and results["no gradient"] for results in two_ranks)


# --------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Run directory and output of three epochs with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = run_train(corpus, out, "--checkpoint-every-s", 0, "--loader-workers", 1)
    assert done.returncode == 0, done.stderr
    return out, done


def test_a_run_logs_its_events_in_order(finished):
    out, _ = finished
    kinds = [e["event"] for e in events(out)]
    epoch = ["step"] * 4 + ["epoch", "eval"]
    assert kinds == ["start", *epoch, *epoch, *epoch, "end"]


def test_a_checkpoint_knows_the_longest_training_utterance(finished, corpus):
    """decode.py cuts what is longer, also where recordings are far shorter than the limit."""
    utterances = data.read_split(corpus, "train", FeatureConfig())
    longest_s = max(u.duration_s for u in utterances if u.duration_s <= 1.0)
    stored = FeatureConfig(**load_checkpoint(finished[0] / "best.pt")["feature_config"])
    assert stored.max_utterance_s == min(1.0, stored.speed_max * longest_s)


def test_the_start_event_tells_how_to_repeat_the_run(finished, corpus):
    out, _ = finished
    (start,) = events(out, "start")
    assert start["train_config"]["lr"] == 0.2
    assert start["train_config"]["data"] == str(corpus)
    assert start["model_config"]["enc_hidden"] == 16
    assert start["feature_config"]["max_utterance_s"] == 1.0
    assert start["versions"]["torch"] == torch.__version__
    assert (start["ranks"], start["threads"], start["precision"]) == (1, 1, "float32")
    model_cfg = ModelConfig(**start["model_config"])
    parameters = Transducer(model_cfg).parameters()
    assert start["parameters"] == sum(p.numel() for p in parameters)


def test_step_events_have_their_numbers(finished):
    steps = events(finished[0], "step")
    keys = ["event", "step", "epoch", "epochs", "hours", "loss", "lr", "grad_norm", "utts_per_s",
            "step_s", "data_s"]
    assert all(list(e) == keys for e in steps)
    assert [(e["step"], e["epoch"]) for e in steps] == [(n, (n + 3) // 4) for n in range(1, 13)]
    cfg = events(finished[0], "start")[0]["train_config"]
    rates = [lr_at(e["step"], e["epoch"], lr=cfg["lr"], warmup_epochs=1,
                   hold_epochs=cfg["hold_epochs"], steps_per_epoch=4, gamma=cfg["lr_gamma"],
                   lr_min=cfg["lr_min"]) for e in steps]
    assert [e["lr"] for e in steps] == rates
    assert all(0 <= e["data_s"] < e["step_s"] for e in steps)
    assert all(e["utts_per_s"] == pytest.approx(2 / e["step_s"]) for e in steps)
    assert all(0 < e["loss"] < 1000 and 0 < e["grad_norm"] < 1e6 for e in steps)


def test_epoch_events_sum_up_their_steps(finished):
    steps = events(finished[0], "step")
    epochs = events(finished[0], "epoch")
    assert [e["epoch"] for e in epochs] == [1, 2, 3]
    for e in epochs:
        own = [s for s in steps if s["epoch"] == e["epoch"]]
        assert e["loss"] == pytest.approx(np.mean([s["loss"] for s in own]), rel=1e-12)
        assert e["seconds"] == pytest.approx(sum(s["step_s"] for s in own))
        assert e["utts_per_s"] == pytest.approx(8 / e["seconds"])


def test_eval_events_score_the_whole_dev_split(finished):
    evals = events(finished[0], "eval")
    assert [(e["epoch"], e["step"]) for e in evals] == [(1, 4), (2, 8), (3, 12)]
    for e in evals:
        assert e.keys() >= {"epoch", "epochs", "hours", "wer", "cer", "errors", "words", "rtf",
                            "seconds"}
        assert e["words"] == len(" ".join(DEV_TEXTS).split())
        assert e["wer"] == e["errors"] / e["words"]
        assert e["rtf"] == pytest.approx(e["seconds"] / sum(DEV_SECONDS))
    epochs = events(finished[0], "epoch")
    for name in ("loss", "utts_per_s"):
        assert [e[name] for e in evals] == [e[name] for e in epochs]


def test_a_run_ends_after_its_epochs_and_says_so(finished):
    out, done = finished
    (end,) = events(out, "end")
    assert end["reason"] == "epochs"
    assert end["step"] == 12
    assert end["best_wer"] == min(e["wer"] for e in events(out, "eval"))
    ending, result = done.stdout.splitlines()[-2:]
    assert ending.startswith("end: epochs")
    assert re.fullmatch(
        r"RESULT,RNN_SPEECH_RECOGNITION,\d+,\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [AP]M", result
    )


def test_the_console_has_a_line_for_steps_epochs_evaluations_and_checkpoints(finished):
    number = r"[0-9]+\.[0-9]+"
    for line in (
        rf"epoch 1 \| iter 1/4 \| loss {number} \| utts/s {number} \| took {number} s \| "
        rf"lrate 8.00e-02 \| grad norm {number} \| data wait {number} s",
        rf"epoch 1 \| avg train utts/s {number} \| avg loss {number} \| took {number} s",
        rf"epoch 2 \| dev ema wer {number} % \| cer {number} % \| [0-9,]+ errors in 6 words \| "
        rf"rtf {number} \| took {number} s",
        r"wrote .*/checkpoint-00000012.pt( and best.pt)?",
        r"train: longer than 1.0 s: 1 of 9 dropped, .*",
        r"warning: a global batch of 2 is under 16: gradients are noisy; .*",
    ):
        assert re.search(rf"^{line}$", finished[1].stdout, re.MULTILINE), line


def score(model, tokenizer, corpus, features):
    """WER and CER of the dev split, in one batch."""
    utterances = data.read_split(corpus, "dev", features)
    dataset = data.SpeechDataset(utterances, None, features)
    texts, _ = decode.decode_batches(model, tokenizer, data.batch_loader(dataset, [[0, 1, 2]], 0))
    pairs = [texts[u.id] for u in utterances], [u.text for u in utterances]
    return [decode.error_rate(*count(*pairs))
            for count in (decode.word_errors, decode.char_errors)]


def test_best_is_the_averaged_model_of_the_first_lowest_wer(finished, corpus):
    out, _ = finished
    lowest = min(events(out, "eval"), key=lambda e: e["wer"])
    checkpoint = load_checkpoint(out / "best.pt")
    assert checkpoint["state"]["step"] == lowest["step"]
    model, tokenizer, features = decode.restore(checkpoint)
    assert score(model, tokenizer, corpus, features) == [lowest["wer"], lowest["cer"]]


def test_the_first_evaluation_that_reaches_the_target_ends_the_run(finished, corpus, tmp_path):
    wers = [e["wer"] for e in events(finished[0], "eval")]
    done = run_train(corpus, tmp_path / "run", "--target-wer", repr(min(wers)))
    assert done.returncode == 0, done.stderr
    logged = events(tmp_path / "run")
    assert [e["wer"] for e in logged if e["event"] == "eval"] == wers[: wers.index(min(wers)) + 1]
    assert logged[-1]["event"] == "end"
    assert logged[-1]["reason"] == "target wer"


def test_evaluations_may_be_some_epochs_apart(finished, corpus, tmp_path):
    done = run_train(corpus, tmp_path / "run", "--eval-epochs", 2)
    assert done.returncode == 0, done.stderr
    every = events(finished[0], "eval")
    assert [e["epoch"] for e in every] == [1, 2, 3]
    some = events(tmp_path / "run", "eval")
    assert [(e["epoch"], e["wer"]) for e in some] == [(e["epoch"], e["wer"]) for e in every[1:]]


def test_a_time_limit_between_two_epochs_is_evaluated(corpus, tmp_path):
    """An epoch has one step, so that the limit is noticed behind it."""
    done = run_train(corpus, tmp_path / "run", "--batch-size", 8, "--eval-epochs", 3,
                     "--time-limit-s", 1e-6)
    assert done.returncode == 75, done.stderr
    assert [e["epoch"] for e in events(tmp_path / "run", "eval")] == [1]


def test_a_command_line_that_is_wrong_ends_with_status_2(corpus, tmp_path):
    done = run_train(corpus, tmp_path / "run", "--lr", "-0.5")
    assert done.returncode == 2
    assert "lr: -0.5, expected more than 0" in done.stderr
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- steps of an epoch


@pytest.fixture(scope="module")
def tiny(corpus):
    """The three configs and the tokenizer of a run on the tiny corpus."""
    cfg, model_cfg, features = parse_configs(["--data", str(corpus), "--out", "", *TINY])
    tokenizer = data.Tokenizer(data.train_tokenizer(TRAIN_TEXTS, model_cfg.vocab_size))
    return cfg, replace(model_cfg, vocab_size=tokenizer.vocab_size), features, tokenizer


@pytest.fixture(scope="module")
def epoch_ids(corpus, tiny):
    """epoch_ids(...) -> ids of the utterances of every step of an epoch of the tiny corpus."""
    cfg, _, features, tokenizer = tiny
    utterances = data.read_split(corpus, "train", features)[:8]

    def ids(epoch=1, ranks=ALONE, **changes):
        steps = train.epoch_steps(utterances, tokenizer, features, replace(cfg, **changes), ranks,
                                  epoch)
        return [[batch.ids for batch in step] for step in steps]

    return ids


def test_every_epoch_has_all_utterances_in_an_order_of_its_own(epoch_ids):
    orders = [[ids for (ids,) in epoch_ids(epoch)] for epoch in (1, 2, 3)]
    for order in orders:
        assert [len(ids) for ids in order] == [2] * 4
        assert sorted(sum(order, [])) == [f"1-2-{i:04d}" for i in range(8)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [ids for (ids,) in epoch_ids(1)] == orders[0]


def test_the_tables_of_the_front_end_are_made_before_the_workers(epoch_ids):
    """Otherwise every worker would make them anew in every epoch."""
    front_end.coloured_noise.cache_clear()
    epoch_ids()  # its flags add no noise
    assert front_end.coloured_noise.cache_info().currsize == 2


def test_ranks_and_micro_batches_share_the_utterances_of_a_step(epoch_ids):
    big = [ids for (ids,) in epoch_ids()]
    first, second = (epoch_ids(ranks=Ranks(r, 2, r), batch_size=1) for r in range(2))
    together = [sorted(a + b) for (a,), (b,) in zip(first, second, strict=True)]
    assert together == [sorted(ids) for ids in big]
    assert [a + b for a, b in epoch_ids(batch_size=1, accumulation=2)] == big
    for rank, alone in enumerate((first, second)):
        assert epoch_ids(ranks=Ranks(rank, 2, rank), share_batch=True) == alone


def test_batches_hold_utterances_that_are_equally_long_after_speed_perturbation(monkeypatch):
    utterances = [data.Utterance(str(i), "", 1 + i / 8, "A") for i in range(40)]
    cfg, calls = make_trainer(batch_size=4).cfg, []
    monkeypatch.setattr(data, "batch_loader", lambda *args: calls.append(args) or iter([]))
    steps = train.epoch_steps(utterances, None, FeatureConfig(num_buckets=5), cfg, ALONE, 1)
    assert list(steps) == []
    ((dataset, batches, workers, timeout_s),) = calls
    assert (workers, timeout_s) == (cfg.loader_workers, cfg.timeout_s / 2)
    assert (dataset.seed, dataset.epoch) == (cfg.seed, 1)

    def are_from(buckets):
        return all(any(set(batch) <= set(b) for b in buckets) for batch in batches)

    assert len(batches) == 10
    assert are_from(np.array_split(np.argsort(dataset.durations_s()), 5))
    assert not are_from(np.array_split(np.arange(40), 5))  # of the recorded durations


def test_evaluation_scores_the_averaged_weights(corpus, tiny):
    cfg, model_cfg, features, tokenizer = tiny
    trainer = train.make_trainer(cfg, model_cfg, ALONE)
    with torch.no_grad():
        for model, bias in ((trainer.ema, 1e4), (trainer.model, -1e4)):
            model.joint_network.output.bias[model.cfg.blank] = bias
    dev = data.read_split(corpus, "dev", features)
    result = train.evaluate(trainer, tokenizer, dev, features)
    # The averaged model emits blank only: all words are missing. The other never emits blank.
    assert (result["errors"], result["words"], result["wer"]) == (6, 6, 1.0)
