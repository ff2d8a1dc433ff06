# SPDX-License-Identifier: Apache-2.0
"""The project gives the numbers of other implementations, recorded in ../shared.

    python -m pytest -m "not slow" tests/test_oracles.py
    python -m pytest -m slow tests/test_oracles.py        # trains on recordings

../shared/oracles holds outputs of the original (intel/e2eAIOK, modelzoo/rnnt/pytorch) and of the
libraries it calls, and MLPerf's published logs; its README.md says how each was made.
../shared/librispeech holds recordings and the durations of train-clean-100. Without these folders
the whole file is skipped. Sections follow the signal: features, sampler, model, loss, search,
optimiser, MLPerf, whole runs.
"""

import gzip
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import seedrun
import soundfile
import test_loss
import torch
from test_data import check_order, draw_order, durations
from test_features import noise
from test_loss import Problem, assert_close, both, costs_and_grad
from test_mllog import CLOSED, judge, one, read, run_main, write_links
from test_optimizer import as_parameters
from test_recipe import CONSTANTS, parse
from tones import SIMPLE, TINY, run_script, tiny_corpus
from torch import Tensor

import data
import decode
import features
from features import FeatureConfig
from loss import joint_transducer_loss, transducer_loss
from model import StackTime, Transducer
from optimizer import Lamb, clip_gradients, lr_at
from tools import measure

SHARED = Path(__file__).resolve().parents[2] / "shared"
ORACLES, LIBRISPEECH = SHARED / "oracles", SHARED / "librispeech"
for folder in (ORACLES, LIBRISPEECH):
    if not folder.is_dir():
        pytest.skip(f"../shared/{folder.name} is not here", allow_module_level=True)


def oracle(name: str):
    return json.loads((ORACLES / name).read_text(encoding="utf-8"))


# -------------------------------------------------------------------- DALI, operator by operator

# NVIDIA DALI 1.26.0 computed the features of nine recordings, called as the original calls it.
DALI = dict(np.load(ORACLES / "dali" / "dali_golden.npz"))
DALI_FACTS = oracle("dali/dali_golden_meta.json")
RECORDINGS = list(DALI_FACTS["cases"])
WITH_STEPS = [name for name in RECORDINGS if f"{name}/power_spec" in DALI]
each_recording = pytest.mark.parametrize("name", RECORDINGS)
each_recording_with_steps = pytest.mark.parametrize("name", WITH_STEPS)


def test_dali_has_nine_recordings_and_the_steps_of_four():
    assert DALI_FACTS["dali"] == "1.26.0"
    assert (len(RECORDINGS), len(WITH_STEPS)) == (9, 4)


@each_recording
@pytest.mark.filterwarnings("ignore:audio of")
def test_decoded_samples_are_dalis(tmp_path, name):
    path, expected = tmp_path / "recording.wav", DALI[f"{name}/decoded"]
    soundfile.write(path, DALI[f"{name}/pcm"], DALI_FACTS["cases"][name]["sr"], subtype="PCM_16")
    samples = features.load_audio(path)
    assert samples.shape == expected.shape
    if name == "G_8kHz":
        # The resamplers differ: soxr here, a sinc of 16 lobes there. The signal's deviation is
        # 0.106, and it starts at once, so the ends differ most.
        assert np.sqrt(np.mean((samples - expected) ** 2)) < 1e-3
        assert np.abs(samples - expected)[50:-50].max() < 3e-3
    else:
        assert np.array_equal(samples, expected)


@each_recording
def test_trimmed_samples_are_dalis(name):
    decoded = DALI[f"{name}/decoded"]
    begin, length = (DALI_FACTS["cases"][name][f"nonsilent_{x}"] for x in ("begin", "length"))
    assert np.array_equal(features.trim_silence(decoded), decoded[begin : begin + length])


def test_window_and_filterbank_are_dalis():
    window, mel = features.mel_filters(features.DEFAULT)
    assert np.abs(window.numpy() - DALI["stft_window_320"]).max() < 1e-7
    assert np.abs(mel.T.numpy() - DALI["mel_matrix_80x257"]).max() < 1e-7


@each_recording_with_steps
def test_preemphasis_is_dalis(monkeypatch, name):
    # Frames of one sample and a single filter of weight 1 make log_mel the logarithm of squares.
    cfg = FeatureConfig(window=1, hop=1, fft_size=1, num_mels=1, freq_mask_max=0)
    monkeypatch.setattr(features, "mel_filters", lambda cfg: (torch.ones(1), torch.ones(1, 1)))
    squares = features.log_mel(DALI[f"{name}/decoded"], cfg).exp()[:, 0].numpy()
    expected = np.square(DALI[f"{name}/preemph"])
    # exp(log(x)) in float32 loses 1e-6 relative; 1e-20 is the floor.
    assert np.abs(squares - expected).max() < 1e-5 * expected.max()
    assert np.abs(np.sqrt(squares) - np.sqrt(expected)).max() < 2e-6


@each_recording_with_steps
def test_power_spectrum_is_dalis(monkeypatch, name):
    # With the identity as filterbank, log_mel gives the logarithm of the spectrum.
    window = torch.from_numpy(DALI["stft_window_320"])
    monkeypatch.setattr(features, "mel_filters", lambda cfg: (window, torch.eye(257)))
    power = features.log_mel(DALI[f"{name}/decoded"]).exp().T.numpy()
    expected = DALI[f"{name}/power_spec"]
    # The transform in float32 loses 4e-7 of the frame's largest bin, exp(log(x)) 3e-6 relative.
    assert (np.abs(power - expected) < 1e-6 * expected.max(0) + 1e-5 * expected).all()


@each_recording
def test_log_mel_is_dalis(name):
    mels = features.log_mel(features.trim_silence(DALI[f"{name}/decoded"])).T.numpy()
    assert mels.shape == tuple(DALI_FACTS["cases"][name]["shape"])
    assert mels.shape[1] == DALI_FACTS["cases"][name]["n_frames"]
    # DALI adds up power in float32 and is 1.5e-4 away from float64. Audio of 8 kHz leaves hardly
    # any power in the upper filters, whose logarithm is sensitive to rounding.
    tolerance = 3e-2 if name == "G_8kHz" else 2e-4
    assert np.abs(mels - DALI[f"{name}/logmel"]).max() < tolerance


@each_recording
def test_normalisation_of_dalis_log_mel_is_dalis(name):
    result = features.normalize(torch.from_numpy(DALI[f"{name}/logmel"].T.copy())).T.numpy()
    if name == "I_zeros":  # all bins are constant; DALI divides one rounding error by another
        assert not result.any()
    else:
        assert np.abs(result - DALI[f"{name}/norm"]).max() < 5e-5


@each_recording
def test_features_are_dalis_within_1e_4(name):
    expected = DALI[f"{name}/norm"]
    frames = expected.shape[1]
    feats = features.features(DALI[f"{name}/decoded"], FeatureConfig(dither=0.0))  # DALI had none
    feats = feats[:, :240].reshape(-1, 80)[:frames].T.numpy()
    if name == "I_zeros":
        # All bins are constant: 0, as DALI's definition says. DALI itself divides one rounding
        # error by another and gives 1.
        assert not feats.any()
        assert np.abs(expected - 1).max() < 1e-6
        return
    # The filters from 57 on lie above 4 kHz, where audio of 8 kHz has hardly any power.
    tolerance = np.where(np.arange(80) < 57, 1e-4, 1e-2 if name == "G_8kHz" else 1e-4)
    assert (np.abs(feats - expected).max(1) < tolerance).all()


@pytest.mark.parametrize("factor", ["0.85", "0.90", "0.95", "1.00", "1.05", "1.10", "1.15"])
def test_speed_perturbation_is_dalis(factor):
    samples = DALI["speed/pcm"] / np.float32(32768)
    changed, expected = features.change_speed(samples, float(factor)), DALI[f"speed/{factor}"]
    assert len(changed) == len(expected) == DALI_FACTS["speed_len"][factor]
    # DALI's sinc has 16 lobes and passes the band above the new limit, which ours removes. The
    # signal's deviation is 0.059; a shift by half a sample would give an rms of 0.02.
    assert np.sqrt(np.mean((changed - expected) ** 2)) < (1.2e-3 if float(factor) < 1 else 1.2e-4)
    assert np.abs(changed - expected).max() < (4e-3 if float(factor) < 1 else 5e-4)
    if factor == "1.00":
        assert np.array_equal(changed, expected)


def test_lengths_after_speed_perturbation_are_dalis():
    for n, lengths in DALI_FACTS["speed_len_n"].items():
        for factor, length in lengths.items():
            assert len(features.change_speed(noise(int(n)), float(factor))) == length, (n, factor)


# ------------------------------------------------------------------- frames, masks and batch order


def test_numbers_of_frames_from_samples_to_encoder_are_the_originals():
    vectors = oracle("misc_oracles.json")["frame_chain"]["vectors"]
    assert len(vectors) == 7
    for v in vectors:
        mels = features.log_mel(noise(v["samples"]))
        spliced = features.splice(mels)
        stacked = [StackTime(factor)(spliced[None]).shape[1] for factor in (2, 8)]
        expected = [v[k] for k in ("frames", "spliced", "stack2", "stack8")]
        assert [len(mels), len(spliced), *stacked] == expected


@pytest.mark.parametrize(("b", "n"), [(0, 8), (1, 5)])
def test_splicing_and_alignment_are_the_originals(b, n):
    # The original has the bins before the frames: (B, 4, 8). It pads 3 * 4 features to 32.
    arrays, num_frames = seedrun.arrays(), seedrun.facts()["splice_lens"][b]
    spliced = features.splice(arrays["splice_in"][b, :, :n].T,
                              FeatureConfig(num_mels=4, freq_mask_max=1))
    assert torch.equal(spliced[:, :12], arrays["splice_out"][b, :, :num_frames].T)
    assert torch.equal(spliced, arrays["padalign_out"][b, :, :num_frames].T)


def test_sampler_of_the_original_had_our_durations_and_size():
    assert durations(103) == seedrun.facts()["sampler_in"]["durations"]
    assert draw_order().size == 96
    assert {s["dataset_size"] for s in seedrun.facts()["samplers"].values()} == {96}


@pytest.mark.parametrize(("name", "columns"), [("bucketing_ws1", 8), ("bucketing_ws2_rank0", 4)])
def test_orders_of_the_original_obey_our_rules_of_an_epoch(name, columns):
    # Two epochs. Rank 0 of 2 took samples 0, 2, 4 and 6 of each batch of eight.
    labels = seedrun.facts()["samplers"][name]["labels"]
    epochs = np.array(labels).reshape(2, 12, columns)
    for epoch in epochs:
        check_order(epoch, durations(103), 8)
    assert not np.array_equal(*epochs)


def train_clean_100() -> list[list[str]]:
    """Utterance id, duration in seconds and text of each utterance."""
    with gzip.open(LIBRISPEECH / "train-clean-100.tsv.gz", "rt", encoding="utf-8") as lines:
        next(lines)  # the names of the columns
        return [line.rstrip("\n").split("\t") for line in lines]


def test_train_clean_100_loses_286_utterances():
    kept, note = data.drop_long([
        data.Utterance(name, f"{name}.flac", float(seconds), text)
        for name, seconds, text in train_clean_100()
    ])
    assert note == "286 of 28,539 dropped, 1.3 h"
    assert len(kept) == 28253


@pytest.mark.slow
def test_stored_shapes_of_the_bench_are_drawn_from_train_clean_100():
    # The tokenizer's training takes a minute.
    rows = train_clean_100()
    tokenizer = data.Tokenizer(data.train_tokenizer((text for _, _, text in rows), 1024))
    rows = [row for row in rows if float(row[1]) <= features.DEFAULT.max_utterance_s]
    seconds = np.array([float(row[1]) for row in rows])
    labels = np.array([len(tokenizer.encode(row[2])) for row in rows])
    buckets = []
    for bucket in np.array_split(np.argsort(seconds, kind="stable"), 6):
        buckets.append([])
        for i, part in enumerate(np.array_split(bucket, 32)):
            part = part[np.argsort(labels[part], kind="stable")]
            chosen = part[int((i * 11 % 32 + 0.5) / 32 * len(part))]
            buckets[-1].append((round(float(seconds[chosen]), 2), int(labels[chosen])))
    assert measure.read_shapes() == (buckets, len(rows))


# -------------------------------------------------------------- a tiny model of the original

# The original ran in float32 and summed at most some hundred terms.
close = partial(torch.testing.assert_close, rtol=1e-5, atol=2e-6)
both_losses = pytest.mark.parametrize("fused", [False, True], ids=["logits", "joint"])


@pytest.fixture(scope="module")
def original():
    """The model in float64 and its outputs: model, encoded, enc_lens, predicted."""
    model = seedrun.model("w/").double()
    feats, lens = seedrun.features("", model.cfg.stack)
    encoded, enc_lens = model.encode(feats.double(), lens)
    return model, encoded, enc_lens, model.predict(seedrun.arrays()["y"])


def cost_of(original, fused: bool, reduction: str) -> Tensor:
    model, encoded, enc_lens, predicted = original
    rest = (seedrun.arrays()["y"], enc_lens, seedrun.arrays()["y_lens"], model.cfg.blank)
    if not fused:
        return transducer_loss(model.joint(encoded, predicted), *rest, reduction)
    output = model.joint_network.output
    return joint_transducer_loss(encoded, predicted, output.weight, output.bias, *rest,
                                 reduction=reduction)


def test_encoder_output_is_the_originals(original):
    _, encoded, enc_lens, _ = original
    expected = seedrun.arrays()["enc_out"].double()
    assert enc_lens.tolist() == seedrun.arrays()["enc_lens"].tolist()
    for b, n in enumerate(enc_lens.tolist()):
        close(encoded[b, :n], expected[b, :n])


def test_predictor_output_is_the_originals(original):
    expected = seedrun.arrays()["pred_out"].double()
    for b, u in enumerate(seedrun.arrays()["y_lens"].tolist()):
        close(original[3][b, : u + 1], expected[b, : u + 1])


def test_logits_are_the_originals(original):
    model, encoded, enc_lens, predicted = original
    logits, expected = model.joint(encoded, predicted), seedrun.arrays()["logits"].double()
    for b, (n, u) in enumerate(zip(enc_lens, seedrun.arrays()["y_lens"], strict=True)):
        close(logits[b, :n, : u + 1], expected[b, :n, : u + 1])


@both_losses
def test_loss_is_the_originals(original, fused):
    each, mean = (cost_of(original, fused, r).tolist() for r in ("none", "mean"))
    # warp-transducer sums in float32.
    assert each == pytest.approx(seedrun.facts()["loss_each"], rel=1e-6)
    assert mean == pytest.approx(seedrun.facts()["loss_mean"], rel=1e-6)


@both_losses
def test_every_gradient_is_the_originals(original, fused):
    named = dict(original[0].named_parameters())
    cost = cost_of(original, fused, "mean")
    grads = torch.autograd.grad(cost, list(named.values()), retain_graph=True)
    expected = seedrun.by_our_names("g/")
    assert expected.keys() == named.keys()
    for name, grad in zip(named, grads, strict=True):
        torch.testing.assert_close(grad, expected[name].double(), rtol=2e-5, atol=3e-6, msg=name)
    total = torch.stack([g.norm() for g in grads]).norm().item()
    assert total == pytest.approx(seedrun.facts()["grad_total_norm"], rel=1e-6)
    norms = {seedrun.our_name(k): v for k, v in seedrun.facts()["grad_l2"].items()}
    ours = {name: g.norm().item() for name, g in zip(named, grads, strict=True)}
    assert ours == pytest.approx(norms, rel=1e-4)


def test_stack_time_is_the_originals():
    x = seedrun.arrays()["stack_in"].transpose(0, 1)  # time-first in the original
    assert torch.equal(StackTime(3)(x), seedrun.arrays()["stack_out"].transpose(0, 1))
    lens = Transducer(seedrun.config(stack=3)).num_frames(torch.tensor([7, 5]))
    assert lens.tolist() == seedrun.facts()["stack_lens"]


def test_initialisation_is_the_originals():
    torch.manual_seed(0)
    model, init = Transducer(seedrun.config()), seedrun.facts()["init"]
    lstm = model.encoder.pre.layers[0]
    for name in ("bias_ih_l0", "bias_hh_l0"):
        assert getattr(lstm, name)[8:16].tolist() == init[f"{name} forget slice"]
    bound = init["bound 0.5/sqrt(H)"]
    others = torch.cat([lstm.bias_ih_l0[:8], lstm.bias_ih_l0[16:]])
    assert 0.95 * bound < lstm.weight_ih_l0.abs().max().item() <= bound
    assert 0.9 * bound < others.abs().max().item() <= bound
    largest = model.joint_network.output.weight.abs().max().item()
    assert largest == pytest.approx(init["joint_net.2 max|w|"], rel=0.05)
    # Both are deviations of 66 draws from N(0, 1).
    embed_std = model.predictor.embed.weight.std().item()
    assert embed_std == pytest.approx(init["embed std"], rel=0.25)


@pytest.mark.parametrize("case", range(6))
def test_hypotheses_are_the_originals(case):
    entry = seedrun.facts()["decode"][case]
    # The original's None stands for no limit on all symbols.
    hypotheses = decode.greedy_decode(
        seedrun.model("dec/w/"), *seedrun.features("dec/", 3),
        max_symbols_per_frame=entry["max_symbols_per_step"],
        max_symbols=entry["max_symbol_per_sample"] or 10**9,
    )
    assert hypotheses == entry["reference"]


# ---------------------------------------------------------- transducer losses of other libraries

CASES = oracle("loss/transducer_loss_oracles.json")["cases"]


def cases_with(*fields: str) -> pytest.MarkDecorator:
    cases = [case for case in CASES if any(field in case for field in fields)]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


def problem_of(case: dict) -> Problem:
    logits = torch.tensor(case["logits"], dtype=torch.float64)
    targets = torch.tensor(case["targets"], dtype=torch.int64).view(len(logits), -1)
    lens, target_lens = (torch.tensor(case[k]) for k in ("logit_lengths", "target_lengths"))
    return Problem(logits, targets, lens, target_lens, case["blank_resolved"])


def test_all_loss_cases_are_read():
    assert len(CASES) == 19
    counts = {
        "published_costs": 10, "published_grad_logits": 4, "published_grad_log_probs": 5,
        "float64_costs": 19, "float64_grad_logits": 19, "float64_grad_log_probs": 19,
        "brute_force_costs": 17, "closed_form_costs": 3, "emissions": 3, "am": 1,
    }
    assert {field: sum(field in c for c in CASES) for field in counts} == counts


@both
@cases_with("published_costs", "published_grad_logits")
def test_costs_and_gradients_are_the_published_ones(loss_of, case):
    costs, grads = costs_and_grad(loss_of, problem_of(case))
    if "published_costs" in case:
        assert_close(costs, case["published_costs"], case["tolerance"])
    if "published_grad_logits" in case:  # computed in float32
        assert_close(grads, case["published_grad_logits"], 1e-6)


@both
@cases_with("float64_costs")
def test_costs_and_gradients_are_those_in_float64(loss_of, case):
    costs, grads = costs_and_grad(loss_of, problem_of(case))
    for field in ("float64_costs", "brute_force_costs", "closed_form_costs"):
        if field in case:
            assert_close(costs, case[field])
    assert_close(grads, case["float64_grad_logits"])


@both
@cases_with("float64_costs")
def test_costs_and_gradients_in_float32_are_within_1e_5(loss_of, case):
    problem = problem_of(case)
    costs, grads = costs_and_grad(loss_of, problem._replace(logits=problem.logits.float()))
    assert_close(costs, case["float64_costs"], 1e-5)
    assert_close(grads, case["float64_grad_logits"], 1e-5)


@cases_with("float64_grad_log_probs")
def test_posteriors_are_the_gradients_of_log_probs(case):
    problem = problem_of(case)
    lattice, emitted = test_loss.lattice_of(problem)
    on_blank, on_label = lattice.posteriors
    grads = torch.zeros_like(problem.logits)
    grads[..., problem.blank] -= on_blank
    grads.scatter_add_(3, emitted, -on_label[..., None])
    assert_close(grads, case["float64_grad_log_probs"])
    if "published_grad_log_probs" in case:
        assert_close(grads, case["published_grad_log_probs"], 1e-6)


def additive_joint(emissions: Tensor, predictions: Tensor) -> tuple:
    """A joint network whose logits are emissions + predictions: the ReLU is idle above -100."""
    weight = torch.eye(emissions.shape[-1], dtype=torch.float64)
    return emissions + 100, predictions, weight, weight.new_full((len(weight),), -100)


@cases_with("emissions")
def test_joint_gradients_are_those_of_awni_transducer(case):
    # Its joint network is a sum without non-linearity, and its gradients are from float32.
    names = ("emissions", "predictions")
    inputs = [torch.tensor(case[k], dtype=torch.float64).requires_grad_() for k in names]
    costs = joint_transducer_loss(*additive_joint(*inputs), *problem_of(case)[1:],
                                  reduction="none")
    assert_close(costs.detach(), case["float64_costs"])
    grads = torch.autograd.grad(costs.sum(), inputs)
    for actual, name in zip(grads, names, strict=True):
        assert_close(actual, case[f"published_grad_{name}"], 1e-6)


@cases_with("am")
def test_joint_costs_are_those_of_fast_rnnt(case):
    inputs = (torch.tensor([case[k]], dtype=torch.float64) for k in ("am", "lm"))
    costs = joint_transducer_loss(*additive_joint(*inputs), *problem_of(case)[1:],
                                  reduction="none")
    assert_close(costs, case["float64_costs"])


# -------------------------------------------------------------------- learning rate and optimiser

# MLPerf's names for the fields of TrainConfig that the schedule takes.
SCHEDULE = {
    "opt_base_learning_rate": "lr",
    "opt_learning_rate_warmup_epochs": "warmup_epochs",
    "opt_lamb_learning_rate_hold_epochs": "hold_epochs",
    "opt_lamb_learning_rate_decay_poly_power": "gamma",
    "opt_lamb_learning_rate_min": "lr_min",
}


def schedule_of(hyperparameters: dict, global_batch: int) -> dict:
    named = {ours: hyperparameters[theirs] for theirs, ours in SCHEDULE.items()}
    return {**named, "steps_per_epoch": 278_528 // global_batch}  # train_samples of every log


def test_rates_are_those_of_published_training_curves():
    published = {r["file"]: r for r in oracle("mlperf/mlperf_v1.0_rnnt_published_results.json")}
    for file, curve in oracle("mlperf/published_training_curves.json").items():
        schedule = schedule_of(published[file], published[file]["global_batch_size"])
        rows = curve["first_steps"] + curve["sample"]
        assert len(rows) > 100
        for row in rows:
            step = (row["epoch"] - 1) * schedule["steps_per_epoch"] + row["iter"]
            assert f"{lr_at(step, row['epoch'], **schedule):.2e}" == row["lrate"], (file, row)


POINTS = {
    f"{version}-{name}": point for version in ("1.0.0", "3.1.0")
    for name, point in oracle(f"mlperf/rcps_rnnt_{version}.json").items()
}


@pytest.fixture(scope="module")
def lamb_run():
    """The recorded run, our parameters after each of its five steps, and the gradient norms."""
    golden = oracle("optim/optim_oracles.json")["lamb"]
    hyper, params = golden["hyper"], as_parameters(golden["initial_params"])
    optimizer = Lamb(params, 1.0, (hyper["b1"], hyper["b2"]), hyper["eps"], hyper["wd"])
    seen, norms = [], []
    for grads, lr in zip(golden["grads_by_step"], hyper["lr"], strict=True):
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=torch.float64)
        norms.append(clip_gradients(params, hyper["clip"]))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        seen.append([p.detach().clone() for p in params])
    return golden, seen, norms


def test_lamb_with_clipping_repeats_the_steps_of_apex(lamb_run):
    golden, seen, norms = lamb_run
    recorded = golden["apex_FusedLAMB"]
    assert len(recorded) == 5
    assert max(norms) > golden["hyper"]["clip"] > min(norms)  # both branches of clipping
    for step, params, norm in zip(recorded, seen, norms, strict=True):
        assert norm == pytest.approx(step["grad_norm"], rel=1e-14, abs=0)
        for param, expected in zip(params, as_parameters(step["params"]), strict=True):
            torch.testing.assert_close(param, expected.detach(), rtol=0, atol=1e-12)


def test_lamb_moves_the_tensor_of_zeros_that_the_original_on_cpu_never_moves(lamb_run):
    golden, seen, _ = lamb_run
    original = golden["seed_cpu_clip_grad_norm_plus_ipex_Lamb"]
    assert all(step["params"][2] == [0.0, 0.0] for step in original)
    assert all(params[2].all() for params in seen)
    # The first step has no clipping, so all other tensors agree.
    for i in (0, 1, 3):
        expected = torch.tensor(original[0]["params"][i], dtype=torch.float64)
        torch.testing.assert_close(seen[0][i], expected, rtol=0, atol=1e-12)


# MLPerf's name -> field of TrainConfig, for the settings that differ between published runs.
RECIPE_FIELDS = {
    **SCHEDULE,
    "opt_lamb_learning_rate_decay_poly_power": "lr_gamma",
    "opt_lamb_epsilon": "eps",
    "opt_lamb_beta_1": "beta1",
    "opt_lamb_beta_2": "beta2",
    "opt_weight_decay": "weight_decay",
    "opt_gradient_clip_norm": "clip_norm",
    "opt_gradient_accumulation_steps": "accumulation",
    "model_eval_ema_factor": "ema_decay",
    "model_eva_ema_factor": "ema_decay",  # spelt so in the convergence points
}


def recipe_flags(hyperparameters: dict) -> tuple[list[str], dict]:
    """Flags for everything in RECIPE_FIELDS, and the values that must come out."""
    expected = {}
    for key, value in hyperparameters.items():
        if key in RECIPE_FIELDS:
            expected[RECIPE_FIELDS[key]] = math.inf if value == "none" else value
    flags = [w for k, v in expected.items() for w in (f"--{k.replace('_', '-')}", repr(v))]
    return flags, expected


def test_every_published_recipe_can_be_given_as_flags():
    recipes = oracle("mlperf/mlperf_v1.0_rnnt_published_results.json")
    recipes += [point["Hyperparams"] for point in POINTS.values()]
    assert len(recipes) > 90
    different = {}
    for recipe in recipes:
        assert {key for key in recipe if key.startswith("opt_")} <= RECIPE_FIELDS.keys()
        flags, expected = recipe_flags(recipe)
        flags += ["--weights-init-scale", str(recipe["model_weights_initialization_scale"])]
        different[tuple(flags)] = expected
    for flags, expected in different.items():
        cfg, model_cfg, _ = parse(*flags)
        assert {name: getattr(cfg, name) for name in expected} == expected
        assert model_cfg.weights_init_scale == float(flags[-1])


# ----------------------------------------------------------------------- MLPerf's logs and checker

# These keys of a log depend on the corpus, cluster, seed, result or clock of the run, or name the
# one form of mask and schedule that our code has; no setting decides them.
OF_A_RUN = {
    "data_spec_augment_freq_min", "data_spec_augment_time_min",
    "opt_learning_rate_alt_decay_func", "opt_learning_rate_alt_warmup_func",
    "cache_clear", "init_start", "init_stop", "run_start", "run_stop", "block_start", "block_stop",
    "epoch_start", "epoch_stop", "eval_start", "eval_stop", "eval_accuracy", "seed",
    "submission_benchmark", "submission_org", "submission_division", "submission_status",
    "submission_platform", "global_batch_size", "train_samples", "eval_samples",
    "weights_initialization",
}
MINIMAL = read(ORACLES / "mlperf" / "minimal_closed_rnnt.log")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of a run in the closed and of one in the open division, by division."""
    root = tiny_corpus(tmp_path_factory.mktemp("corpus"))
    write_links(root, "dev-clean", one(MINIMAL, "eval_samples")["value"])
    argv = {"closed": CLOSED, "open": [*TINY, "--epochs", "1"]}
    wer = {"closed": 0.0579, "open": 0.2}
    return {name: read(run_main(["--data", root, "--out", tmp_path_factory.mktemp(name),
                                 *argv[name]], [wer[name]])) for name in argv}


@pytest.fixture
def compliance(tmp_path):
    return lambda lines, ruleset="1.0.0": judge(lines, tmp_path, ruleset)


def line_id(line: dict) -> str:
    tensor = line["metadata"].get("tensor")
    return line["key"] if tensor is None else f"{line['key']}/{tensor}"


def set_value(lines: list[dict], key: str, value) -> list[dict]:
    assert any(line["key"] == key for line in lines)
    return [{**line, "value": value} if line["key"] == key else line for line in lines]


def test_the_table_of_constants_is_that_of_the_minimal_closed_log():
    logged = {line["key"]: line["value"] for line in MINIMAL}
    assert logged.keys() == CONSTANTS.keys() | OF_A_RUN
    assert {k: v for k, v in logged.items() if k in CONSTANTS} == {
        k: published for k, (published, _) in CONSTANTS.items()
    }


def test_the_closed_log_has_every_key_and_fixed_value_of_the_minimal_one(logs):
    closed = logs["closed"]
    assert {line_id(line) for line in closed} == {line_id(line) for line in MINIMAL}
    ours = {line["key"]: line["value"] for line in closed if line["key"] not in OF_A_RUN}
    assert ours == {key: CONSTANTS[key][0] for key in CONSTANTS}
    for key in ("seed", "eval_samples", "submission_benchmark", "submission_division"):
        assert one(closed, key)["value"] == one(MINIMAL, key)["value"]


@pytest.mark.parametrize("ruleset", ["1.0.0", "2.1.0", "3.1.0"])
@pytest.mark.parametrize("division", ["closed", "open"])
def test_a_line_is_missed_as_recorded(logs, compliance, division, ruleset):
    lines = logs[division]
    recorded = oracle("mlperf/compliance_mutations.json")[f"drop_one_line_{division}"]
    for dropped, verdicts in recorded.items():
        rest = [line for line in lines if line_id(line) != dropped]
        assert len(rest) == len(lines) - 1, dropped
        assert compliance(rest, ruleset) == verdicts[ruleset], dropped


def test_a_changed_value_is_judged_as_recorded(logs, compliance):
    closed = logs["closed"]
    recorded = oracle("mlperf/compliance_mutations.json")["change_one_value_closed_1.0.0"]
    for change, verdict in recorded.items():
        key, value = change.split("=")
        if value != "x" and not isinstance(one(closed, key)["value"], str):
            value = json.loads(value)
        assert compliance(set_value(closed, key, value)) == verdict, change


def test_whole_logs_are_judged_as_recorded(logs, compliance):
    closed, opened = logs["closed"], logs["open"]
    samples, stop = one(closed, "train_samples"), one(closed, "run_stop")
    assert closed[-1] == stop
    aborted = {**stop, "metadata": {**stop["metadata"], "status": "aborted"}}
    without = {**stop, "metadata": {k: v for k, v in stop["metadata"].items() if k != "status"}}
    edited = {
        "duplicate identical train_samples line": [*closed, samples],
        "duplicate train_samples with another value": [*closed, {**samples, "value": 1}],
        "run_stop status aborted": [*closed[:-1], aborted],
        "run_stop without status": [*closed[:-1], without],
        "eval_accuracy 0.0": set_value(closed, "eval_accuracy", 0.0),
        "open: eval_accuracy 0.9": set_value(opened, "eval_accuracy", 0.9),
        "open: eval_accuracy 1.0 only": set_value(opened, "eval_accuracy", 1.0),
    }
    recorded = oracle("mlperf/compliance_mutations.json")["other"]
    assert {name: compliance(log) for name, log in edited.items()} == recorded


# --------------------------------------------------------------- recordings learnt by heart, slow

# A model that cannot learn 29 recordings by heart has a fault somewhere between the audio files
# and the text. Training, scoring and transcribing are the command lines.
SMOKE, SPLIT = LIBRISPEECH / "smoke", "dev-clean-2"
BY_HEART = [
    # The split is read eight times per epoch, so that there are eight times fewer evaluations.
    "--data", SMOKE, "--train-splits", *[SPLIT] * 8, "--dev-split", SPLIT, "--preset", "demo",
    *SIMPLE,
    # The longest recording has 31.7 s and 438 letters. 72 classes make some 285 tokens of them, 64
    # would make 302, and decoding ends at 300.
    "--max-utterance-s", "40", "--vocab-size", "72", "--enc-hidden", "192",
    # Augmentation and regularisation are off: they hinder learning by heart.
    "--speed-min", "1", "--speed-max", "1", "--freq-masks", "0", "--time-masks", "0",
    "--dither", "0", "--enc-dropout", "0", "--pred-dropout", "0", "--joint-dropout", "0",
    "--weight-decay", "0",
    "--precision", "fp32", "--batch-size", "8", "--eval-batch-size", "8", "--lr", "0.007",
    "--warmup-epochs", "1", "--hold-epochs", "10", "--lr-gamma", "0.85", "--ema-decay", "0.95",
    "--epochs", "40", "--target-wer", "1e-9",
]


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    """The run directory of a training on the recordings of SMOKE."""
    out = tmp_path_factory.mktemp("memorised") / "run"
    run_script("train.py", *BY_HEART, "--out", out)
    return out


@pytest.mark.slow
def test_training_stops_at_the_first_evaluation_without_an_error(memorised):
    lines = (memorised / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    wers = [e["wer"] for e in logged if e["event"] == "eval"]
    assert logged[-1]["reason"] == "target wer", wers
    assert wers[-1] == 0.0 < min(wers[:-1])


@pytest.mark.slow
def test_the_best_checkpoint_scores_no_error(memorised):
    printed = run_script("decode.py", "--checkpoint", memorised / "best.pt", "--data", SMOKE,
                         "--split", SPLIT)
    assert "WER 0.00 % (0 errors in 266 words)" in printed


@pytest.mark.slow
def test_single_files_are_transcribed_without_error(memorised):
    folders = sorted(path for path in (SMOKE / SPLIT).glob("*/*") if path.is_dir())
    texts = {}
    for folder in folders[:6]:
        (transcript,) = folder.glob("*.trans.txt")
        for line in transcript.read_text(encoding="utf-8").splitlines():
            utterance, _, text = line.partition(" ")
            texts[str(folder / f"{utterance}.flac")] = text
    printed = run_script("decode.py", "--checkpoint", memorised / "best.pt", *texts)
    assert dict(line.split("\t") for line in printed.splitlines()) == texts
