# SPDX-License-Identifier: Apache-2.0
"""The CTC head finds the alignment: its loss, its epochs, and the schedules of a short run.

    python -m pytest tests/test_ctc.py

The CTC loss is compared with the sum over all alignments. Steps run in float64: accumulation
and two ranks repeat one big batch to the rounding.
"""

import contextlib
import io
import itertools
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tones import REPO, TINY, events, run_here

import decode
import loss
import train
from checkpoint import digest, load_checkpoint
from data import Batch
from features import FeatureConfig, features, spec_augment, warp_mels
from loss import ctc_loss
from model import ModelConfig, Transducer
from ranks import Ranks, start_ranks
from recipe import TrainConfig, parse_configs

MODEL = ModelConfig(
    feature_size=6, vocab_size=5, enc_hidden=8, pre_layers=1, stack=3, post_layers=1,
    pred_hidden=4, pred_layers=1, joint_hidden=6, normalization=True, ctc_split=2, char_head=True,
)
CTC = ["--ctc-epochs", "1", "--ctc-weight", "0.5", "--ctc-split", "4", "--char-weight", "0.25",
       "--epochs", "4", "--stack", "2", "--ramp-begin", "1", "--ramp-epochs", "2",
       "--hold-share", "0.5", "--weight-decay", "0", "--lr", "0.01", "--lattice-band", "1"]
ALONE = Ranks(0, 1, 0)

# --------------------------------------------------------------------------------------- the loss


def brute_force_ctc(log_probs, target, blank):
    """-log of the sum over all alignments: class sequences that collapse to the target."""
    N, V = log_probs.shape
    total = 0.0
    for path in itertools.product(range(V), repeat=N):
        collapsed = [k for k, _ in itertools.groupby(path) if k != blank]
        if collapsed == target:
            total += math.exp(sum(float(log_probs[n, k]) for n, k in enumerate(path)))
    return -math.log(total)


@pytest.mark.parametrize("target", [[], [0], [0, 1], [1, 1], [2, 0, 2]])
def test_ctc_loss_is_the_sum_over_all_alignments_N5_V4(target):
    logits = torch.randn(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    costs, has_alignment = ctc_loss(logits, torch.tensor([target], dtype=torch.int64),
                                    torch.tensor([5]), torch.tensor([len(target)]), blank=3)
    expected = brute_force_ctc(logits[0].log_softmax(-1), target, 3)
    assert costs.item() == pytest.approx(expected, rel=1e-9)
    assert has_alignment.tolist() == [True]


def test_ctc_loss_of_an_utterance_without_alignment_is_zero_and_counted():
    logits = torch.randn(3, 4, 5, requires_grad=True)
    # Two equal labels need a blank between them: three labels and two repeats take five positions.
    targets = torch.tensor([[1, 1, 1], [1, 2, 1], [1, 1, 2]])
    costs, has_alignment = ctc_loss(logits, targets, torch.tensor([4, 3, 4]),
                                    torch.tensor([3, 3, 3]), blank=4)
    assert has_alignment.tolist() == [False, True, True]
    assert costs[0] == 0
    assert (costs[1:] > 0).all()
    costs.sum().backward()
    assert not logits.grad[0].any()


def test_ctc_loss_does_not_depend_on_padding():
    logits = torch.randn(2, 6, 5, dtype=torch.float64)
    targets = torch.tensor([[1, 2, 3], [0, 0, 0]])
    args = targets, torch.tensor([6, 4]), torch.tensor([3, 1])
    padded = logits.clone()
    padded[1, 4:] = 1e6
    other = targets.clone()
    other[1, 1:] = 3
    expected = ctc_loss(logits, *args, blank=4)[0]
    assert torch.equal(ctc_loss(padded, other, *args[1:], blank=4)[0], expected)


# ----------------------------------------------------------------------------------- the CTC head


def test_the_head_has_split_positions_per_encoder_frame():
    model = Transducer(MODEL).eval()
    outputs = model(torch.randn(2, 7, 6), torch.tensor([7, 4]), torch.zeros(2, 0), ctc_alone=True)
    assert outputs.ctc_logits.shape == (2, 3 * 2, 5)
    assert outputs.ctc_lens.tolist() == [6, 4]
    assert outputs.encoded is outputs.predicted is None


def test_the_head_is_the_only_difference_in_parameters():
    names = Transducer(MODEL).state_dict().keys()
    for head, off in ("ctc_head", dict(ctc_split=0)), ("char_head", dict(char_head=False)):
        without = Transducer(replace(MODEL, **off)).state_dict().keys()
        assert without < names
        assert names - without == {f"{head}.weight", f"{head}.bias"}


def test_the_head_of_characters_sees_the_frames_before_stack_time():
    model = Transducer(MODEL).eval()
    feats, lens = torch.randn(2, 7, 6), torch.tensor([7, 4])
    outputs = model(feats, lens, torch.zeros(2, 1, dtype=torch.int64))
    assert outputs.char_logits.shape == (2, 7, 5)
    assert outputs.char_lens.tolist() == [7, 4]
    alone = model(feats[1:, :4], lens[1:], torch.zeros(1, 1, dtype=torch.int64))
    torch.testing.assert_close(outputs.char_logits[1:, :4], alone.char_logits)
    with torch.no_grad():
        for parameter in model.encoder.post.parameters():
            parameter.zero_()
    changed = model(feats, lens, torch.zeros(2, 1, dtype=torch.int64))
    assert torch.equal(changed.char_logits, outputs.char_logits)
    assert not torch.equal(changed.ctc_logits, outputs.ctc_logits)


def test_ctc_greedy_decode_collapses_repeats_and_drops_blanks(monkeypatch):
    model = Transducer(MODEL).eval()
    classes = torch.tensor([[1, 1, 4, 1, 2, 2, 4, 0], [4, 4, 3, 3, 3, 0, 0, 0]])
    logits = torch.nn.functional.one_hot(classes, 5).float()
    lens = torch.tensor([8, 4])
    outputs = SimpleNamespace(ctc_logits=logits, ctc_lens=lens)
    monkeypatch.setattr(model, "forward", lambda *_, **__: outputs)
    assert decode.ctc_greedy_decode(model, torch.zeros(2, 8, 6), lens) == [[1, 1, 2, 0], [3]]


def test_scale_dropout_sets_every_network():
    model = Transducer(replace(MODEL, enc_dropout=0.4, pred_dropout=0.2, joint_dropout=0.6))
    model.scale_dropout(0.5)
    assert model.encoder.pre.dropout.p == model.encoder.post.dropout.p == 0.2
    assert model.predictor.rnn.dropout.p == 0.1
    assert model.joint_network.dropout.p == 0.3


# ---------------------------------------------------------------------------------- the schedules


def config(**changes):
    return TrainConfig(data=".", train_splits=("x",), dev_split="x", out=".", **changes)


@pytest.mark.parametrize(("epochs", "expected"), [(40, 5), (20, 5), (12, 3), (4, 1), (3, 0)])
def test_the_ctc_head_is_trained_alone_for_at_most_a_quarter_of_the_epochs(epochs, expected):
    cfg = config(ctc_epochs=5, epochs=epochs)
    assert sum(cfg.is_ctc_alone(epoch) for epoch in range(1, epochs + 1)) == expected


def test_the_band_is_hard_in_the_first_epoch_after_the_ctc_head_alone():
    for ctc_epochs, epochs, expected in ((5, 40, [6]), (5, 12, [4]), (5, 3, []), (0, 12, [])):
        cfg = config(ctc_epochs=ctc_epochs, epochs=epochs)
        assert [e for e in range(1, epochs + 1) if cfg.is_band_hard(e)] == expected


def test_strength_grows_between_the_ends_of_the_ramp():
    cfg = config(ramp_begin=2, ramp_epochs=4)
    assert [cfg.strength(epoch) for epoch in range(1, 8)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert config().strength(1) == 1


def test_without_ctc_flags_there_is_no_head():
    needed = ["--data", ".", "--train-splits", "x", "--dev-split", "x", "--out", "."]
    for argv, has_head in ([], False), (["--ctc-weight", "0.1"], True):
        cfg, model_cfg, _ = parse_configs([*needed, "--preset", "baseline", *argv])
        trainer = train.make_trainer(cfg, replace(model_cfg, enc_hidden=8), ALONE)
        assert (trainer.model.ctc_head is not None) == has_head


# ---------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("strength", [0.0, 0.25])
def test_strength_bounds_the_widths_of_spec_augment(strength):
    cfg = FeatureConfig(freq_masks=1, time_masks=1)
    for seed in range(50):
        mels = spec_augment(torch.ones(400, 80), np.random.default_rng(seed), cfg, strength)
        assert (mels == 0).all(0).sum() <= 20 * strength  # bins
        assert (mels == 0).all(1).sum() <= 12 * strength  # frames, 3 % of 400


def test_warp_mels_reads_bins_at_scaled_places():
    cfg = FeatureConfig(mel_warp=0.1)
    mels = torch.arange(80.0).repeat(3, 1)  # the value of a bin is its index
    factor = 1 + np.random.default_rng(7).uniform(-0.1, 0.1)
    warped = warp_mels(mels, np.random.default_rng(7), cfg)
    expected = (torch.arange(80.0) * factor).clamp_max(79)
    torch.testing.assert_close(warped[0], expected, rtol=0, atol=1e-4)


def test_features_of_training_are_warped():
    samples = np.random.default_rng(1).standard_normal(8000).astype(np.float32)
    plain, warped = (features(samples, FeatureConfig(mel_warp=share), np.random.default_rng(2))
                     for share in (0.0, 0.1))
    assert not torch.equal(plain, warped)


# ------------------------------------------------------------------------------------------ steps


def make_batch(*numbers):
    """Utterances of six to nine frames and one to three labels, a function of their numbers."""
    feat_lens = torch.tensor([6 + n % 4 for n in numbers])
    target_lens = torch.tensor([1 + n % 3 for n in numbers])
    feats = torch.zeros(len(numbers), 9, 6)
    targets = torch.zeros(len(numbers), 3, dtype=torch.int64)
    for row, n in enumerate(numbers):
        generator = torch.Generator().manual_seed(n)
        feats[row, : feat_lens[row]] = torch.randn(int(feat_lens[row]), 6, generator=generator)
        targets[row, : target_lens[row]] = torch.randint(0, 4, (int(target_lens[row]),),
                                                         generator=generator)
    ids = [f"u{n}" for n in numbers]
    return Batch(feats, feat_lens, targets, target_lens, targets, target_lens, ids,
                 len(numbers))


def make_trainer(ranks=ALONE, **changes):
    cfg = config(precision="fp32", ctc_epochs=1, ctc_weight=0.5, char_weight=0.25, epochs=4,
                 weight_decay=0.0, batch_size=2, **changes)
    return train.make_trainer(cfg, replace(MODEL, enc_dropout=0.0, pred_dropout=0.0,
                                           joint_dropout=0.0), ranks)


def run_two_epochs(trainer, split):
    """Three steps with the CTC head alone, three with both losses: their results."""
    results = []
    for epoch in (1, 2):
        trainer = train.begin_epoch(trainer, epoch)
        for step in range(3):
            batches = [make_batch(*numbers) for numbers in split([4 * step + i for i in range(4)])]
            results.append(train.train_step(trainer, batches, 3 * epoch + step, 0.02))
    return [tuple(r) for r in results]


def weights_of(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def assert_same(ours, expected):
    for name, x in ours.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-8, atol=1e-10, msg=name)


def test_the_loss_is_the_weighted_sum(float64):
    trainer = train.begin_epoch(make_trainer(), 2)
    result = train.train_step(trainer, [make_batch(1, 2)], 1, 0.0)
    ctc = result.ctc_loss + 0.25 * result.char_loss
    assert result.loss == pytest.approx(result.transducer_loss + 0.5 * ctc, rel=1e-12)
    assert min(result.transducer_loss, result.ctc_loss, result.char_loss) > 0


def test_the_ctc_heads_alone_move_the_encoder_and_themselves_alone(float64):
    trainer = make_trainer()
    before = weights_of(trainer)
    result = train.train_step(trainer, [make_batch(1, 2)], 1, 0.02)
    assert result.loss == pytest.approx(result.ctc_loss + 0.25 * result.char_loss, rel=1e-12)
    assert result.transducer_loss == 0
    moved = {name.split(".")[0] for name, x in weights_of(trainer).items()
             if not torch.equal(x, before[name])}
    assert moved == {"encoder", "ctc_head", "char_head"}


def test_all_parameters_move_once_the_transducer_is_trained(float64):
    trainer = make_trainer()
    run_two_epochs(trainer, lambda numbers: [numbers])
    assert all(p.requires_grad and p.grad is not None for p in trainer.model.parameters())
    steps = {state["step"] for state in trainer.optimizer.state.values()}
    assert steps == {3, 6}  # bias correction counts each tensor's own steps


def test_a_band_as_wide_as_the_lattice_changes_nothing(float64):
    expected = run_two_epochs(make_trainer(), lambda numbers: [numbers])
    assert run_two_epochs(make_trainer(lattice_band=9), lambda numbers: [numbers]) == expected


def test_a_step_tells_which_share_of_the_nodes_it_computed(float64, monkeypatch):
    """The band leaves out one node of each lattice: all labels emitted in the first frame."""
    def all_but_one(logits, targets, enc_lens, target_lens, *_):
        band = loss.inside_lattice(int(enc_lens.max()), targets.shape[1] + 1, enc_lens, target_lens)
        band[torch.arange(len(targets)), 0, target_lens] = False
        return band

    monkeypatch.setattr("step.ctc_band", all_but_one)
    trainer, batch = make_trainer(lattice_band=1), make_batch(1, 4)
    nodes = trainer.model.num_frames(batch.feat_lens) * (batch.target_lens + 1)
    # The band is hard in the transducer's first epoch. After it these paths come too near to its
    # border, since the weights are random.
    for epoch, expected in ((2, (1 - 1 / nodes).mean().item()), (3, 1)):
        trainer = train.begin_epoch(trainer, epoch)
        share = train.train_step(trainer, [batch], 1, 0.0).share_of_nodes
        assert share == pytest.approx(expected)


def test_accumulated_steps_equal_big_ones(float64):
    alone, split = make_trainer(lattice_band=1), make_trainer(lattice_band=1, accumulation=2)
    expected = run_two_epochs(alone, lambda numbers: [numbers])
    results = run_two_epochs(split, lambda numbers: [numbers[:2], numbers[2:]])
    np.testing.assert_allclose(results, expected, rtol=1e-9)
    assert_same(weights_of(split), weights_of(alone))


def rank_main(folder):
    """Runs in each of two processes and writes its results to <folder>/rank<r>.pt."""
    torch.set_default_dtype(torch.float64)
    ranks, _ = start_ranks(expected=2, timeout_s=60)
    trainer = make_trainer(ranks, lattice_band=1)
    results = run_two_epochs(trainer, lambda numbers: [numbers[ranks.rank :: 2]])
    torch.save((results, weights_of(trainer)), Path(folder) / f"rank{ranks.rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_with_twice_the_batch(tmp_path, float64):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    command = [sys.executable, "-c", f"import test_ctc; test_ctc.rank_main({str(tmp_path)!r})"]
    processes = [subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                                  stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [p.communicate(timeout=300)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    alone = make_trainer(lattice_band=1)
    expected = run_two_epochs(alone, lambda numbers: [numbers])
    for rank in range(2):
        results, weights = torch.load(tmp_path / f"rank{rank}.pt")
        np.testing.assert_allclose(results, expected, rtol=1e-9)
        assert_same(weights, weights_of(alone))


# ------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as console:
        assert run_here("--data", corpus, "--out", out, *TINY, *CTC, "--log-every", "1") == 0
    (out / "console").write_text(console.getvalue())
    return out


def test_both_losses_stand_in_the_log(finished):
    first, *_, last = events(finished, "step")
    first_ctc, last_ctc = (e["ctc_loss"] + 0.25 * e["char_loss"] for e in (first, last))
    assert first["loss"] == pytest.approx(first_ctc, rel=1e-6)
    assert first["transducer_loss"] == 0
    assert last["loss"] == pytest.approx(last["transducer_loss"] + 0.5 * last_ctc, rel=1e-6)
    # While the CTC heads are trained alone, no lattice has a share of nodes.
    assert "share_of_nodes" not in first
    assert 0 < last["share_of_nodes"] <= 1


def test_the_console_shows_the_ctc_loss(finished):
    console = (finished / "console").read_text()
    for part in ("| ctc loss ", "| char loss ", "dev ema ctc wer"):
        assert part in console


def test_the_first_evaluation_scores_the_ctc_head_and_is_not_the_best(finished):
    evals = events(finished, "eval")
    assert [e["search"] for e in evals] == ["ctc", "transducer", "transducer", "transducer"]
    best = load_checkpoint(finished / "best.pt")["state"]["best_wer"]
    assert best == min(e["wer"] for e in evals[1:])


@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_a_run_that_stops_resumes_bit_for_bit(stop_after, corpus, finished, tmp_path):
    """In the CTC epoch, between it and the next, and in the middle of the next."""
    def stop(*args, **kwargs):
        result = train_step(*args, **kwargs)
        if args[2] == stop_after:
            raise KeyboardInterrupt
        return result

    argv = ["--data", corpus, "--out", tmp_path, *TINY, *CTC, "--checkpoint-every-s", "0"]
    train_step = train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_here(*argv)
    assert run_here(*argv, "--resume") == 0
    for field in ("loss", "ctc_loss", "char_loss", "lr", "grad_norm"):
        ours, expected = ([e[field] for e in events(out, "step")] for out in (tmp_path, finished))
        assert ours == expected, field
    ours, expected = (load_checkpoint(out / "checkpoint-00000016.pt")
                      for out in (tmp_path, finished))
    for part in ("model", "ema", "optimizer"):
        assert digest(ours[part]) == digest(expected[part]), part
