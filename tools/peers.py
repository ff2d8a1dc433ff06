# SPDX-License-Identifier: Apache-2.0
"""Other transducer libraries beside this project: joint network with loss, and greedy search.

    python -m tools.bench loss --peers
    python -m tools.bench decode --peers --checkpoint C --data ROOT --split S

Libraries that cannot be imported are named and left out. Every library gets the same joint network
and computes its own loss, or its own search over the networks of the checkpoint. SpeechBrain's loss
needs CUDA, so SpeechBrain takes part in the search alone.
"""

import argparse
import ctypes
import importlib
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import loss
from checkpoint import load_checkpoint
from decode import MAX_SYMBOLS_PER_FRAME, greedy_search, restore
from features import features, load_audio
from model import LstmState, Transducer
from tools.measure import draw_shapes, finish, plain_loss, rss_gb, spread

# V, J, mean encoder frames T, mean nodes of a frame U+1: preset democratized, and a model with
# twice as many encoder frames as mini.
SHAPES = ((1024, 512, 56, 69), (256, 256, 136, 86))
PRUNED_LABELS = 5  # lattice nodes of a frame that the pruned loss keeps
NUM_SEARCHED = 100  # utterances of the split that are decoded


class Peer(NamedTuple):
    """A library and the adapter that calls it."""

    module: str
    package: str  # that pip lists
    adapter: Callable


def import_peers(peers: Mapping[str, Peer]) -> dict[str, tuple[ModuleType, str]]:
    """Name -> module and version; prints the package of each peer that cannot be imported."""
    found = {}
    for name, peer in peers.items():
        try:
            version = importlib.metadata.version(peer.package)
            found[name] = importlib.import_module(peer.module), version
        except (ImportError, OSError) as error:  # OSError: built for another version of torch
            print(f"{name} is left out; it needs the package {peer.package}: {error}")
    return found


# ---------------------------------------------------------------------- losses of the libraries


def output_layer(sums: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Encoder plus predictor outputs (..., J) -> logits (..., V) in float32."""
    return F.linear(F.relu(sums), weight, bias).float()


def padded_logits(inputs: Sequence[Tensor]) -> Tensor:
    """(B, T, J), (B, U+1, J), (V, J), (V,) -> (B, T, U+1, V)."""
    encoded, predicted, weight, bias = inputs
    return output_layer(encoded[:, :, None] + predicted[:, None], weight, bias)


# An adapter takes a library's module, `inputs` and `lattice` of measure.plain_loss and the index of
# the blank. It returns the sum of all costs.


def torchaudio_loss(module: ModuleType, inputs: Sequence[Tensor], lattice: Sequence[Tensor],
                    blank: int) -> Tensor:
    """torchaudio's and warp-transducer's losses, which take the same arguments."""
    lattice = (x.int() for x in lattice)
    costs = module.rnnt_loss(padded_logits(inputs), *lattice, blank=blank, reduction="sum")
    return costs.sum()  # warp-transducer returns a vector of one number


def optimized_loss(module: ModuleType, inputs: Sequence[Tensor], lattice: Sequence[Tensor],
                   blank: int) -> Tensor:
    """optimized_transducer's loss: the valid nodes of all utterances are concatenated."""
    encoded, predicted, weight, bias = inputs
    targets, enc_lens, target_lens = (x.int() for x in lattice)
    sizes = zip(enc_lens.tolist(), target_lens.tolist(), strict=True)
    sums = torch.cat([(encoded[b, :n, None] + predicted[b, : u + 1]).flatten(0, 1)
                      for b, (n, u) in enumerate(sizes)])  # (nodes, J)
    logits = output_layer(sums, weight, bias)  # (nodes, V)
    return module.transducer_loss(logits, targets, enc_lens, target_lens, blank,
                                  from_log_softmax=False, reduction="sum").sum()


def k2_arguments(lattice: Sequence[Tensor], blank: int) -> dict:
    """Arguments that all losses of k2 and fast_rnnt share.

    Each row of `boundary` (B, 4) holds the first label, the first frame and the numbers of both.
    """
    targets, enc_lens, target_lens = lattice
    first = torch.zeros_like(enc_lens)
    return {"symbols": targets, "termination_symbol": blank, "reduction": "sum",
            "boundary": torch.stack([first, first, target_lens, enc_lens], 1)}


def k2_loss(module: ModuleType, inputs: Sequence[Tensor], lattice: Sequence[Tensor],
            blank: int) -> Tensor:
    """The exact loss of k2 and fast_rnnt."""
    return module.rnnt_loss(logits=padded_logits(inputs), **k2_arguments(lattice, blank))


def pruned_loss(module: ModuleType, inputs: Sequence[Tensor], lattice: Sequence[Tensor],
                blank: int) -> Tensor:
    """The pruned loss of fast_rnnt, Kuang et al. (2022), arXiv:2206.13236: another objective.

    The output layer also serves as the projection of the simple loss, which finds the nodes that
    stay.
    """
    encoded, predicted, weight, bias = inputs
    arguments = k2_arguments(lattice, blank)
    am, lm = F.linear(encoded, weight, bias).float(), F.linear(predicted, weight).float()
    with torch.autocast("cpu", enabled=False):
        simple, grads = module.rnnt_loss_simple(am=am, lm=lm, return_grad=True, **arguments)
        ranges = module.get_rnnt_prune_ranges(*grads, arguments["boundary"], PRUNED_LABELS)
    am, lm = module.do_rnnt_pruning(am=encoded, lm=predicted, ranges=ranges)
    logits = output_layer(am + lm, weight, bias)  # (B, T, PRUNED_LABELS, V)
    return simple + module.rnnt_loss_pruned(logits=logits, ranges=ranges, **arguments)


def our_fused_loss(inputs: Sequence[Tensor], lattice: Sequence[Tensor], blank: int) -> Tensor:
    return loss.joint_transducer_loss(*inputs, *lattice, blank, reduction="sum")


def our_banded_loss(inputs: Sequence[Tensor], lattice: Sequence[Tensor], blank: int) -> Tensor:
    """Our loss on the PRUNED_LABELS nodes of each frame that are nearest to the diagonal.

    Training takes the band from a CTC head and widens a band that leaves out likely paths. Random
    inputs have no likely path, so that every band would be widened: it stays as it is here.
    """
    targets, enc_lens, target_lens = lattice
    T, U1 = inputs[0].shape[1], inputs[1].shape[1]
    diagonal = (torch.arange(T) + 0.5) / enc_lens[:, None] * target_lens[:, None]  # (B, T)
    distance = (torch.arange(U1) - diagonal[:, :, None]).abs()  # (B, T, U+1)
    band = (distance <= PRUNED_LABELS / 2) & loss.inside_lattice(T, U1, enc_lens, target_lens)
    return loss.joint_transducer_loss(*inputs, *lattice, blank, reduction="sum", band=band,
                                      border_visits=math.inf)


def our_plain_loss(inputs: Sequence[Tensor], lattice: Sequence[Tensor], blank: int) -> Tensor:
    return plain_loss(inputs, lattice, blank, dropout=0.0, reduction="sum")


PRUNED = "fast_rnnt, pruned"
BANDED = "ours, band"
LOSSES = {
    "optimized_transducer": Peer("optimized_transducer", "optimized_transducer", optimized_loss),
    "warp-transducer": Peer("warprnnt_pytorch", "warprnnt_pytorch", torchaudio_loss),
    "fast_rnnt": Peer("fast_rnnt", "fast_rnnt", k2_loss),
    PRUNED: Peer("fast_rnnt", "fast_rnnt", pruned_loss),
    "k2": Peer("k2", "k2", k2_loss),
    "torchaudio": Peer("torchaudio.functional", "torchaudio", torchaudio_loss),
}


# ------------------------------------------------------------------------ comparison of losses


def random_inputs(enc_lens: Tensor, target_lens: Tensor, J: int, V: int) -> tuple:
    """`inputs` and `lattice` of measure.plain_loss, the same numbers at every call."""
    B, T, U = len(enc_lens), int(enc_lens.max()), int(target_lens.max())
    torch.manual_seed(1)
    inputs = (torch.randn(B, T, J), torch.randn(B, U + 1, J), torch.randn(V, J) / math.sqrt(J),
              torch.zeros(V))
    targets = torch.randint(0, V - 1, (B, U))
    return tuple(x.requires_grad_() for x in inputs), (targets, enc_lens, target_lens)


def draw_lens(batch: int, mean_frames: float, mean_nodes: float) -> tuple[Tensor, Tensor]:
    """Lengths spread like those of train-clean-100: enc_lens (B,), target_lens (B,).

    Their means are `mean_frames` and, with one more for each utterance, `mean_nodes`.
    """
    seconds, labels = torch.tensor(draw_shapes(batch), dtype=torch.float64).unbind(1)
    enc_lens, nodes = ((x * mean / x.mean()).round().long().clamp_min(1)
                       for x, mean in ((seconds, mean_frames), (labels + 1, mean_nodes)))
    return enc_lens, nodes - 1


class Call(NamedTuple):
    """One forward and backward pass."""

    results: dict[str, Tensor]  # the cost and each gradient
    seconds: float
    growth_gb: float  # of the resident memory, at its peak


def call_loss(function: Callable, inputs: Sequence[Tensor], lattice: Sequence[Tensor], blank: int,
              dtype: torch.dtype, is_first: bool = True) -> Call:
    """Calls a loss whose matrix products run in `dtype`, and its backward pass."""
    for x in inputs:
        x.grad = None
    if is_first:  # free memory that the call would use again must count as growth
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux resets the peak that rss_gb reads
    before = rss_gb("VmRSS")
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        cost = function(inputs, lattice, blank)
    cost.backward()
    seconds = time.perf_counter() - started
    names = ("cost", "encoded", "predicted", "weight", "bias")
    results = (cost.detach(), *(x.grad for x in inputs))
    return Call(dict(zip(names, results, strict=True)), seconds, rss_gb() - before)


def deviation(x: Tensor, exact: Tensor) -> float:
    """Euclidean norm of the difference, relative to that of `exact`."""
    return float((x - exact).norm() / exact.norm())


def compare_losses(functions: Mapping[str, Callable], shape: Sequence[int], dtype: torch.dtype,
                   batch: int, turns: int) -> dict[str, dict]:
    """Calls all losses in turns on the same batch and prints a table of them.

    Returns:
        Row by name: utterances a second (median), memory, and the deviations of the cost and of
        each gradient from the fused loss in float64.
    """
    V, J, mean_frames, mean_nodes = shape
    inputs, lattice = random_inputs(*draw_lens(batch, mean_frames, mean_nodes), J, V)
    in_float64 = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = call_loss(our_fused_loss, in_float64, lattice, V - 1, torch.float64).results
    calls: dict[str, list[Call]] = {name: [] for name in functions}
    for turn in range(turns + 1):
        for name, function in functions.items():
            call = call_loss(function, inputs, lattice, V - 1, dtype, is_first=turn == 0)
            calls[name].append(call)
    print(f"\nV {V}, J {J}, mean {mean_frames} x {mean_nodes} nodes, joint network in "
          f"{str(dtype).removeprefix('torch.')}; deviations of cost and gradients\n"
          f"{'':<24}{'utts/s':>8}{'GB':>8}" + "".join(f"{name:>11}" for name in exact))
    rows = {}
    for name, (first, *measured) in calls.items():  # the first call builds kernels
        row = rows[name] = {
            "utts_per_s": batch / statistics.median(call.seconds for call in measured),
            "memory_growth_gb": first.growth_gb,
        }
        if name not in (PRUNED, BANDED):
            row["deviations"] = {key: deviation(first.results[key], exact[key]) for key in exact}
        cells = "".join(f"{x:>11.1e}" for x in row.get("deviations", {}).values())
        print(f"{name:<24}{row['utts_per_s']:>8.1f}{row['memory_growth_gb']:>8.2f}"
              f"{cells or '    another objective'}")
    return rows


def bench_losses(args: argparse.Namespace) -> None:
    """Joint network and loss of every library: speed, memory and deviation from float64."""
    torch.set_flush_denormal(True)
    modules = import_peers(LOSSES)
    functions = {"ours, fused": our_fused_loss, BANDED: our_banded_loss,
                 "ours, plain": our_plain_loss}
    functions |= {name: partial(LOSSES[name].adapter, module)
                  for name, (module, _) in modules.items()}
    dtypes = {"bf16": [torch.bfloat16], "fp32": [torch.float32],
              "auto": [torch.bfloat16, torch.float32]}[args.precision]
    tables = [
        {"V": shape[0], "J": shape[1], "nodes": shape[2:], "dtype": str(dtype).split(".")[1],
         "rows": compare_losses(functions, shape, dtype, args.batch_size, args.turns)}
        for shape in SHAPES for dtype in dtypes
    ]
    finish({"tables": tables, "versions": {name: v for name, (_, v) in modules.items()},
            "batch": args.batch_size, "threads": torch.get_num_threads()})


# --------------------------------------------------------------------- greedy searches

# A search takes encoded (B, T, J) and enc_lens (B,) and returns the labels of each utterance.
Search = Callable[[Tensor, Tensor], list[list[int]]]


def speechbrain_search(module: ModuleType, model: Transducer) -> Search:
    """SpeechBrain's greedy search, which starts with blank and searches padding frames too."""

    class LSTM(nn.Module):  # the searcher finds recurrent layers by the name of their class
        def forward(self, x: Tensor, state: LstmState | None) -> tuple[Tensor, LstmState]:
            return model.predictor.rnn(x, state)

    labels = model.predictor.embed.weight  # (V-1, H)
    embed = nn.Embedding.from_pretrained(torch.cat([labels, torch.zeros_like(labels[:1])]))
    layers = [embed, LSTM(), model.joint_network.predictor_projection]
    searcher = module.TransducerBeamSearcher(layers, model.joint_network, [], model.cfg.blank,
                                             beam_size=1)
    # The searcher emits one label more than its limit says.
    limit = MAX_SYMBOLS_PER_FRAME - 1
    return lambda encoded, _: searcher.transducer_greedy_decode(
        encoded, max_symbols_per_step=limit)[0]


class TorchaudioModel(nn.Module):
    """The prediction and joint network behind the methods that RNNTBeamSearch calls."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def transcribe(self, encoded: Tensor, enc_lens: Tensor) -> tuple[Tensor, Tensor]:
        return encoded, enc_lens

    def predict(self, labels: Tensor, lens: Tensor,
                state: list[list[Tensor]] | None) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """(B, 1) labels, [hidden, cell] (B, H) of each layer -> (B, 1, J), lens, state."""
        if state is None:  # the search starts with blank
            x, after = self.model.predictor.start(len(labels))
        else:
            before = tuple(torch.stack(layers) for layers in zip(*state, strict=True))
            x, after = self.model.predictor.step(labels[:, 0], before)
        predicted = self.model.joint_network.predictor_projection(x)[:, None]
        return predicted, lens, [list(layer) for layer in zip(*after, strict=True)]

    def join(self, encoded: Tensor, enc_lens: Tensor, predicted: Tensor,
             lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(1, 1, J), (B, 1, J) -> logits (B, 1, 1, V)."""
        return self.model.joint(encoded, predicted), enc_lens, lens


def torchaudio_search(module: ModuleType, model: Transducer) -> Search:
    """torchaudio's beam search of width 1, for one utterance.

    It is nearly greedy: it may go on to the next frame without a label although the label is more
    likely than blank, if the blank after the label is unlikely.
    """
    search = module.RNNTBeamSearch(TorchaudioModel(model), model.cfg.blank)
    # A hypothesis is a tuple of labels, the first of them blank, and three more items.
    return lambda encoded, enc_lens: [search(encoded, enc_lens, 1)[0][0][1:]]


SEARCHES = {
    "SpeechBrain": Peer("speechbrain.decoders.transducer", "speechbrain", speechbrain_search),
    "torchaudio, beam 1": Peer("torchaudio.models", "torchaudio", torchaudio_search),
}


def encode_all(model: Transducer, feats: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """Encoder outputs (T, J) of utterances (T_in, D) that are encoded alone, and the seconds."""
    started = time.perf_counter()
    encoded = [model.encode(x[None], torch.tensor([len(x)]))[0][0] for x in feats]
    return encoded, time.perf_counter() - started


def run_search(search: Search, encoded: Sequence[Tensor],
               batch: int) -> tuple[list[list[int]], float]:
    """Labels of all utterances, `batch` at a time, and the seconds."""
    started, labels = time.perf_counter(), []
    for i in range(0, len(encoded), batch):
        chosen = encoded[i : i + batch]
        padded = nn.utils.rnn.pad_sequence(list(chosen), batch_first=True)  # (B, T, J)
        labels += search(padded, torch.tensor([len(x) for x in chosen]))
    return labels, time.perf_counter() - started


@torch.no_grad()
def bench_searches(args: argparse.Namespace) -> None:
    """Greedy searches of the same encoder outputs with the same networks on one core, in turns.

    The labels are compared with those of our search of each utterance alone.
    """
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    model, _, cfg = restore(load_checkpoint(args.checkpoint))
    modules = import_peers(SEARCHES)
    alone = {"ours": lambda encoded, enc_lens: greedy_search(model, encoded, enc_lens)[0]} | {
        name: SEARCHES[name].adapter(module, model) for name, (module, _) in modules.items()}
    searches = {name: (search, 1) for name, search in alone.items()} | {
        f"{name}, batches of {args.batch_size}": (alone[name], args.batch_size)
        for name in ("ours", "SpeechBrain") if name in alone}
    utterances = spread(data.read_split(args.data, args.split, cfg), NUM_SEARCHED)
    feats = [features(load_audio(u.path, cfg), cfg) for u in utterances]
    feats.sort(key=len)  # so that batches need little padding
    encode_all(model, feats[-1:])  # builds oneDNN's kernels
    encoded, encoder_s = encode_all(model, feats)
    runs: dict[str, list] = {name: [] for name in searches}
    for _ in range(args.turns + 1):
        for name, (search, batch) in searches.items():
            runs[name].append(run_search(search, encoded, batch))
    expected, count = runs["ours"][0][0], len(feats)
    print(f"{count} utterances, {sum(map(len, expected))} labels, one core; the encoder alone: "
          f"{count / encoder_s:.1f} utterances/s\n{'':<28}{'utts/s':>8}{'same labels':>14}")
    rows = {}
    for name, (_, *measured) in runs.items():
        same = sum(x == y for x, y in zip(measured[-1][0], expected, strict=True))
        rate = count / statistics.median(seconds for _, seconds in measured)
        rows[name] = {"utts_per_s": rate, "same_labels": same}
        print(f"{name:<28}{rate:>8.1f}{same:>8} of {count}")
    finish({"searches": rows, "utterances": count, "encoder_utts_per_s": count / encoder_s,
            "versions": {name: version for name, (_, version) in modules.items()}})
