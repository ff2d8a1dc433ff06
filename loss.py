# SPDX-License-Identifier: Apache-2.0
"""The transducer loss in pure PyTorch, exact, for logits or fused with the joint network.

Stands alone (torch only). Shape letters as in model.py: B utterances, T encoder frames,
U labels (the lattice axis is U+1), V classes with blank, J joint hidden size.

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

# Stands for log 0. Finite, so that differences of two of them are 0 and not NaN.
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
        is_label = inside_lattice(T, U1, enc_lens, target_lens - 1)
        # Classes that a caller has masked with -inf may leave nodes that no path reaches.
        blank = blank.double().masked_fill(~inside, LOG_ZERO).clamp_min(LOG_ZERO)
        label = label.double().masked_fill(~is_label, LOG_ZERO).clamp_min(LOG_ZERO)
        blank = skew(blank, LOG_ZERO)  # (T+U, B, U+1)
        # Entry u holds the arc that arrives there, from u-1.
        label = F.pad(skew(label, LOG_ZERO)[:, :, :-1], (1, 0), value=LOG_ZERO)

        # alpha[t + u, b, 1 + u] = log-probability of reaching (t, u); column 0 is a guard.
        alpha = blank.new_full((T + U1, B, U1 + 1), LOG_ZERO)
        alpha[0, :, 1] = 0
        for d in range(T + U1 - 1):
            torch.logaddexp(
                alpha[d, :, 1:] + blank[d], alpha[d, :, :-1] + label[d], out=alpha[d + 1, :, 1:]
            )
        self.end = (enc_lens + target_lens, torch.arange(B, device=blank.device), target_lens)
        costs = -alpha[self.end[0], self.end[1], 1 + self.end[2]]  # (B,)
        self.costs = costs.masked_fill(costs >= -LOG_ZERO, torch.inf)  # no path at all
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
        mass[self.end] = 1  # mass[t + u, b, u] = probability that a path visits (t, u)
        for d in reversed(range(len(from_blank))):
            from_blank[d] *= mass[d + 1]
            from_label[d] *= mass[d + 1]
            mass[d] += from_blank[d]
            mass[d, :, :-1] += from_label[d, :, 1:]
        return unskew(from_blank), unskew(F.pad(from_label[:, :, 1:], (0, 1)))


# ------------------------------------------------------------------------------ input checking


def check_batch(sizes: tuple[int, int, int, int], targets: Tensor, lens: dict[str, Tensor],
                blank: int) -> None:
    """Raises ValueError with the argument's name and value for whatever cannot be a batch.

    Args:
        sizes: B, T, U+1, V.
        lens: encoder lengths and target lengths under the names that the caller knows.
    """
    B, T, U1, V = sizes
    if B < 1:
        raise ValueError("a batch of 0 utterances, expected at least 1")
    if targets.shape != (B, U1 - 1) or targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets: {tuple(targets.shape)} {targets.dtype}, expected int32 or "
                         f"int64 {(B, U1 - 1)}")
    if not 0 <= blank < V:
        raise ValueError(f"blank: {blank}, expected 0 <= blank < {V}")
    for (name, values), low, high in zip(lens.items(), (1, 0), (T, U1 - 1), strict=True):
        if values.shape != (B,) or values.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: {tuple(values.shape)} {values.dtype}, expected int32 or int64 ({B},)"
            )
        for b, n in enumerate(values.tolist()):
            if not low <= n <= high:
                raise ValueError(f"{name}[{b}]: {n}, expected {low} <= n <= {high}")
    target_lens = list(lens.values())[1]
    used = torch.arange(U1 - 1, device=targets.device) < target_lens[:, None]
    wrong = used & ((targets == blank) | (targets < 0) | (targets >= V))
    for b, u in wrong.nonzero().tolist()[:1]:
        raise ValueError(
            f"targets[{b}, {u}]: {targets[b, u].item()}, expected 0 <= label < {V} other than "
            f"blank {blank}"
        )


def refuse_second_derivative() -> None:
    """For backward passes: autograd would take what the lattice computed for constants."""
    if torch.is_grad_enabled():  # with create_graph=True alone
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
        # A copy: what is returned refers to ctx, and in float64 ctx would refer to it.
        return ctx.lattice.costs.to(blank.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        on_blank, on_label = ctx.lattice.posteriors()
        scale = -grad_costs.double()[:, None, None]
        return (on_blank * scale).to(ctx.dtype), (on_label * scale).to(ctx.dtype), None, None


def transducer_loss(logits: Tensor, targets: Tensor, logit_lens: Tensor, target_lens: Tensor,
                    blank: int, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood of `targets`, summed over all alignments.

    Graves (2012), arXiv:1211.3711, sec. 2.4; arguments in the order of torchaudio's rnnt_loss.
    U = 0, T = 1 and U > T are legal. The lattice runs in float64, the softmax in the dtype of
    `logits`, at least float32.

    Args:
        logits: (B, T, U+1, V) unnormalised scores; U+1 because a blank may follow the last label.
        targets: (B, U) label ids, none equal to `blank`; entries past `target_lens` are ignored.
        logit_lens: (B,) valid encoder frames, 1 <= n <= T.
        target_lens: (B,) valid labels, 0 <= n <= U.
        blank: index of the blank class, 0 <= blank < V.
        reduction: "none" (B,), "sum", or "mean" over the utterances (not over labels).
    Returns:
        Costs in nats (natural logarithm).
    Raises:
        ValueError: a shape, length or label is not possible; the message has its value.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, expected (B, T, U+1, V)")
    B, T, U1, V = logits.shape
    lens = {"logit_lens": logit_lens, "target_lens": target_lens}
    check_batch((B, T, U1, V), targets, lens, blank)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)  # (B, T, U+1, V)
    labels = label_of_node(targets, target_lens)[:, None, :, None].expand(B, T, U1, 1)
    label = log_probs.gather(3, labels)[..., 0]  # (B, T, U+1)
    costs = LatticeCosts.apply(log_probs[..., blank], label, logit_lens, target_lens)
    return reduce_costs(costs, reduction)


def label_of_node(targets: Tensor, target_lens: Tensor) -> Tensor:
    """(B, U) -> (B, U+1): the label that each lattice column emits, 0 where it emits none."""
    emits = torch.arange(targets.shape[1], device=targets.device) < target_lens[:, None]
    return F.pad(targets.long() * emits, (0, 1))


# ------------------------------------------------------------- loss fused with the joint network

# Rows of the joint network, lattice nodes, that one matrix product takes. 2048 take the same time,
# 4096 a tenth more (bfloat16, J = 512, V = 1024, 2 MB of cache a core).
BLOCK_ROWS = 1024

# oneDNN builds a kernel for every new number of rows, 1 ms and up to 1 MB each. Numbers of rows
# are rounded up to a multiple of this, so that there are few.
ROW_UNIT = 128

# Lattice nodes visited with a probability below this many units of rounding of the compute
# dtype get no gradient. A node's gradient row has an L1 norm of at most twice that probability,
# so the sum of what is left out, relative to the T + U arcs of a path, is at most
# 2 * T * (U+1) / (T + U) * SKIP_BELOW * eps: for T = U = 100 a tenth of eps, in any dtype.
SKIP_BELOW = 2.0**-10


def compute_dtype(encoded: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else that of the arguments."""
    if encoded.dtype != torch.float64 and torch.is_autocast_enabled(encoded.device.type):
        return torch.get_autocast_dtype(encoded.device.type)
    return encoded.dtype


def dropped_numbers(dropout: float) -> int:
    """Of the numbers below 2^15, how many drop a value: never all of them."""
    return min(round(dropout * 2**15), 2**15 - 1)


def kept_scale(dropout: float) -> float:
    """What dropout multiplies the values by that stay."""
    return 2**15 / (2**15 - dropped_numbers(dropout))


def whole_rows(count: int) -> int:
    return -(-count // ROW_UNIT) * ROW_UNIT


def random_lanes(count: int, device: torch.device) -> Tensor:
    """(2, count) int16, uniform from 0 to 2^15 - 1, from torch's global random state."""
    words = torch.empty(2, -(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(2**63), None)
    return words.bitwise_and_(0x7FFF_7FFF_7FFF_7FFF).view(torch.int16)[:, :count]


def drop(hidden: Tensor, dropout: float, lanes: Tensor) -> None:
    """Sets every value, even NaN, to 0 with probability `dropout`; scales none.

    Random numbers take longer to draw than all else here, so those of a block are the exclusive
    or of two windows of `lanes`, (2, at least twice the values), one in each row, at random
    places: uniform and independent in a block, and between two blocks but for a chance of some
    1e-6. Masks are integers since PyTorch does not vectorise comparisons to booleans, nor products
    with them.
    """
    if not dropout:
        return
    spare = lanes.shape[1] - hidden.numel()
    windows = [
        row[i:][: hidden.numel()]
        for row, i in zip(lanes, torch.randint(spare, (2,)).tolist(), strict=True)
    ]
    keep = torch.bitwise_xor(*windows).view_as(hidden)
    keep -= dropped_numbers(dropout)  # negative: dropped
    keep = keep.bitwise_right_shift_(15).bitwise_not_()  # all bits, or none
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    hidden.view(bits).bitwise_and_(keep.to(bits))


def lattice_sizes(enc_lens: Tensor, target_lens: Tensor) -> list[tuple[int, int, int]]:
    """(b, valid frames, valid labels + 1) of every utterance."""
    sizes = torch.stack([torch.arange(len(enc_lens)), enc_lens.cpu(), target_lens.cpu() + 1], 1)
    return [tuple(row) for row in sizes.tolist()]


def joint_hidden(encoded: Tensor, predicted: Tensor, sizes: list[tuple[int, int, int]],
                 dropout: float) -> Tensor:
    """(B, T, J), (B, U+1, J) -> dropout(relu(sum)) / scale of all nodes, then rows of 0: (rows, J).

    Nodes are in the order of (b, t, u). Dropout's scale is left to the output layer's weight.
    """
    J = encoded.shape[2]
    nodes = sum(n * u1 for _, n, u1 in sizes)
    hidden = encoded.new_empty(whole_rows(nodes), J)
    hidden[nodes:] = 0
    counts = [n * u1 for _, n, u1 in sizes]
    for (b, n, u1), rows in zip(sizes, hidden[:nodes].split(counts), strict=True):
        torch.add(encoded[b, :n, None], predicted[b, :u1], out=rows.view(n, u1, J))
    block_rows = min(BLOCK_ROWS, len(hidden))
    lanes = random_lanes(2 * block_rows * J if dropout else 0, hidden.device)
    for block in hidden.split(BLOCK_ROWS):
        drop(block.relu_(), dropout, lanes)
    return hidden


class JointCosts(torch.autograd.Function):
    """Encoder and predictor outputs, output layer -> costs (B,).

    Rows are lattice nodes, those of all utterances in a row. The forward pass keeps their hidden
    values and the lattice, but no logits and no softmax. The backward pass computes the logits
    again, for the nodes that the paths really visit: early in training most of them, once the
    model aligns a small part.
    """

    @staticmethod
    def forward(ctx: Any, encoded: Tensor, predicted: Tensor,
                weight: Tensor, bias: Tensor,
                labels: Tensor, lens: tuple[Tensor, Tensor], blank: int, dropout: float,
                dtype: torch.dtype) -> Tensor:
        scale = kept_scale(dropout)
        enc, pred, w, c = (x.to(dtype) for x in (encoded, predicted, weight * scale, bias))
        stat_dtype = torch.promote_types(dtype, torch.float32)
        hidden = joint_hidden(enc, pred, lattice_sizes(*lens), dropout)  # (rows, J)
        inside = inside_lattice(encoded.shape[1], predicted.shape[1], *lens)  # (B, T, U+1)
        ids = labels[:, None].expand_as(inside)[inside]  # (nodes,)
        nodes = len(ids)
        ids = F.pad(ids, (0, len(hidden) - nodes))  # (rows,)
        scores = enc.new_empty(2, len(hidden), dtype=stat_dtype)  # log-probabilities: blank, label
        for h, i, s in zip(
            hidden.split(BLOCK_ROWS), ids.split(BLOCK_ROWS), scores.split(BLOCK_ROWS, 1),
            strict=True,
        ):
            log_probs = F.log_softmax(F.linear(h, w, c), -1, dtype=stat_dtype)
            s[0] = log_probs[:, blank]
            s[1] = log_probs.gather(1, i[:, None])[:, 0]
        arcs = scores.new_zeros(2, *inside.shape)
        arcs[:, inside] = scores[:, :nodes]
        ctx.lattice = Lattice(arcs[0], arcs[1], *lens)
        ctx.save_for_backward(encoded, predicted, weight, bias, hidden, ids, inside, *lens)
        ctx.blank, ctx.scale, ctx.dtype = blank, scale, dtype
        return ctx.lattice.costs.to(stat_dtype, copy=True)  # as in LatticeCosts

    @staticmethod
    def backward(ctx: Any, grad_costs: Tensor) -> tuple:
        refuse_second_derivative()
        encoded, predicted, weight, bias, hidden, ids, inside, *lens = ctx.saved_tensors
        w, c = (weight * ctx.scale).to(ctx.dtype), bias.to(ctx.dtype)
        stat_dtype = torch.promote_types(ctx.dtype, torch.float32)
        arcs = torch.stack([p[inside] for p in ctx.lattice.posteriors()])  # (2, nodes)
        least = SKIP_BELOW * torch.finfo(ctx.dtype).eps
        upstream = grad_costs[:, None, None].expand_as(inside)[inside]  # (nodes,)
        # What is not a number is visited, but nothing of an utterance that weighs nothing.
        visited = (~(arcs.sum(0) <= least) & (upstream != 0)).nonzero()[:, 0]  # (count,) rows
        arcs *= upstream
        arcs, count = arcs[:, visited].to(stat_dtype), len(visited)  # (2, count)
        # One of them again and again, with arcs that no path takes, adds nothing. Not any node:
        # 0 times what is not a number would add that.
        fill = whole_rows(count) - count
        arcs, rows = F.pad(arcs, (0, fill)), torch.cat([visited, visited[:1].expand(fill)])
        inputs = (encoded, predicted, weight, bias)
        grads = [torch.zeros_like(x, dtype=stat_dtype) for x in inputs]
        # The products are in the forward pass's dtype, under whatever autocast this is called.
        with torch.autocast(hidden.device.type, enabled=False):
            grad_hidden = joint_backward(hidden, rows, arcs, ids, (w, c, ctx.blank), grads[2:])
        sizes = lattice_sizes(*lens)
        firsts = inside.sum((1, 2)).cumsum(0)  # of the next utterance
        bounds = torch.searchsorted(visited, firsts).tolist()
        for (b, n, u1), first, begin, end in zip(
            sizes, [0, *firsts.tolist()], [0, *bounds], bounds, strict=False
        ):
            grad_nodes = grad_hidden.new_zeros(n * u1, grad_hidden.shape[1])
            grad_nodes[visited[begin:end] - first] = grad_hidden[begin:end]
            grad_nodes = grad_nodes.view(n, u1, -1)
            grads[0][b, :n] = grad_nodes.sum(1)
            grads[1][b, :u1] = grad_nodes.sum(0)
        grads[2] *= ctx.scale
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), *[None] * 5


def joint_backward(hidden: Tensor, rows: Tensor, arcs: Tensor, labels: Tensor,
                   output: tuple, grads: list[Tensor]) -> Tensor:
    """Adds the output layer's gradient to `grads` (weight, bias); returns that of some rows of
    `hidden` before relu and dropout, (count, J).

    A node's gradient with respect to its logits is softmax * (blank + label posterior), minus
    the posterior of each arc at the class that the arc emits.

    Args:
        hidden: (all rows, J) joint hidden values.
        rows: (count,) those to work on.
        arcs: (2, count) posteriors of the blank and label arcs times the upstream gradient.
        labels: (all rows,) class of each label arc.
        output: weight (V, J), bias (V,) and the blank's index.
    """
    weight, bias, blank = output
    grad_hidden = hidden.new_empty(len(rows), hidden.shape[1])
    for chosen, p, out in zip(
        rows.split(BLOCK_ROWS), arcs.split(BLOCK_ROWS, 1), grad_hidden.split(BLOCK_ROWS),
        strict=True,
    ):
        h = hidden[chosen]
        g = F.softmax(F.linear(h, weight, bias), -1, dtype=arcs.dtype)  # (rows, V)
        g *= p.sum(0)[:, None]
        g[:, blank] -= p[0]
        g.scatter_add_(1, labels[chosen][:, None], -p[1][:, None])
        grads[1] += g.sum(0)
        g = g.to(weight.dtype)
        grads[0] += g.T @ h
        torch.mm(g, weight, out=out)
        # Values that relu or dropout have made 0 pass no gradient.
        torch.ops.aten.threshold_backward.grad_input(out, h, 0, grad_input=out)
    return grad_hidden


def joint_transducer_loss(encoded: Tensor, predicted: Tensor,
                          weight: Tensor, bias: Tensor,
                          targets: Tensor, encoded_lens: Tensor, target_lens: Tensor, blank: int,
                          dropout: float = 0.0, reduction: str = "mean") -> Tensor:
    """The same value and gradients as `transducer_loss` on the joint network's logits.

    Those logits are linear(dropout(relu(encoded[:, :, None] + predicted[:, None])), weight,
    bias), (B, T, U+1, V); they never exist together, only BLOCK_ROWS of their B*T*(U+1) rows at a
    time. The hidden values of all valid nodes do, until the backward pass: that is J values a node
    in the dtype of the products. Under autocast those run in its dtype, the softmax in float32, the
    lattice in float64; sums are accumulated in float32.

    Args:
        encoded: (B, T, J) encoder output, projected to the joint space.
        predicted: (B, U+1, J) prediction network output, projected likewise.
        weight: (V, J) of the output layer.
        bias: (V,) of the output layer.
        targets, encoded_lens, target_lens, blank, reduction: as in `transducer_loss`.
        dropout: probability of dropout on the hidden layer, rounded to 2^-15; 0 in evaluation.
            The mask depends on torch's global random state.
    Raises:
        ValueError: a shape, length or label is not possible; the message has its value.
    """
    if encoded.dim() != 3 or predicted.dim() != 3 or encoded.shape[::2] != predicted.shape[::2]:
        raise ValueError(
            f"encoded: shape {tuple(encoded.shape)}, predicted: {tuple(predicted.shape)}, "
            "expected (B, T, J) and (B, U+1, J)"
        )
    B, T, J = encoded.shape
    V = len(weight)
    if weight.shape != (V, J) or bias.shape != (V,):
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}, bias: {tuple(bias.shape)}, expected (V, {J}) "
            "and (V,)"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout}, expected 0 <= dropout < 1")
    lens = {"encoded_lens": encoded_lens, "target_lens": target_lens}
    check_batch((B, T, predicted.shape[1], V), targets, lens, blank)
    labels = label_of_node(targets, target_lens)  # (B, U+1)
    costs = JointCosts.apply(
        encoded, predicted, weight, bias, labels, (encoded_lens, target_lens), blank, dropout,
        compute_dtype(encoded),
    )
    return reduce_costs(costs, reduction)
