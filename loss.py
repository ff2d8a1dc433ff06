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
    take T + U vectorised steps. Cutting one column from rows padded by U+1 shifts row u by u.
    """
    B, T, U1 = scores.shape
    rows = F.pad(scores.transpose(1, 2), (0, U1), value=fill)  # (B, U+1, T+U+1)
    rows = rows.reshape(B, -1)[:, : U1 * (T + U1 - 1)].view(B, U1, T + U1 - 1)
    return rows.permute(2, 0, 1).contiguous()  # (T+U, B, U+1)


def unskew(diagonals: Tensor) -> Tensor:
    """(T+U, B, U+1) -> (B, T, U+1), the inverse of `skew`."""
    D, B, U1 = diagonals.shape
    rows = F.pad(diagonals.permute(1, 2, 0).reshape(B, -1), (0, U1))
    return rows.view(B, U1, D + 1)[:, :, : D + 1 - U1].transpose(1, 2)  # (B, T, U+1)


def inside_lattice(T: int, U1: int, enc_lens: Tensor, target_lens: Tensor) -> Tensor:
    """(B, T, U+1) booleans, True at the nodes of each lattice."""
    t = torch.arange(T, device=enc_lens.device)[:, None]
    u = torch.arange(U1, device=enc_lens.device)
    return (t < enc_lens[:, None, None]) & (u <= target_lens[:, None, None])


class Lattice:
    """Forward variables and arc posteriors of a batch of lattices, in float64.

    Args:
        blank: (B, T, U+1) log-probability of the blank arc that leaves each node.
        label: (B, T, U+1) log-probability of the label arc that leaves each node.
        enc_lens, target_lens: (B,) sizes of each lattice; arcs outside are never taken.

    `costs` is (B,), the negative log-likelihoods.
    """

    @record_function("lattice")
    def __init__(self, blank: Tensor, label: Tensor, enc_lens: Tensor,
                 target_lens: Tensor) -> None:
        B, T, U1 = blank.shape
        inside = inside_lattice(T, U1, enc_lens, target_lens)
        has_label = inside_lattice(T, U1, enc_lens, target_lens - 1)
        # A caller may mask classes with -inf, which leaves nodes that no path reaches.
        blank = blank.double().masked_fill(~inside, LOG_ZERO).clamp_min(LOG_ZERO)
        label = label.double().masked_fill(~has_label, LOG_ZERO).clamp_min(LOG_ZERO)
        blank = skew(blank, LOG_ZERO)  # (T+U, B, U+1)
        # Label arcs are stored at the node where they arrive: entry u holds the arc from u-1.
        label = F.pad(skew(label, LOG_ZERO)[:, :, :-1], (1, 0), value=LOG_ZERO)

        # alpha[t + u, b, 1 + u] is the log-probability of reaching (t, u); column 0 is a guard.
        alpha = blank.new_full((T + U1, B, U1 + 1), LOG_ZERO)
        alpha[0, :, 1] = 0
        for d in range(T + U1 - 1):
            torch.logaddexp(alpha[d, :, 1:] + blank[d], alpha[d, :, :-1] + label[d],
                            out=alpha[d + 1, :, 1:])
        self.end = (enc_lens + target_lens, torch.arange(B, device=blank.device), target_lens)
        costs = -alpha[:, :, 1:][self.end]  # (B,)
        self.costs = costs.masked_fill(costs >= -LOG_ZERO, torch.inf)  # no path reaches the end
        self.alpha, self.blank, self.label = alpha, blank, label

    @record_function("lattice")
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

    `lens_name` is the name of `enc_lens` that the caller knows. Returns the index of the blank.
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
        # Autograd lets the result refer to ctx. Without a copy ctx would refer to it in float64,
        # and the cycle would keep the lattice alive.
        return ctx.lattice.costs.to(blank.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        scale = -grad_costs.double()[:, None, None]
        grads = ((posterior * scale).to(ctx.dtype) for posterior in ctx.lattice.posteriors())
        return *grads, None, None


def transducer_loss(logits: Tensor, targets: Tensor, logit_lens: Tensor, target_lens: Tensor,
                    blank: int, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of `targets`, summed over all alignments.

    Graves (2012), arXiv:1211.3711, sec. 2.4; arguments in the order of torchaudio's rnnt_loss.
    U = 0, T = 1 and U > T are valid. The lattice runs in float64, the softmax in the dtype of
    `logits`, at least float32.

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
        logits: (B, N, V) unnormalised scores of N label positions.
        targets: (B, U) label ids; entries past `target_lens` are ignored.
        logit_lens: (B,) valid positions.
        target_lens: (B,) valid labels.
        blank: index of the blank class.
    Returns:
        Costs in nats (B,), and booleans (B,) that are False where no alignment exists; the cost
        and its gradient are 0 there.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, -1, dtype=dtype).transpose(0, 1)  # (N, B, V)
    costs = F.ctc_loss(log_probs, targets, logit_lens, target_lens, blank, reduction="none",
                       zero_infinity=True)
    used = torch.arange(targets.shape[1], device=targets.device) < target_lens[:, None]  # (B, U)
    repeats = ((targets[:, 1:] == targets[:, :-1]) & used[:, 1:]).sum(1)  # (B,)
    return costs, target_lens + repeats <= logit_lens


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


def joint_hidden(encoded: Tensor, predicted: Tensor, sizes: list[tuple[int, int]],
                 dropout: float) -> Tensor:
    """(B, T, J), (B, U+1, J) -> (rows, J): dropout(relu(sum)) of all nodes, not scaled yet.

    The valid nodes (t, u) of all utterances are concatenated, one row each, and followed by rows
    of zeros up to a multiple of ROW_UNIT. Dropout's scale is left to the output layer's weight.
    """
    J = encoded.shape[2]
    counts = [n * u1 for n, u1 in sizes]
    nodes = sum(counts)
    hidden = encoded.new_empty(whole_rows(nodes), J)
    hidden[nodes:] = 0
    for b, rows in enumerate(hidden[:nodes].split(counts)):
        n, u1 = sizes[b]
        torch.add(encoded[b, :n, None], predicted[b, :u1], out=rows.view(n, u1, J))
    random = random_rows(2 * min(BLOCK_ROWS, len(hidden)) * J, hidden.device) if dropout else None
    for block in hidden.split(BLOCK_ROWS):
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


def sum_nodes(grad_hidden: Tensor, is_visited: Tensor, sizes: list[tuple[int, int]],
              grad_encoded: Tensor, grad_predicted: Tensor) -> None:
    """Sums the nodes' gradients over u into `grad_encoded`, over t into `grad_predicted`.

    `grad_hidden` (count, J) has a row for each of the `count` nodes where `is_visited` (nodes,) is
    True; the others have no gradient.
    """
    for b, visited in enumerate(is_visited.split([n * u1 for n, u1 in sizes])):
        n, u1 = sizes[b]
        count = int(visited.sum())
        grad_nodes = grad_hidden.new_zeros(n * u1, grad_hidden.shape[1])
        grad_nodes[visited] = grad_hidden[:count]
        grad_hidden = grad_hidden[count:]
        grad_nodes = grad_nodes.view(n, u1, -1)
        grad_encoded[b, :n] = grad_nodes.sum(1)
        grad_predicted[b, :u1] = grad_nodes.sum(0)


class JointCosts(torch.autograd.Function):
    """Encoder and predictor outputs, output layer -> costs (B,).

    The forward pass keeps the hidden rows and the lattice, but no logits and no softmax. The
    backward pass computes the logits again, for the nodes that paths really visit: most of them
    early in training, a small part once the model aligns.
    """

    @staticmethod
    def forward(ctx: Any, encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                labels: Tensor, enc_lens: Tensor, target_lens: Tensor, blank: int,
                dropout: float, dtype: torch.dtype) -> Tensor:
        sizes = list(zip(enc_lens.tolist(), (target_lens + 1).tolist(), strict=True))
        hidden = joint_hidden(encoded.to(dtype), predicted.to(dtype), sizes, dropout)  # (rows, J)
        inside = inside_lattice(encoded.shape[1], predicted.shape[1], enc_lens, target_lens)
        labels = labels[:, None].expand_as(inside)[inside]  # (nodes,)
        nodes = len(labels)
        labels = F.pad(labels, (0, len(hidden) - nodes))  # (rows,)
        scale = 2**15 / kept_numbers(dropout)
        scores = arc_scores(hidden, labels, (weight * scale).to(dtype), bias.to(dtype), blank)
        arcs = scores.new_zeros(2, *inside.shape)  # (2, B, T, U+1)
        arcs[:, inside] = scores[:, :nodes]
        ctx.lattice = Lattice(arcs[0], arcs[1], enc_lens, target_lens)
        ctx.save_for_backward(encoded, predicted, weight, bias, hidden, labels, inside)
        ctx.sizes, ctx.blank, ctx.scale, ctx.dtype = sizes, blank, scale, dtype
        return ctx.lattice.costs.to(scores.dtype, copy=True)  # a copy as in LatticeCosts

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        encoded, predicted, weight, bias, hidden, labels, inside = ctx.saved_tensors
        stat_dtype = torch.promote_types(ctx.dtype, torch.float32)
        posteriors = torch.stack([p[inside] for p in ctx.lattice.posteriors()])  # (2, nodes)
        upstream = grad_costs[:, None, None].expand_as(inside)[inside]  # (nodes,)
        # NaN posteriors count as visited so that NaN reaches the gradient; utterances with
        # upstream gradient 0 are skipped.
        least = SKIP_BELOW * torch.finfo(ctx.dtype).eps
        is_visited = ~(posteriors.sum(0) <= least) & (upstream != 0)  # (nodes,)
        rows = is_visited.nonzero()[:, 0]  # (count,)
        count = len(rows)
        posteriors *= upstream
        arcs = posteriors[:, rows].to(stat_dtype)  # (2, count)
        # Pad by repeating a visited row with zero posteriors: an unvisited row could hold NaN,
        # and 0 * NaN is NaN.
        padding = whole_rows(count) - count
        rows, arcs = torch.cat([rows, rows[:1].expand(padding)]), F.pad(arcs, (0, padding))
        # The products run in the forward pass's dtype, whatever autocast surrounds backward().
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden, grad_weight, grad_bias = joint_backward(
                hidden, rows, arcs, labels, (weight * ctx.scale).to(ctx.dtype),
                bias.to(ctx.dtype), ctx.blank,
            )
        grad_encoded = torch.zeros_like(encoded, dtype=stat_dtype)
        grad_predicted = torch.zeros_like(predicted, dtype=stat_dtype)
        sum_nodes(grad_hidden[:count], is_visited, ctx.sizes, grad_encoded, grad_predicted)
        grad_weight *= ctx.scale
        return (grad_encoded.to(encoded.dtype), grad_predicted.to(predicted.dtype),
                grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *[None] * 6)


def joint_transducer_loss(encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor,
                          targets: Tensor, encoded_lens: Tensor, target_lens: Tensor, blank: int,
                          dropout: float = 0.0, reduction: str = "mean") -> Tensor:
    """The same value and gradients as `transducer_loss` on the joint network's logits.

    The logits are linear(dropout(relu(encoded[:, :, None] + predicted[:, None])), weight, bias),
    (B, T, U+1, V). Only BLOCK_ROWS of their rows exist at a time. The hidden values of all valid
    nodes are kept for the backward pass, J values per node in the dtype of the products. Under
    autocast the products run in its dtype, the softmax in float32, the lattice in float64, and
    sums are accumulated in float32.

    Args:
        encoded: (B, T, J) encoder output, projected to the joint space.
        predicted: (B, U+1, J) prediction network output, projected likewise.
        weight: (V, J) of the output layer.
        bias: (V,) of the output layer.
        targets, encoded_lens, target_lens, blank, reduction: as in `transducer_loss`.
        dropout: probability of dropout on the hidden layer, rounded to 2^-15; 0 in evaluation.
            The mask depends on torch's global random state.
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
                             encoded_lens, target_lens, blank, dropout, dtype)
    return reduce_costs(costs, reduction)
