# SPDX-License-Identifier: Apache-2.0
"""The adapters of peers.py call other libraries as these document it.

Stand-ins with the documented signatures compute by our own code, so that an adapter that passes
right arguments gets our costs, gradients and labels.

    python -m pytest tests/test_peers.py
"""

import importlib.metadata
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from test_bench import run_here, write_model
from test_decode import decode_alone, random_batch, random_model

import decode
import loss
from tools import peers

# ---------------------------------------------------------------------------------- stand-ins


def warp_rnnt_loss(logits, targets, logit_lengths, target_lengths, blank, reduction):
    lengths = (targets, logit_lengths, target_lengths)
    assert {x.dtype for x in lengths} == {torch.int32}
    assert (logits.dtype, logits.is_contiguous()) == (torch.float32, True)
    return loss.transducer_loss(logits, *lengths, blank, reduction)


def optimized_transducer_loss(logits, targets, logit_lengths, target_lengths, blank,
                              from_log_softmax, reduction):
    assert (logits.dtype, from_log_softmax, reduction) == (torch.float32, False, "sum")
    sizes = list(zip(logit_lengths.tolist(), (target_lengths + 1).tolist(), strict=True))
    parts = logits.split([t * u1 for t, u1 in sizes])
    return sum(loss.transducer_loss(part.view(1, t, u1, -1), targets[b : b + 1, : u1 - 1],
                                    torch.tensor([t]), torch.tensor([u1 - 1]), blank)
               for b, (part, (t, u1)) in enumerate(zip(parts, sizes, strict=True)))


def k2_rnnt_loss(logits, symbols, termination_symbol, boundary, reduction):
    assert (logits.dtype, boundary[:, :2].abs().sum()) == (torch.float32, 0)
    return loss.transducer_loss(logits, symbols, boundary[:, 3], boundary[:, 2],
                                termination_symbol, reduction)


def rnnt_loss_simple(lm, am, symbols, termination_symbol, boundary, reduction, return_grad):
    assert return_grad
    assert {lm.dtype, am.dtype} == {torch.float32}
    cost = k2_rnnt_loss(am[:, :, None] + lm[:, None], symbols, termination_symbol, boundary,
                        reduction)
    B, U = symbols.shape
    return cost, (torch.zeros(B, U, am.shape[1] + 1), torch.zeros(B, U + 1, am.shape[1]))


def get_rnnt_prune_ranges(px_grad, py_grad, boundary, s_range):
    assert px_grad.shape[1] == py_grad.shape[1] - 1
    assert boundary.shape == (len(px_grad), 4)
    return torch.arange(s_range).expand(len(px_grad), py_grad.shape[2], s_range)


def do_rnnt_pruning(am, lm, ranges):
    return am[:, :, None].expand(-1, -1, ranges.shape[2], -1), lm[:, ranges[0]]


def rnnt_loss_pruned(logits, symbols, ranges, termination_symbol, boundary, reduction):
    assert logits.shape[:3] == ranges.shape
    assert reduction == "sum"
    return logits.log_softmax(-1)[..., termination_symbol].sum()


class TransducerBeamSearcher:
    """SpeechBrain's: state goes to layers whose class is called LSTM."""

    def __init__(self, decode_network_lst, tjoint, classifier_network, blank_id, beam_size):
        assert (classifier_network, beam_size) == ([], 1)
        self.layers, self.joint, self.blank = decode_network_lst, tjoint, blank_id

    def predict(self, label, state):
        x = torch.tensor([[label]], dtype=torch.int32)
        for layer in self.layers:
            if type(layer).__name__ == "LSTM":
                x, state = layer(x, state)
            else:
                x = layer(x)
        return x, state

    def transducer_greedy_decode(self, tn_output, max_symbols_per_step):
        hypotheses = []
        for frames in tn_output:
            x, state = self.predict(self.blank, None)
            hypotheses.append([])
            for frame in frames:
                for _ in range(max_symbols_per_step + 1):
                    label = self.joint(frame[None, None, None], x[:, None]).argmax().item()
                    if label == self.blank:
                        break
                    hypotheses[-1].append(label)
                    x, state = self.predict(label, state)
        return hypotheses, None, None, None


class RNNTBeamSearch:
    """torchaudio's: the first dimension of every state is that of hypotheses."""

    def __init__(self, model, blank):
        self.model, self.blank = model, blank

    def __call__(self, frames, length, beam_width):
        assert (beam_width, length.tolist()) == (1, [frames.shape[1]])
        one = torch.tensor([1])
        encoded, _ = self.model.transcribe(frames, length)
        labels = [self.blank]
        x, _, state = self.model.predict(torch.tensor([labels]), one, None)
        for t in range(encoded.shape[1]):
            for _ in range(decode.MAX_SYMBOLS_PER_FRAME):
                logits = self.model.join(encoded[:, t : t + 1], one, x, one)[0]
                assert logits.shape[:3] == (1, 1, 1)
                if (label := logits.argmax().item()) == self.blank:
                    break
                labels.append(label)
                state = [[s.index_select(0, torch.tensor([0])) for s in layer] for layer in state]
                x, _, state = self.model.predict(torch.tensor([[label]]), one, state)
        return [(labels, x[0], state, 0.0)]


STAND_INS = {
    "torchaudio.functional": SimpleNamespace(rnnt_loss=warp_rnnt_loss),
    "warprnnt_pytorch": SimpleNamespace(rnnt_loss=warp_rnnt_loss),
    "optimized_transducer": SimpleNamespace(transducer_loss=optimized_transducer_loss),
    "k2": SimpleNamespace(rnnt_loss=k2_rnnt_loss),
    "fast_rnnt": SimpleNamespace(
        rnnt_loss=k2_rnnt_loss, rnnt_loss_simple=rnnt_loss_simple, do_rnnt_pruning=do_rnnt_pruning,
        get_rnnt_prune_ranges=get_rnnt_prune_ranges, rnnt_loss_pruned=rnnt_loss_pruned,
    ),
    "speechbrain.decoders.transducer": SimpleNamespace(
        TransducerBeamSearcher=TransducerBeamSearcher),
    "torchaudio.models": SimpleNamespace(RNNTBeamSearch=RNNTBeamSearch),
}


@pytest.fixture
def stand_ins(monkeypatch):
    for name, module in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")


# ------------------------------------------------------------------------------------- losses


def test_every_library_gives_our_cost_and_gradients(stand_ins, monkeypatch, capsys):
    monkeypatch.setattr(peers, "SHAPES", [(9, 8, 6, 7)])
    lines, result = run_here(monkeypatch, capsys, "loss", "--peers", "--batch-size", 3,
                             "--turns", 1)
    assert result["versions"] == dict.fromkeys(peers.LOSSES, "1.0")
    assert [table["dtype"] for table in result["tables"]] == ["bfloat16", "float32"]
    # bfloat16 rounds by 4e-3, and positive and negative gradients of nodes nearly cancel.
    for table, largest in zip(result["tables"], (0.1, 5e-6), strict=True):
        ours = ["ours, fused", "ours, band", "ours, plain"]
        assert list(table["rows"]) == [*ours, *peers.LOSSES]
        for name, row in table["rows"].items():
            assert row["utts_per_s"] > 0
            if name in ("fast_rnnt, pruned", "ours, band"):
                assert "deviations" not in row
                continue
            assert list(row["deviations"]) == ["cost", "encoded", "predicted", "weight", "bias"]
            assert max(row["deviations"].values()) < largest, name
    assert "V 9, J 8, mean 6 x 7 nodes, joint network in bfloat16" in "".join(lines)
    assert [line for line in lines if line.endswith("another objective")]


def test_libraries_that_are_not_installed_are_named(monkeypatch, capsys):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(peers, "SHAPES", [(9, 8, 6, 7)])
    lines, result = run_here(monkeypatch, capsys, "loss", "--peers", "--batch-size", 2,
                             "--turns", 1, "--precision", "fp32")
    assert [line.split(":")[0] for line in lines[: len(peers.LOSSES)]] == [
        f"{name} is left out; it needs the package {peer.package}"
        for name, peer in peers.LOSSES.items()
    ]
    (table,) = result["tables"]
    assert list(table["rows"]) == ["ours, fused", "ours, band", "ours, plain"]


def test_the_banded_loss_leaves_out_what_is_far_from_the_diagonal():
    """The band has all nodes of a lattice of 2 x 3, not of one of 9 x 10."""
    for size, is_same in ((2, True), (9, False)):
        inputs, lattice = peers.random_inputs(torch.tensor([size]), torch.tensor([size]), 4, 5)
        exact, banded = (f(inputs, lattice, 4).item()
                         for f in (peers.our_fused_loss, peers.our_banded_loss))
        assert (banded == pytest.approx(exact, rel=1e-6)) == is_same
        assert math.isfinite(banded)
        assert banded > 0.99 * exact


def test_memory_of_a_call_does_not_include_that_of_the_call_before():
    inputs, lattice = peers.random_inputs(torch.tensor([3]), torch.tensor([2]), 4, 5)

    def allocate(numbers):
        def function(inputs, lattice, blank):
            torch.ones(numbers)
            return sum(x.sum() for x in inputs)

        return peers.call_loss(function, inputs, lattice, 4, torch.float32).growth_gb

    assert allocate(2**26) == pytest.approx(0.25, abs=0.05)
    assert allocate(2**10) < 0.05


# ----------------------------------------------------------------------------------- searches


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("adapter", "module"), [
    (peers.speechbrain_search, "speechbrain.decoders.transducer"),
    (peers.torchaudio_search, "torchaudio.models"),
])
@torch.no_grad()
def test_searches_of_other_libraries_give_our_labels(adapter, module, seed):
    model, (feats, lens) = random_model(seed), random_batch(seed)
    search = adapter(STAND_INS[module], model)
    for x, n in zip(feats, lens, strict=True):
        encoded, enc_lens = model.encode(x[None, :n], n[None])
        expected = decode_alone(model, x[:n], decode.MAX_SYMBOLS_PER_FRAME)
        assert search(encoded, enc_lens) == [expected]


def test_searches_are_compared_on_one_core(stand_ins, monkeypatch, capsys, tmp_path):
    lines, result = run_here(monkeypatch, capsys, "decode", "--peers", *write_model(tmp_path),
                             "--turns", 1, "--batch-size", 3)
    assert torch.get_num_threads() == 1
    assert list(result["searches"]) == ["ours", "SpeechBrain", "torchaudio, beam 1",
                                        "ours, batches of 3", "SpeechBrain, batches of 3"]
    for name, row in result["searches"].items():
        assert row["utts_per_s"] > 0
        if name != "SpeechBrain, batches of 3":  # which searches padding too
            assert row["same_labels"] == result["utterances"] == 3, name
    assert lines[0].startswith("3 utterances, ")
