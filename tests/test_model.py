# SPDX-License-Identifier: Apache-2.0
"""model.py computes what its comments say, and a padded batch like each utterance alone.

    python -m pytest tests/test_model.py

FeatureNorm and WideLstm are compared with torch's own, initialisation and parameter counts with
the MLPerf v1.0 model, the joint network with its formula, chunks with the whole utterance. The
activations and gradients of a model of the original are in test_oracles.py.
"""

import copy
import math
import re
import textwrap
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loss import NoFloat64
from tones import REPO, TRAIN_TEXTS
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import decode
from checkpoint import save_checkpoint
from data import Tokenizer, train_tokenizer
from features import FeatureConfig
from loss import joint_transducer_loss
from model import (
    PRESETS,
    ConvFrontEnd,
    FeatureNorm,
    LookAhead,
    LstmStack,
    ModelConfig,
    Predictor,
    StackTime,
    Transducer,
    WideLstm,
)

TINY = ModelConfig(
    feature_size=6, vocab_size=9, enc_hidden=10, pre_layers=2, stack=3, post_layers=2,
    pred_hidden=7, pred_layers=2, joint_hidden=8, enc_dropout=0.0, pred_dropout=0.0,
    joint_dropout=0.0,
)
NORMALIZED = replace(TINY, normalization=True)
CONV = replace(NORMALIZED, pre_layers=0, stack=2, post_layers=3, conv_layers=2, conv_channels=4,
               residual=True)
LOOK = replace(NORMALIZED, look_ahead=6)
BOTH = replace(CONV, pre_layers=2, bidirectional=True)
each_encoder = pytest.mark.parametrize(
    "cfg", [TINY, NORMALIZED, CONV, LOOK, BOTH],
    ids=["plain", "normalized", "conv", "look-ahead", "bidirectional"])
each_predictor = pytest.mark.parametrize("cfg", [TINY, NORMALIZED], ids=["plain", "normalized"])
LENS = [13, 5, 9, 1]  # the last groups of 3 frames have one, two, three and one valid frames


def make_model(cfg, seed=0, dtype=torch.float64):
    """A model with random numbers in every parameter and buffer, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Transducer(cfg).to(dtype)
    with torch.no_grad():
        for x in model.state_dict().values():
            x.copy_(torch.randn(x.shape, generator=generator) * 0.5)
        if cfg.normalization:
            model.encoder.feature_norm.running_var.abs_().add_(0.5)
    return model


def garbage_batch(dtype=torch.float64):
    """Features whose padding holds large numbers, after the longest utterance too."""
    generator = torch.Generator().manual_seed(1)
    feats = torch.randn(len(LENS), 16, TINY.feature_size, generator=generator, dtype=dtype)
    for frames, n in zip(feats, LENS, strict=True):
        frames[n:] *= 1e3
    return feats, torch.tensor(LENS)


# ------------------------------------------------- both directions, look-ahead and StackTime


def test_bidirectional_layers_are_torchs_on_packed_utterances():
    stack = LstmStack(5, 8, 1, 0.0, TINY, bidirectional=True).double()
    theirs = torch.nn.LSTM(5, 4, bidirectional=True, batch_first=True).double()
    weights = stack.layers[0].state_dict()
    weights |= {f"{name}_reverse": w for name, w in stack.backward_layers[0].state_dict().items()}
    theirs.load_state_dict(weights)
    feats, lens = garbage_batch()
    x = feats[:, :, :5]
    packed = pack_padded_sequence(x, lens, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(theirs(packed)[0], batch_first=True)
    actual = stack(x, lens=lens)[0]
    for b, n in enumerate(LENS):
        torch.testing.assert_close(actual[b, :n], expected[b, :n], rtol=1e-12, atol=1e-12)


def test_bidirectional_layers_have_two_equal_halves():
    with pytest.raises(ValueError, match="enc_hidden: 9, expected an even number"):
        replace(BOTH, enc_hidden=9)


def test_bidirectional_encoders_have_no_chunks():
    model = make_model(BOTH).eval()
    with pytest.raises(ValueError, match="bidirectional: True, but chunks need"):
        model.encode_chunk(torch.zeros(1, BOTH.reduction, BOTH.feature_size).double())


def test_look_ahead_is_a_convolution_over_each_frame_and_the_next_ones():
    layer = LookAhead(3, 4).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    kernels = layer.weight.detach().T[:, None]  # (4, 1, 3 + 1)
    expected = torch.conv1d(torch.cat([x, x.new_zeros(2, 3, 4)], 1).transpose(1, 2), kernels,
                            groups=4).transpose(1, 2)
    torch.testing.assert_close(layer(x)[0].detach(), expected, rtol=1e-12, atol=1e-12)


def test_look_ahead_begins_without_effect():
    x = torch.randn(2, 7, 4)
    assert torch.equal(LookAhead(3, 4)(x)[0], x)


@pytest.mark.parametrize("factor", [1, 2, 3, 8])
def test_stack_time_concatenates_frames_and_fills_the_last_group_with_zeros(factor):
    for T_in in range(1, 3 * factor + 1):  # k * factor + r for every r
        x = torch.arange(1.0, 2 * T_in * 2 + 1).view(2, T_in, 2)  # no value is zero
        stacked = StackTime(factor)(x)
        assert stacked.shape == (2, math.ceil(T_in / factor), factor * 2)
        for b in range(2):
            frames = x[b].tolist() + [[0.0, 0.0]] * (-T_in % factor)
            assert stacked[b].flatten().tolist() == sum(frames, [])


# -------------------------------------------------------------------------------- a batch or alone


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The order of summation differs. In float32 oneDNN chooses its kernels by the batch size.
    [(torch.float64, 1e-11), (torch.float32, 2e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@each_encoder
def test_encode_gives_a_padded_batch_what_it_gives_each_utterance_alone(
    cfg, training, dtype, tolerance
):
    model = make_model(cfg, dtype=dtype).train(training)
    feats, lens = garbage_batch(dtype)
    if training and cfg.normalization:
        model.encoder.feature_norm.begin_step(FeatureNorm.moments(feats, lens))
    encoded, enc_lens = model.encode(feats, lens)
    for b, n in enumerate(LENS):
        alone, alone_lens = model.encode(feats[b : b + 1, :n], lens[b : b + 1])
        assert enc_lens[b] == alone_lens[0] == alone.shape[1] == math.ceil(n / cfg.reduction)
        torch.testing.assert_close(
            encoded[b, : enc_lens[b]], alone[0], rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@each_predictor
def test_predict_gives_a_padded_batch_what_it_gives_each_utterance_alone(cfg, training):
    model = make_model(cfg).train(training)
    blank = cfg.blank
    # The padding holds the blank, which has no embedding row, and ids of no class at all.
    targets = torch.tensor([[3, 0, 7, 7], [1, 2, blank, -1], [blank, 99, -1, 5]])
    predicted = model.predict(targets)
    assert predicted.shape == (3, 5, cfg.joint_hidden)
    for b, u in enumerate([4, 2, 0]):
        alone = model.predict(targets[b : b + 1, :u])
        torch.testing.assert_close(predicted[b, : u + 1], alone[0], rtol=1e-11, atol=1e-11)


@each_encoder
def test_gradient_of_a_padded_batch_is_the_sum_over_its_utterances(cfg):
    feats, feat_lens = garbage_batch()
    targets = torch.tensor([[1, 4], [7, 8], [2, 2], [-1, 8]])
    target_lens = torch.tensor([2, 1, 2, 0])

    def gradients(batches):
        """Gradients of the summed cost; a batch is its rows, number of frames and of labels."""
        model = make_model(cfg).train()
        if cfg.normalization:
            model.encoder.feature_norm.begin_step(FeatureNorm.moments(feats, feat_lens))
        output = model.joint_network.output
        for rows, T_in, U in batches:
            labels = targets[rows, :U]
            encoded, enc_lens, predicted, *_ = model(feats[rows, :T_in], feat_lens[rows], labels)
            joint_transducer_loss(
                encoded, predicted, output.weight, output.bias, labels, enc_lens, target_lens[rows],
                cfg.blank, reduction="sum",
            ).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    together = gradients([(slice(None), feats.shape[1], 2)])
    one_by_one = gradients([([b], LENS[b], target_lens[b]) for b in range(len(LENS))])
    for name, grad in together.items():
        # Sums of some hundred float64 terms are taken in another order.
        torch.testing.assert_close(grad, one_by_one[name], rtol=1e-9, atol=1e-10, msg=name)


# ------------------------------------------------------------------- streaming and tracing


@settings(max_examples=30, deadline=None, derandomize=True)
@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=6), removed=st.integers(0, 2),
       cfg=st.sampled_from([TINY, NORMALIZED, CONV, LOOK, replace(CONV, look_ahead=2),
                            replace(LOOK, pre_layers=0)]))
def test_encode_chunk_by_chunk_equals_encode_on_the_whole(groups, removed, cfg):
    # Every chunk is a multiple of the frames of an encoder frame; the last one lacks `removed`.
    model, lengths = make_model(cfg).eval(), [cfg.reduction * n for n in groups]
    lengths[-1] -= removed
    generator = torch.Generator().manual_seed(2)
    feats = torch.randn(2, sum(lengths), cfg.feature_size, generator=generator).double()
    whole, _ = model.encode(feats, torch.tensor([sum(lengths)] * 2))
    chunks, state = [], None
    for i, chunk in enumerate(feats.split(lengths, 1), 1):
        encoded, state = model.encode_chunk(chunk, state, is_last=i == len(lengths))
        chunks.append(encoded)
        # Outputs come as soon as the frames are there that they look ahead to.
        if i < len(lengths):
            known = sum(groups[:i]) - cfg.look_ahead // cfg.stack
            assert sum(x.shape[1] for x in chunks) == max(0, known)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("traced_frames", [9, 10])  # with and without a group to fill
@each_encoder
def test_traced_encode_equals_encode_for_other_batch_sizes_and_lengths(cfg, traced_frames):
    model = make_model(cfg, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(3)

    def batch(lens):
        shape = (len(lens), max(lens), cfg.feature_size)
        return torch.randn(shape, generator=generator), torch.tensor(lens)

    with warnings.catch_warnings():
        # Tracing warns of its deprecation and of every check of a shape, torch.nn.LSTM's included.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(model, {"encode": batch([traced_frames, 4])})
    for lens in ([30, 7, 12], [11], [12, 12, 1, 5]):
        feats, feat_lens = batch(lens)
        for actual, expected in zip(
            traced.encode(feats, feat_lens), model.encode(feats, feat_lens), strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore")  # as above
def test_the_parts_of_docs_export_md_find_the_labels_of_decode(tmp_path, monkeypatch):
    text = (REPO / "docs/export.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)(?:^    .*\n|^\n)+", text)
    tokenizer = Tokenizer(train_tokenizer(TRAIN_TEXTS, 20))
    cfg = replace(PRESETS["demo"], vocab_size=tokenizer.vocab_size)
    model = make_model(cfg, dtype=torch.float32).eval()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/demo").mkdir(parents=True)
    save_checkpoint(Path("out/demo/best.pt"), {
        "ema": model.state_dict(), "model_config": asdict(cfg),
        "feature_config": asdict(FeatureConfig()),
        "tokenizer": torch.frombuffer(bytearray(tokenizer.model), dtype=torch.uint8),
    })
    page = {}
    exec(textwrap.dedent("".join(blocks)), page)
    parts = torch.jit.load("parts.pt")
    for lens in ([203], [50, 31, 7]):
        feats, feat_lens = torch.randn(len(lens), max(lens), 256), torch.tensor(lens)
        actual, expected = parts.encode(feats, feat_lens), model.encode(feats, feat_lens)
        assert all(map(torch.equal, actual, expected))
    with torch.no_grad():
        for n in (1, 40, 203):
            feats = torch.randn(1, n, 256)
            (expected,) = decode.greedy_decode(model, feats, torch.tensor([n]), max_symbols=10**9)
            assert page["search"](parts, feats, tokenizer.blank) == expected
    assert expected


@pytest.mark.filterwarnings("ignore")
def test_torch_export_takes_the_other_parts_for_any_number_of_utterances():
    model, auto = make_model(NORMALIZED).eval(), torch.export.Dim.AUTO
    labels, (_, (h, c)) = torch.tensor([0, 1, 2]), model.predictor.start(3)
    encoded, predicted = torch.randn(2, 3, NORMALIZED.joint_hidden, dtype=torch.float64)
    for module, inputs, batch_axes in (
        (Method(model.predictor, "step"), (labels, (h, c)), (0, (1, 1))),
        (model.joint_network, (encoded, predicted), (0, 0)),
    ):
        shapes = tree_map(lambda axis: {axis: auto}, batch_axes)
        few = tree_map(lambda x, axis: x.narrow(axis, 0, 2).contiguous(), inputs, batch_axes)
        arguments = (shapes,) if isinstance(module, Method) else shapes
        exported = torch.export.export(module, few, dynamic_shapes=arguments).module()
        torch.testing.assert_close(exported(*inputs), module(*inputs), rtol=1e-12, atol=1e-12)


class Method(nn.Module):
    """A method of a model as the forward that torch.export takes."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args):
        return getattr(self.model, self.name)(*args)


@pytest.mark.filterwarnings("ignore")  # as above
@pytest.mark.parametrize("cfg", [NORMALIZED, BOTH], ids=["normalized", "both-ways"])
def test_torch_export_takes_the_encoder_with_the_length_of_the_example_only(cfg):
    encode, (feats, feat_lens) = Method(make_model(cfg).eval(), "encode"), garbage_batch()
    any_batch = (({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}),)
    program = torch.export.export(encode, (feats, feat_lens), dynamic_shapes=any_batch)
    actual, expected = (f(feats[:3], feat_lens[:3])[0] for f in (program.module(), encode))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    any_length = (({1: torch.export.Dim("T")}, None),)
    with pytest.raises(torch._dynamo.exc.UserError, match="^Constraints violated .T.!"):
        torch.export.export(encode, (feats, feat_lens), dynamic_shapes=any_length)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cfg", [NORMALIZED, LOOK], ids=["normalized", "look-ahead"])
def test_chunks_through_an_exported_encode_chunk_equal_encode_on_the_whole(cfg):
    model, n = make_model(cfg).eval(), 2 * cfg.reduction
    feats = torch.randn(2, 6 * n, cfg.feature_size).double()
    first, state = model.encode_chunk(feats[:, :n])
    if cfg.look_ahead:  # the first two chunks and the last one are Python's
        second, state = model.encode_chunk(feats[:, n : 2 * n], state)
        chunks, inner = [first, second], feats[:, 2 * n : 5 * n]
    else:
        state = tree_map(torch.zeros_like, state)
        chunks, inner = [], feats
    exported = torch.export.export(Method(model, "encode_chunk"), (feats[:, :n], state)).module()
    for chunk in inner.split(n, 1):
        encoded, state = exported(chunk, state)
        chunks.append(encoded)
    if cfg.look_ahead:
        chunks.append(model.encode_chunk(feats[:, 5 * n :], state, is_last=True)[0])
    whole, _ = model.encode(feats, torch.tensor([6 * n] * 2))
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------- FeatureNorm


def batch_norm_like(norm):
    """torch.nn.BatchNorm1d with the same weights and running statistics."""
    oracle = nn.BatchNorm1d(len(norm.weight)).to(norm.weight)
    oracle.load_state_dict(norm.state_dict() | {"num_batches_tracked": torch.tensor(0)})
    return oracle


def random_norm():
    return make_model(NORMALIZED).encoder.feature_norm


def test_feature_norm_equals_batch_norm_on_the_valid_frames():
    norm = random_norm().train()
    oracle = batch_norm_like(norm).train()
    for seed in range(3):  # the running statistics take part in three steps
        feats, lens = garbage_batch()
        feats = feats * (1 + seed) + seed
        frames = torch.cat([f[:n] for f, n in zip(feats, LENS, strict=True)])
        ours = norm(feats, lens)
        valid = torch.cat([f[:n] for f, n in zip(ours, LENS, strict=True)])
        # "Mean of squares minus square of mean" cancels few of float64's 15 digits here.
        torch.testing.assert_close(valid, oracle(frames), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(norm.running_mean, oracle.running_mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, oracle.running_var, rtol=1e-12, atol=1e-12)


def test_feature_norm_in_evaluation_uses_the_running_statistics():
    norm = random_norm().eval()
    feats, lens = garbage_batch()
    before = copy.deepcopy(norm.state_dict())
    expected = batch_norm_like(norm).eval()(feats.transpose(1, 2)).transpose(1, 2)
    # The padding's values are of the order 1e3.
    torch.testing.assert_close(norm(feats, lens), expected, rtol=1e-12, atol=1e-9)
    assert all(torch.equal(before[k], v) for k, v in norm.state_dict().items())


def test_a_step_of_micro_batches_is_normalised_like_one_batch():
    whole, parts = random_norm().train(), random_norm().train()
    feats, lens = garbage_batch()
    expected = whole(feats, lens)
    micro_batches = [(feats[:1], lens[:1]), (feats[1:], lens[1:])]
    parts.begin_step(sum(parts.moments(*micro_batch) for micro_batch in micro_batches))
    found = torch.cat([parts(*micro_batch) for micro_batch in micro_batches])
    # The sums of 28 numbers are taken in another order; padding is of the order 1e3.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)
    for name, expected in whole.state_dict().items():  # so they moved once
        torch.testing.assert_close(parts.state_dict()[name], expected, rtol=1e-12, atol=1e-12)


def test_after_the_end_of_a_step_a_forward_uses_its_own_batch():
    norm, oracle = random_norm().train(), random_norm().train()
    feats, lens = garbage_batch()
    norm.begin_step(norm.moments(7 * feats + 3, lens))
    norm.end_step()
    assert torch.equal(norm(feats, lens), oracle(feats, lens))


def test_feature_norm_keeps_its_precision_far_from_zero():
    norm = FeatureNorm(1).train()
    feats = torch.tensor([[[1000.1], [1001.1]] * 8])  # float32: squares have 7 digits
    out = norm(feats, torch.tensor([16]))
    # The mean is 1000.6 and the variance 0.25, which gives -1 and 1 but for eps. The shift by
    # mean / deviation = 2001 costs four of float32's seven digits.
    expected = torch.tensor([[[-1.0], [1.0]] * 8]) / math.sqrt(1 + 1e-5 / 0.25)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


def test_feature_norm_on_a_device_without_float64_sums_in_float32():
    feats, lens = torch.randn(4, 300, 8), torch.tensor([300, 211, 7, 120])
    expected, norm = FeatureNorm(8).train()(feats, lens), FeatureNorm(8).train()
    with NoFloat64():
        actual = norm(feats, lens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_feature_norm_of_constants_far_from_zero_is_finite():
    constants = 1e6 + torch.arange(50, dtype=torch.float64) / 7
    feats, lens = constants.repeat(1, 11, 1), torch.tensor([11])
    mean, mean_square = (FeatureNorm.moments(feats, lens)[1:] / 11).chunk(2)
    # Rounding makes the variance of some of them negative by more than eps.
    assert (mean_square - mean.square()).min() < -1e-5
    assert FeatureNorm(50).double().train()(feats, lens).isfinite().all()


def test_feature_norm_of_one_frame_is_finite():
    norm = FeatureNorm(3).train()
    out = norm(torch.tensor([[[1.0, -2.0, 0.0], [9.0, 9.0, 9.0]]]), torch.tensor([1]))
    assert out[0, 0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)  # 1/sqrt(eps) = 316
    assert all(x.isfinite().all() for x in norm.state_dict().values())


# -------------------------------------------------------------------------- the networks' formulas


def test_joint_is_a_linear_layer_on_the_rectified_sum():
    model = make_model(TINY).eval()
    generator = torch.Generator().manual_seed(2)
    encoded, predicted = (
        torch.randn(2, n, TINY.joint_hidden, generator=generator).double() for n in (4, 3)
    )
    logits = model.joint(encoded, predicted)  # (B, T, U+1, V)
    layer = model.joint_network.output
    hidden = (encoded[:, :, None] + predicted[:, None]).clamp_min(0)  # (B, T, U+1, J)
    expected = hidden @ layer.weight.T + layer.bias
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


@each_predictor
def test_predict_starts_with_a_zero_embedding_and_a_zero_state(cfg):
    model = make_model(cfg).eval()
    rnn, zero = model.predictor.rnn, torch.zeros(1, 1, cfg.pred_hidden, dtype=torch.float64)
    hidden = zero
    for layer in rnn.layers:
        hidden = layer(hidden)[0]
    hidden = rnn.layer_norm(hidden)[0, 0]
    expected = model.joint_network.predictor_projection(hidden)
    no_label = torch.zeros(1, 0, dtype=torch.int64)
    for targets in (no_label, torch.tensor([[0, 3]]), torch.tensor([[7, 1]])):
        torch.testing.assert_close(model.predict(targets)[0, 0], expected, rtol=1e-12, atol=0)


@each_predictor
def test_predictor_label_by_label_equals_predict_at_once(cfg):
    model = make_model(cfg).eval()
    targets = torch.tensor([[3, 0, 7], [5, 5, 1]])
    at_once = model.predictor(targets)  # (B, U+1, H)
    output, state = model.predictor.start(2)
    for u in range(4):
        torch.testing.assert_close(output, at_once[:, u], rtol=1e-12, atol=1e-12)
        if u < 3:
            output, state = model.predictor.step(targets[:, u], state)


def test_embedding_has_no_row_for_blank():
    assert Predictor(TINY).embed.num_embeddings == TINY.vocab_size - 1 == TINY.blank


def test_layer_norm_acts_on_every_stack_in_training_and_in_evaluation():
    model = make_model(NORMALIZED)
    feats = torch.sin(torch.arange(2.0 * 5 * 6)).double().view(2, 5, 6)
    for training in (False, True):
        model.train(training)
        for stack, x in (
            (model.encoder.pre, feats),
            (model.encoder.post, torch.cat([feats] * 5, 2)),
            (model.predictor.rnn, torch.cat([feats, feats[:, :, :1]], 2)),
        ):
            out, _ = stack(x)
            norm = stack.layer_norm
            standard = (out - norm.bias) / norm.weight
            # Division by a weight near 0 loses digits; eps = 1e-5 shrinks small variances.
            assert standard.mean(-1).abs().max() < 1e-9
            assert standard.var(-1, unbiased=False).min() > 0.98


def test_dropout_of_the_joint_network_acts_in_training_only():
    model = make_model(replace(TINY, joint_dropout=0.5))
    joint = torch.ones(1, 2, TINY.joint_hidden, dtype=torch.float64)
    assert torch.equal(model.eval().joint(joint, joint), model.joint(joint, joint))
    torch.manual_seed(0)
    assert not torch.equal(model.train().joint(joint, joint), model.joint(joint, joint))


def test_dropout_acts_after_every_lstm_layer():
    model = Transducer(replace(TINY, enc_dropout=0.5, pred_dropout=0.2))
    for stack, dropout in (
        (model.encoder.pre, 0.5), (model.encoder.post, 0.5), (model.predictor.rnn, 0.2)
    ):
        x = torch.randn(3, 9, stack.layers[0].input_size)
        torch.manual_seed(1)
        found = stack(x)[0]
        torch.manual_seed(1)
        x = x.transpose(0, 1)
        for layer in stack.layers:
            x = stack.dropout(layer(x)[0])
            assert abs((x == 0).double().mean() - dropout) < 0.15
        torch.testing.assert_close(found, stack.layer_norm(x).transpose(0, 1))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gradient_reaches_every_parameter(preset):
    sizes = dict(feature_size=6, vocab_size=9, enc_hidden=8, pred_hidden=8, joint_hidden=16)
    model = Transducer(replace(PRESETS[preset], **sizes)).train()
    torch.manual_seed(0)
    feats, lens = torch.randn(2, 20, 6), torch.tensor([20, 11])
    targets, target_lens = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2])
    encoded, enc_lens, predicted, *_ = model(feats, lens, targets)
    output = model.joint_network.output
    joint_transducer_loss(
        encoded, predicted, output.weight, output.bias, targets, enc_lens, target_lens,
        model.cfg.blank,
    ).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


# ------------------------------------------------------ convolutions, residuals, initialisation


def test_convolutions_are_torchs_with_symmetric_padding():
    front_end = ConvFrontEnd(replace(CONV, conv_layers=3)).double()
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    lens = torch.tensor([11, 11])
    y, out_lens, _ = front_end(x, lens, [])
    expected = x[:, None]
    for convolution in front_end.convolutions:
        expected = nn.functional.conv2d(expected, convolution.weight, convolution.bias, stride=2,
                                        padding=1).relu()
    expected = front_end.layer_norm(front_end.linear(expected.transpose(1, 2).flatten(2)))
    assert y.shape == (2, 2, 10)
    assert out_lens.tolist() == [2, 2]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_residual_layers_add_their_input_before_layer_norm():
    stack = make_model(CONV).encoder.post.eval()
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    y, _ = stack(x)
    expected = x.transpose(0, 1)
    for layer, norm in zip(stack.layers, stack.layer_norms, strict=True):
        out, _ = layer(expected)
        expected = norm(out if out.shape != expected.shape else expected + out)
    torch.testing.assert_close(y, expected.transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_orthogonal_initialisation():
    torch.manual_seed(0)
    cfg = replace(TINY, orthogonal_init=True, weights_init_scale=1.0)
    for lstm in Transducer(cfg).encoder.post.layers:
        for gate in lstm.weight_hh_l0.chunk(4):
            torch.testing.assert_close(gate @ gate.T, torch.eye(10), rtol=0, atol=1e-5)
        fan = lstm.input_size + lstm.hidden_size
        assert 0.8 < lstm.weight_ih_l0.abs().max() / math.sqrt(6 / fan) <= 1
        bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
        assert bias.tolist() == [0.0] * 10 + [1.0] * 10 + [0.0] * 20


# ---------------------------------------------------------------------- LstmStack and WideLstm


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("unrolled", [False, True])
def test_lstm_stack_is_torchs_lstm(layers, given_state, unrolled):
    torch.manual_seed(layers)
    stack = LstmStack(12, 5, layers, 0.0, TINY).double()
    oracle = nn.LSTM(12, 5, layers, batch_first=True).double()
    for ours, theirs in zip(stack.layers.parameters(), oracle.parameters(), strict=True):
        theirs.data.copy_(ours)
    if unrolled:
        stack.layers[0].forward = stack.layers[0].unrolled
    x = torch.randn(3, 19, 12, dtype=torch.float64)
    state = [torch.randn(layers, 3, 5, dtype=torch.float64) for _ in range(2)]
    results = []
    for network in (stack, oracle):
        inputs = [v.clone().requires_grad_() for v in (x, *state)]
        y, (h, c) = network(inputs[0], tuple(inputs[1:]) if given_state else None)
        loss = (y * torch.arange(19 * 5).view(19, 5)).sum() + h.square().sum() + 3 * c.sum()
        wanted = [*network.parameters(), *(inputs if given_state else inputs[:1])]
        results.append([y, h, c, *torch.autograd.grad(loss, wanted)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("utterances", "expected"), [(8, torch.float32), (9, torch.bfloat16)])
def test_few_utterances_are_trained_in_float32_where_that_is_asked_for(utterances, expected):
    lstm, x = WideLstm(12, 5), torch.randn(7, utterances, 12).bfloat16()
    lstm.float32_batch = 8
    with torch.autocast("cpu", torch.bfloat16):
        y = lstm(x)[0]
    assert y.dtype == expected
    if expected == torch.float32:
        assert torch.equal(y, nn.LSTM.forward(lstm, x.float())[0])


def test_wide_lstm_under_autocast_is_about_as_accurate_as_torchs():
    torch.manual_seed(1)
    wide, oracle = (kind(12, 5) for kind in (WideLstm, nn.LSTM))
    wide.MIN_INPUT_SIZE = 12
    oracle.load_state_dict(wide.state_dict())
    x = torch.randn(400, 4, 12).bfloat16()
    upstream = torch.randn(400, 4, 5).bfloat16()

    def run(lstm, dtype):
        v = x.to(dtype).requires_grad_()
        y = lstm(v)[0]
        y.backward(upstream.to(y.dtype))
        grads = [p.grad for p in lstm.parameters()]
        return [t.detach().double() for t in (y, v.grad, *grads)]

    exact = run(copy.deepcopy(oracle).double(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = [run(lstm, torch.float32) for lstm in (wide, oracle)]
    errors = [[float((a - e).norm() / e.norm()) for a, e in zip(f, exact, strict=True)]
              for f in found]
    # Both round values, products and sums to bfloat16. For the recurrent weight ours also rounds
    # sums of 8 gradients; rounded sums of all 400 would be off by 0.02.
    assert all(a < 2 * b for a, b in zip(*errors, strict=True)), errors
    assert min(errors[0]) > 1e-5  # so bfloat16 was used


@pytest.mark.parametrize(
    ("training", "dtype", "input_size", "expected"),
    [
        (True, torch.bfloat16, 2048, True),
        (True, torch.bfloat16, 2047, False),
        (True, torch.float32, 2048, False),
        (False, torch.bfloat16, 2048, False),
    ],
)
def test_wide_lstm_unrolls_only_to_train_wide_inputs_in_bfloat16(
    monkeypatch, training, dtype, input_size, expected
):
    calls, unrolled = [], WideLstm.unrolled
    monkeypatch.setattr(WideLstm, "unrolled", lambda *args: calls.append(1) or unrolled(*args))
    lstm = WideLstm(input_size, 2).train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        lstm(torch.randn(3, 1, input_size))
    assert bool(calls) == expected


# ------------------------------------------------------------------------ initialisation and sizes


@pytest.mark.parametrize(("bias", "scale", "directions"), [(1.0, 0.5, 1), (2.0, 0.25, 2)])
def test_lstms_start_with_their_forget_bias_and_below_the_scale_over_root_hidden(bias, scale,
                                                                                directions):
    torch.manual_seed(0)
    model = Transducer(ModelConfig(
        feature_size=32, vocab_size=200, enc_hidden=64, pred_hidden=48, joint_hidden=40,
        normalization=True, forget_gate_bias=bias, weights_init_scale=scale,
        bidirectional=directions == 2,
    ))
    lstms = [m for m in model.modules() if isinstance(m, nn.LSTM)]
    assert len(lstms) == (2 + 3) * directions + 2
    for lstm in lstms:
        H = lstm.hidden_size
        for name, parameter in lstm.named_parameters():
            parameter = parameter.detach().clone()
            if name.startswith("bias"):
                forget = parameter[H : 2 * H]
                assert (forget == (bias * scale if name == "bias_ih_l0" else 0)).all()
                forget.zero_()
            largest = parameter.abs().max().item()
            # The largest of at least 192 uniform draws is above 0.9 of the bound.
            assert 0.9 * scale / math.sqrt(H) < largest <= scale / math.sqrt(H), name


def test_embedding_and_linear_layers_start_with_torch_defaults():
    torch.manual_seed(0)
    model = Transducer(ModelConfig(vocab_size=200, pred_hidden=48, joint_hidden=40))
    # The sample deviation of 199 * 48 draws from N(0, 1) has a deviation of 0.007.
    assert model.predictor.embed.weight.std().item() == pytest.approx(1, abs=0.03)
    joint = model.joint_network
    for layer in (joint.encoder_projection, joint.predictor_projection, joint.output):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.99 * bound < layer.weight.abs().max().item() <= bound
        assert 0.9 * bound < layer.bias.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (PRESETS["baseline"], 49_071_616),  # MLPerf v1.0; its log says 49.1M
        (PRESETS["democratized"], 21_001_216),
        # The original prints 74.2M and 65.8M for its ablations.
        (replace(PRESETS["baseline"], stack=8), 74_237_440),
        (replace(PRESETS["baseline"], stack=8, post_layers=2), 65_840_640),
        # BatchNorm adds 2 x 256, LayerNorm 2 x (1024 + 1024 + 512).
        (replace(PRESETS["baseline"], normalization=True), 49_071_616 + 5_632),
    ],
)
def test_parameter_count(cfg, expected):
    with torch.device("meta"):  # shapes alone
        assert sum(p.numel() for p in Transducer(cfg).parameters()) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [(name, 0) for name in ("feature_size", "enc_hidden", "stack", "post_layers",
                            "pred_hidden", "pred_layers", "joint_hidden", "conv_channels")]
    + [("vocab_size", 1), ("pre_layers", -1), ("conv_layers", -1), ("ctc_split", -1),
       ("look_ahead", -2), ("look_ahead", 3), ("stack", -2), ("enc_dropout", 1.0),
       ("enc_dropout", -0.1), ("pred_dropout", 1.5), ("joint_dropout", float("nan"))],
)
def test_config_errors_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=f"^{field}: {value}, expected "):
        ModelConfig(**{field: value})


def test_config_accepts_the_smallest_values():
    ModelConfig(1, 2, 1, 1, 1, 1, 1, 1, 1, 0.0, 0.0, 0.0)
