# SPDX-License-Identifier: Apache-2.0
"""The transducer loss in pure PyTorch, exact, for logits or fused with the joint network.

This file stands alone: copy it into another project (it needs torch only). `transducer_loss`
takes logits as torchaudio's rnnt_loss does; `joint_transducer_loss` takes the two inputs of the
joint network instead and never holds the logits of a batch.

Shape letters are those of model.py: B utterances, T encoder frames, U labels (the lattice axis
is U+1), V classes with blank, J joint hidden size.

The lattice of Graves (2012), arXiv:1211.3711, sec. 2.4, has a node (t, u) for "t frames read,
u labels emitted". From each node two arcs leave: blank to (t+1, u) and label to (t, u+1). The
loss is -log of the probability summed over all paths from (0, 0) to (T, U) whose last arc is a
blank, and its gradient with respect to an arc's log-probability is minus the probability that
a path runs through that arc.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

# LOG_ZERO stands for log 0. It is finite so that the difference of two of them is 0 and not NaN.
LOG_ZERO = -1e30


# --------------------------------------------------------------------------------- the lattice


def skew(scores: Tensor, fill: float) -> Tensor:
    """(B, T, U+1) -> (T+U, B, U+1): entry [t + u, b, u] is scores[b, t, u], `fill` elsewhere.

    Nodes of one anti-diagonal t + u depend on the previous one only, so the recursions below
    take T + U vectorised steps. Rows that are padded to T+U+1 entries and then read as rows of T+U
    move right by one place more in every row.
    """
    B, T, U1 = scores.shape
    rows = F.pad(scores.transpose(1, 2), (0, U1), value=fill)  # (B, U+1, T+U+1)
    rows = rows.reshape(B, -1)[:, : U1 * (T + U1 - 1)].view(B, U1, T + U1 - 1)
    return rows.permute(2, 0, 1).contiguous()  # (T+U, B, U+1)


def unskew(diagonals: Tensor) -> Tensor:
    """(T+U, B, U+1) -> (B, T, U+1), the inverse of `skew`."""
    count, B, U1 = diagonals.shape
    rows = F.pad(diagonals.permute(1, 2, 0).reshape(B, -1), (0, U1))
    return rows.view(B, U1, count + 1)[:, :, : count + 1 - U1].transpose(1, 2)  # (B, T, U+1)


def inside_lattice(T: int, U1: int, enc_lens: Tensor, target_lens: Tensor) -> Tensor:
    """(B, T, U+1) booleans, True at the nodes of each lattice."""
    t = torch.arange(T, device=enc_lens.device)[:, None]
    u = torch.arange(U1, device=enc_lens.device)
    return (t < enc_lens[:, None, None]) & (u <= target_lens[:, None, None])


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # backends differ
        return torch.float32
    return torch.float64


class Lattice:
    """Forward variables and arc posteriors of a batch of lattices, in float64.

    On a device without float64 they are in float32: costs of 200 frames and 100 labels are then
    exact to 1e-5 of their value, and posteriors to 1e-3.

    Args:
        blank: (B, T, U+1) log-probability of the blank arc that leaves each node.
        label: (B, T, U+1) log-probability of the label arc that leaves each node.
        enc_lens, target_lens: (B,) sizes of each lattice; arcs outside are never taken.
        band: (B, T, U+1) booleans; no path leaves a node where it is False.

    `costs` is (B,), the negative log-likelihoods.
    """

    def __init__(self, blank: Tensor, label: Tensor, enc_lens: Tensor, target_lens: Tensor,
                 band: Tensor | None = None) -> None:
        B, T, U1 = blank.shape
        inside = inside_lattice(T, U1, enc_lens, target_lens)
        has_label = inside_lattice(T, U1, enc_lens, target_lens - 1)
        if band is not None:
            inside, has_label = inside & band, has_label & band
        dtype = widest_float(blank.device)
        # A caller may mask classes with -inf, which leaves nodes that no path reaches.
        blank = blank.to(dtype).masked_fill(~inside, LOG_ZERO).clamp_min(LOG_ZERO)
        label = label.to(dtype).masked_fill(~has_label, LOG_ZERO).clamp_min(LOG_ZERO)
        blank = skew(blank, LOG_ZERO)  # (T+U, B, U+1)
        # Label arcs are stored at the node where they arrive: entry u holds the arc from u-1.
        label = F.pad(skew(label, LOG_ZERO)[:, :, :-1], (1, 0), value=LOG_ZERO)

        # alpha[t + u, b, 1 + u] is the log-probability of reaching (t, u); column 0 is a guard.
        alpha = blank.new_full((T + U1, B, U1 + 1), LOG_ZERO)
        alpha[0, :, 1] = 0
        for d in range(T + U1 - 1):
            torch.logaddexp(alpha[d, :, 1:] + blank[d], alpha[d, :, :-1] + label[d],
                            out=alpha[d + 1, :, 1:])
        # The indices of node (T, U) of every utterance in alpha[:, :, 1:].
        self.end = (enc_lens + target_lens, torch.arange(B, device=blank.device), target_lens)
        costs = -alpha[:, :, 1:][self.end]  # (B,)
        self.costs = costs.masked_fill(costs >= -LOG_ZERO, torch.inf)  # no path reaches the end
        self.alpha, self.blank, self.label = alpha, blank, label

    @cached_property
    def posteriors(self) -> tuple[Tensor, Tensor]:
        """Probabilities that a path takes the blank and the label arc of each node.

        Two (B, T, U+1) tensors. They add up to T and to U over each lattice. Instead of Graves'
        beta, the probability mass flows back from the end: the share of a node's mass that
        came over an arc is alpha[source] * arc / alpha[node], so there is no logarithm in the
        loop and nothing can overflow.
        """
        arrived = self.alpha[1:, :, 1:]
        from_blank = torch.exp(self.alpha[:-1, :, 1:] + self.blank - arrived)  # (T+U, B, U+1)
        from_label = torch.exp(self.alpha[:-1, :, :-1] + self.label - arrived)
        mass = torch.zeros_like(arrived[:1]).repeat(len(self.alpha), 1, 1)
        mass[self.end] = 1  # mass[t + u, b, u] is the probability that a path visits (t, u)
        for d in reversed(range(len(from_blank))):
            from_blank[d] *= mass[d + 1]
            from_label[d] *= mass[d + 1]
            mass[d] += from_blank[d]
            mass[d, :, :-1] += from_label[d, :, 1:]
        return unskew(from_blank), unskew(F.pad(from_label[:, :, 1:], (0, 1)))


# --------------------------------------------------------------------- arguments of both losses


def check_batch(B: int, T: int, U: int, V: int, targets: Tensor, enc_lens: Tensor,
                target_lens: Tensor, blank: int, lens_name: str) -> int:
    """Raises ValueError that names an argument and its value unless they make a batch.

    `lens_name` is the caller's name for `enc_lens`, for messages. Returns the index of the blank.
    """
    if not -1 <= blank < V:
        raise ValueError(f"blank: {blank}, expected -1 or 0 <= blank < {V}")
    blank = V - 1 if blank == -1 else blank  # as in torchaudio
    if B < 1:
        raise ValueError("a batch of 0 utterances, expected at least 1")
    if targets.shape != (B, U) or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets: {tuple(targets.shape)} {targets.dtype}, expected int32 or "
                         f"int64 {(B, U)}")
    for name, lens, low, high in ((lens_name, enc_lens, 1, T), ("target_lens", target_lens, 0, U)):
        if lens.shape != (B,) or lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: {tuple(lens.shape)} {lens.dtype}, expected int32 or int64 "
                             f"({B},)")
        for b, n in enumerate(lens.tolist()):
            if not low <= n <= high:
                raise ValueError(f"{name}[{b}]: {n}, expected {low} <= n <= {high}")
    used = torch.arange(U, device=targets.device) < target_lens[:, None]
    wrong = used & ((targets == blank) | (targets < 0) | (targets >= V))
    for b, u in wrong.nonzero().tolist()[:1]:
        raise ValueError(f"targets[{b}, {u}]: {targets[b, u].item()}, expected 0 <= label < {V} "
                         f"other than blank {blank}")
    return blank


def label_of_node(targets: Tensor, target_lens: Tensor) -> Tensor:
    """(B, U) -> (B, U+1): the label that each lattice column emits, 0 where it emits none."""
    emits = torch.arange(targets.shape[1], device=targets.device) < target_lens[:, None]
    return F.pad(targets.long() * emits, (0, 1))


def refuse_second_derivative() -> None:
    """Raises in a backward pass with create_graph=True, where autograd would take the lattice's
    posteriors for constants."""
    if torch.is_grad_enabled():
        raise RuntimeError("the transducer loss has no second derivative")


def reduce_costs(costs: Tensor, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: {reduction!r}, expected 'none', 'mean' or 'sum'")
    return costs if reduction == "none" else getattr(costs, reduction)()


# ----------------------------------------------------------------------------- loss on logits


class LatticeCosts(torch.autograd.Function):
    """Arc log-probabilities -> costs (B,); see `Lattice` for arguments and gradient."""

    @staticmethod
    def forward(ctx: Any, blank: Tensor, label: Tensor, enc_lens: Tensor,
                target_lens: Tensor) -> Tensor:
        ctx.lattice = Lattice(blank, label, enc_lens, target_lens)
        ctx.dtype = blank.dtype
        # Autograd lets the result refer to ctx. Without a copy ctx would refer to it where it has
        # the lattice's dtype, and the cycle would keep the lattice alive.
        return ctx.lattice.costs.to(blank.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        scale = -grad_costs.to(ctx.lattice.costs.dtype)[:, None, None]
        grads = ((posterior * scale).to(ctx.dtype) for posterior in ctx.lattice.posteriors)
        return *grads, None, None


def transducer_loss(logits: Tensor, targets: Tensor, logit_lens: Tensor, target_lens: Tensor,
                    blank: int, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of `targets`, summed over all alignments.

    Graves (2012), arXiv:1211.3711, sec. 2.4; arguments in the order of torchaudio's rnnt_loss.
    U = 0, T = 1 and U > T are valid. The lattice runs in float64 where the device has it (see
    `Lattice`), the softmax in the dtype of `logits`, at least float32.

    Args:
        logits: (B, T, U+1, V) unnormalised scores; U+1 because a blank may follow the last label.
        targets: (B, U) label ids, none equal to `blank`; entries past `target_lens` are ignored.
        logit_lens: (B,) valid encoder frames, 1 <= n <= T.
        target_lens: (B,) valid labels, 0 <= n <= U.
        blank: index of the blank class, 0 <= blank < V, or -1 for the last class.
        reduction: "none" (B,), "sum", or "mean" over the utterances (not over labels).
    Returns:
        Costs in nats (natural logarithm).
    Raises:
        ValueError: a shape, length or label is not possible; the message has its value.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (B, T, U+1, V)")
    B, T, U1, V = logits.shape
    blank = check_batch(B, T, U1 - 1, V, targets, logit_lens, target_lens, blank, "logit_lens")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)  # (B, T, U+1, V)
    labels = label_of_node(targets, target_lens)[:, None, :, None].expand(B, T, U1, 1)
    label = log_probs.gather(3, labels)[..., 0]  # (B, T, U+1)
    costs = LatticeCosts.apply(log_probs[..., blank], label, logit_lens, target_lens)
    return reduce_costs(costs, reduction)


# ---------------------------------------------------------------------------------- CTC loss


def ctc_loss(logits: Tensor, targets: Tensor, logit_lens: Tensor, target_lens: Tensor,
             blank: int) -> tuple[Tensor, Tensor]:
    """Connectionist temporal classification, Graves et al. (2006), by torch's `ctc_loss`.

    An alignment needs a position for every label and one more between two equal labels.

    Args:
        logits: (B, P, V) unnormalised scores of P label positions.
        targets: (B, U) label ids; entries past `target_lens` are ignored.
        logit_lens: (B,) valid positions.
        target_lens: (B,) valid labels.
        blank: index of the blank class.
    Returns:
        Costs in nats (B,), and booleans (B,) that are False where no alignment exists; the cost
        and its gradient are 0 there.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, -1, dtype=dtype).transpose(0, 1)  # (P, B, V)
    costs = F.ctc_loss(log_probs, targets, logit_lens, target_lens, blank, reduction="none",
                       zero_infinity=True)
    used = torch.arange(targets.shape[1], device=targets.device) < target_lens[:, None]  # (B, U)
    repeats = ((targets[:, 1:] == targets[:, :-1]) & used[:, 1:]).sum(1)  # (B,)
    return costs, target_lens + repeats <= logit_lens


# The CTC head's alignments visit a node if their probability of passing it is above this.
LEAST_VISIT = 1e-3


@record_function("ctc_band")
@torch.no_grad()
def ctc_band(logits: Tensor, targets: Tensor, enc_lens: Tensor, target_lens: Tensor, blank: int,
             split: int, frames: int, labels: int = 2) -> Tensor:
    """(B, T, U+1) booleans: the nodes of the transducer's lattice near a CTC head's alignments.

    The head's log-probabilities, which depend on no earlier label, score a lattice whose paths
    emit a label where CTC does. A node is near if a node that these paths visit with a probability
    above LEAST_VISIT lies at most `frames` frames and `labels` labels away.

    Args:
        logits: (B, T*split, V) unnormalised scores of the head, `split` positions a frame.
        targets, enc_lens, target_lens, blank: as in `transducer_loss`.
    """
    log_probs = F.log_softmax(logits, -1, dtype=torch.float32)  # (B, T*split, V)
    ids = label_of_node(targets, target_lens)  # (B, U+1)
    label = log_probs.gather(2, ids[:, None].expand(-1, logits.shape[1], -1))  # (B, T*split, U+1)
    lattice = Lattice(log_probs[:, :, blank, None].expand_as(label), label, split * enc_lens,
                      target_lens)
    visits = sum(lattice.posteriors).unflatten(1, (-1, split)).amax(2)  # (B, T, U+1)
    near = F.max_pool2d((visits > LEAST_VISIT).float(), (2 * frames + 1, 2 * labels + 1), 1,
                        (frames, labels))
    return (near > 0) & inside_lattice(*near.shape[1:], enc_lens, target_lens)


# ------------------------------------------------------------- loss fused with the joint network

# A matrix product takes this many rows (lattice nodes) of the joint network, so that their logits
# stay in a core's cache between the product, the softmax and the gradient.
BLOCK_ROWS = 1024

# oneDNN builds and keeps a kernel for every new number of rows. Numbers of rows are rounded up
# to a multiple of this, so that there are few.
ROW_UNIT = 128

# Lattice nodes visited with a probability below this many units of rounding of the compute
# dtype get no gradient. A node's gradient row has an L1 norm of at most twice that probability,
# so the sum of what is left out, relative to the T + U arcs of a path, is at most
# 2 * T * (U+1) / (T + U) * SKIP_BELOW * eps: for T = U = 100 a tenth of eps, in any dtype.
SKIP_BELOW = 2.0**-10


def whole_rows(count: int) -> int:
    return -(-count // ROW_UNIT) * ROW_UNIT


def kept_numbers(dropout: float) -> int:
    """How many of the random numbers 0 to 2^15 - 1 keep a value, at least one."""
    return max(2**15 - round(dropout * 2**15), 1)


def random_rows(count: int, device: torch.device) -> Tensor:
    """(2, count) int16, uniform from 0 to 2^15 - 1, from torch's global random state."""
    words = torch.empty(2, -(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None)
    return words.bitwise_and_(0x7FFF_7FFF_7FFF_7FFF).view(torch.int16)[:, :count]


def drop(hidden: Tensor, dropout: float, random: Tensor) -> None:
    """Sets every value, even NaN, to 0 in place with probability `dropout`; scales no value.

    Drawing a number for every value would take longer than the matrix products, so two `random`
    rows, each twice as long as a block, are drawn once. Each contiguous block XORs a random slice
    of one with a random slice of the other; values are independent, except in two blocks whose
    slices happen to have the same offset to each other.
    """
    count = hidden.numel()
    first, second = torch.randint(random.shape[1] - count, (2,)).tolist()
    numbers = random[0, first : first + count] ^ random[1, second : second + count]
    # The mask is made by integer arithmetic, since PyTorch does not vectorise comparisons to
    # booleans, nor products with them. A shift by 15 leaves all bits of negative numbers set.
    numbers -= 2**15 - kept_numbers(dropout)  # negative numbers drop
    keep = numbers.bitwise_right_shift_(15).bitwise_not_().view_as(hidden)  # all bits, or none
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    hidden.view(bits).bitwise_and_(keep.to(bits))


def joint_hidden(encoded: Tensor, predicted: Tensor, nodes: Tensor, dropout: float,
                 dtype: torch.dtype) -> Tensor:
    """(B*T, J), (B*(U+1), J) -> (rows, J): dropout(relu(sum)) of the `nodes`, not scaled yet.

    `nodes` (2, count) are the rows of `encoded` and of `predicted` that meet in each node. Rows of
    zeros follow up to a multiple of ROW_UNIT. Dropout's scale is left to the output layer's weight.
    """
    count, J = nodes.shape[1], encoded.shape[1]
    hidden = encoded.new_empty(whole_rows(count), J, dtype=dtype)
    hidden[count:] = 0
    random = random_rows(2 * min(BLOCK_ROWS, len(hidden)) * J, hidden.device) if dropout else None
    for block, (frames, histories) in zip(hidden[:count].split(BLOCK_ROWS),
                                          nodes.split(BLOCK_ROWS, 1), strict=True):
        torch.add(encoded[frames], predicted[histories], out=block)
        block.relu_()
        if dropout:
            drop(block, dropout, random)
    return hidden


def arc_scores(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor,
               blank: int) -> Tensor:
    """(rows, J), (rows,) -> (2, rows) log-probabilities of the blank and the label arcs."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    scores = hidden.new_empty(2, len(hidden), dtype=dtype)
    for h, ids, out in zip(hidden.split(BLOCK_ROWS), labels.split(BLOCK_ROWS),
                           scores.split(BLOCK_ROWS, 1), strict=True):
        log_probs = F.log_softmax(F.linear(h, weight, bias), -1, dtype=dtype)  # (block, V)
        out[0] = log_probs[:, blank]
        out[1] = log_probs.gather(1, ids[:, None])[:, 0]
    return scores


def joint_backward(hidden: Tensor, rows: Tensor, arcs: Tensor, labels: Tensor, weight: Tensor,
                   bias: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some `rows` of `hidden` before ReLU and dropout, of `weight` and of `bias`.

    A node's gradient with respect to its logits is softmax * (blank + label posterior), minus
    the posterior of each arc at the class that the arc emits. `arcs` (2, count) are the posteriors
    of the rows' blank and label arcs, times the upstream gradient.
    """
    grad_hidden = hidden.new_empty(len(rows), hidden.shape[1])
    grad_weight = torch.zeros_like(weight, dtype=arcs.dtype)
    grad_bias = torch.zeros_like(bias, dtype=arcs.dtype)
    for chosen, p, out in zip(rows.split(BLOCK_ROWS), arcs.split(BLOCK_ROWS, 1),
                              grad_hidden.split(BLOCK_ROWS), strict=True):
        h = hidden[chosen]
        g = F.softmax(F.linear(h, weight, bias), -1, dtype=arcs.dtype)  # (block, V)
        g *= p.sum(0)[:, None]
        g[:, blank] -= p[0]
        g.scatter_add_(1, labels[chosen][:, None], -p[1][:, None])
        grad_bias += g.sum(0)
        g = g.to(weight.dtype)
        grad_weight += g.T @ h
        torch.mm(g, weight, out=out)
        # Values that ReLU or dropout have made 0 pass no gradient.
        torch.ops.aten.threshold_backward.grad_input(out, h, 0, grad_input=out)
    return grad_hidden, grad_weight, grad_bias


def sum_by_key(rows: Tensor, keys: Tensor, count: int) -> Tensor:
    """(n, J), (n,) -> (count, J): entry k is the sum of the rows whose key is k."""
    order = keys.argsort()
    starts = torch.searchsorted(keys[order], torch.arange(count, device=keys.device))
    return F.embedding_bag(order, rows, starts, mode="sum")


# A band is wide enough if a path visits at most this many of its border nodes on average.
MOST_BORDER_VISITS = 0.02


def widen(band: Tensor, inside: Tensor, lattice: Lattice, most_visits: float) -> bool:
    """Extends the band to the whole lattice for utterances whose paths come near to its border.

    All tensors are (B, T, U+1). A path can only leave the band from a node at its border, so paths
    that seldom visit the border seldom go beyond it. This is an estimate and no bound: it knows the
    arcs inside alone. `band` is changed in place. Returns whether any band was widened.
    """
    missing = inside & ~band
    leads_out = F.pad(missing[:, 1:], (0, 0, 0, 1)) | F.pad(missing[:, :, 1:], (0, 1))
    visits = (sum(lattice.posteriors) * leads_out).sum((1, 2))  # (B,)
    # If no path stays inside the band, its visits are NaN or 0 and the cost is infinite.
    too_narrow = ~(visits <= most_visits) | lattice.costs.isinf()
    too_narrow &= missing.any(2).any(1)
    band |= inside & too_narrow[:, None, None]
    return bool(too_narrow.any())


class JointCosts(torch.autograd.Function):
    """Encoder and predictor outputs, output layer -> costs (B,).

    The forward pass keeps the hidden rows and the lattice, but no logits and no softmax. The
    backward pass computes the logits again, for the nodes that paths really visit: most of them
    early in training, a small part once the model aligns.
    """

    @staticmethod
    def forward(ctx: Any, encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                labels: Tensor, enc_lens: Tensor, target_lens: Tensor, blank: int,
                dropout: float, dtype: torch.dtype, band: Tensor | None,
                border_visits: float) -> Tensor:
        (B, T, J), U1 = encoded.shape, predicted.shape[1]
        inside = inside_lattice(T, U1, enc_lens, target_lens)
        scale = 2**15 / kept_numbers(dropout)
        output = (weight * scale).to(dtype), bias.to(dtype)
        while True:  # a widened band repeats the whole batch, with new dropout masks
            chosen = inside if band is None else inside & band
            b, t, u = chosen.nonzero(as_tuple=True)
            nodes = torch.stack([b * T + t, b * U1 + u])  # (2, count)
            hidden = joint_hidden(encoded.reshape(B * T, J), predicted.reshape(B * U1, J), nodes,
                                  dropout, dtype)  # (rows, J)
            ids = F.pad(labels[b, u], (0, len(hidden) - len(u)))  # (rows,)
            scores = arc_scores(hidden, ids, *output, blank)  # (2, rows)
            arcs = scores.new_zeros(2, B, T, U1)
            arcs[:, chosen] = scores[:, : len(u)]
            with record_function("lattice"):
                lattice = Lattice(*arcs, enc_lens, target_lens, band)
            if band is None or not widen(band, inside, lattice, border_visits):
                break
        ctx.lattice = lattice
        ctx.save_for_backward(encoded, predicted, weight, bias, hidden, ids, nodes, chosen)
        ctx.blank, ctx.scale, ctx.dtype = blank, scale, dtype
        return lattice.costs.to(scores.dtype, copy=True)  # a copy as in LatticeCosts

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        encoded, predicted, weight, bias, hidden, ids, nodes, chosen = ctx.saved_tensors
        stat_dtype = torch.promote_types(ctx.dtype, torch.float32)
        with record_function("lattice"):
            posteriors = torch.stack([p[chosen] for p in ctx.lattice.posteriors])  # (2, count)
        upstream = grad_costs[:, None, None].expand_as(chosen)[chosen]  # (count,)
        # NaN posteriors count as visited so that NaN reaches the gradient; utterances with
        # upstream gradient 0 are skipped.
        least = SKIP_BELOW * torch.finfo(ctx.dtype).eps
        is_visited = ~(posteriors.sum(0) <= least) & (upstream != 0)  # (count,)
        rows = is_visited.nonzero()[:, 0]
        nodes, count = nodes[:, rows], len(rows)
        posteriors *= upstream
        arcs = posteriors[:, rows].to(stat_dtype)
        # Pad by repeating a visited row with zero posteriors: an unvisited row could hold NaN,
        # and 0 * NaN is NaN.
        padding = whole_rows(count) - count
        rows, arcs = torch.cat([rows, rows[:1].expand(padding)]), F.pad(arcs, (0, padding))
        # The products run in the forward pass's dtype, whatever autocast surrounds backward().
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden, grad_weight, grad_bias = joint_backward(
                hidden, rows, arcs, ids, (weight * ctx.scale).to(ctx.dtype),
                bias.to(ctx.dtype), ctx.blank,
            )
            grad_encoded, grad_predicted = (
                sum_by_key(grad_hidden[:count], keys, x.shape[0] * x.shape[1]).view_as(x)
                for keys, x in zip(nodes, (encoded, predicted), strict=True)
            )
        grad_weight *= ctx.scale
        return (grad_encoded.to(encoded.dtype), grad_predicted.to(predicted.dtype),
                grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *[None] * 8)


def joint_transducer_loss(encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                          targets: Tensor, encoded_lens: Tensor, target_lens: Tensor, blank: int,
                          dropout: float = 0.0, reduction: str = "mean",
                          band: Tensor | None = None,
                          border_visits: float = MOST_BORDER_VISITS) -> Tensor:
    """The same value and gradients as `transducer_loss` on the joint network's logits.

    The logits are linear(dropout(relu(encoded[:, :, None] + predicted[:, None])), weight, bias),
    (B, T, U+1, V). Only BLOCK_ROWS of their rows exist at a time. The hidden values of all valid
    nodes are kept for the backward pass, J values per node in the dtype of the products. Under
    autocast the products run in its dtype, the softmax in float32, the lattice in float64 (see
    `Lattice`), and sums are accumulated in float32.

    Args:
        encoded: (B, T, J) encoder output, projected to the joint space.
        predicted: (B, U+1, J) prediction network output, projected likewise.
        weight: (V, J) of the output layer.
        bias: (V,) of the output layer.
        targets, encoded_lens, target_lens, blank, reduction: as in `transducer_loss`.
        dropout: probability of dropout on the hidden layer, rounded to 2^-15; 0 in evaluation.
            The mask depends on torch's global random state.
        band: (B, T, U+1) booleans, False at nodes to leave out; see ctc_band. The costs are those
            of the paths inside. Utterances whose paths come too near to the band's border are
            done exactly, and their whole lattice is set to True.
        border_visits: paths come too near if, on average, they visit more nodes at the border than
            this. With infinity the band decides where labels stand, as in alignment-restricted
            training (Mahadeokar et al. 2020, arXiv:2011.03072); only utterances without a path
            inside are done exactly.
    Returns:
        Costs in nats (natural logarithm).
    Raises:
        ValueError: a shape, length or label is not possible; the message has its value.
    """
    if encoded.dim() != 3 or predicted.dim() != 3 or encoded.shape[::2] != predicted.shape[::2]:
        raise ValueError(f"encoded: shape {tuple(encoded.shape)}, predicted: "
                         f"{tuple(predicted.shape)}, expected (B, T, J) and (B, U+1, J)")
    B, T, J = encoded.shape
    U, V = predicted.shape[1] - 1, len(weight)
    if weight.shape != (V, J) or bias.shape != (V,):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, bias: {tuple(bias.shape)}, "
                         f"expected (V, {J}) and (V,)")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout}, expected 0 <= dropout < 1")
    blank = check_batch(B, T, U, V, targets, encoded_lens, target_lens, blank, "encoded_lens")
    dtype, device = encoded.dtype, encoded.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    costs = JointCosts.apply(encoded, predicted, weight, bias, label_of_node(targets, target_lens),
                             encoded_lens, target_lens, blank, dropout, dtype, band,
                             border_visits)
    return reduce_costs(costs, reduction)
