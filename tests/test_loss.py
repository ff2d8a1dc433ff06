# SPDX-License-Identifier: Apache-2.0
"""Costs and gradients of loss.py are those of the sum over all alignments.

    python -m pytest tests/test_loss.py

Both functions pass the same tests: `loss_of_table` builds a joint network whose logits are any
given table, so joint_transducer_loss is a function of logits too. The oracle is the enumeration
of every path; published numbers come with their source, and test_oracles.py adds 19 cases from
other implementations. Tests run in float64 unless they are about another dtype; the tolerance 1e-9
leaves room for the rounding of sums of some hundred terms.
"""

import gc
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loss

# ------------------------------------------------------------------------ problems and functions


class Problem(NamedTuple):
    """The arguments of transducer_loss: a batch of lattices."""

    logits: Tensor  # (B, T, U+1, V)
    targets: Tensor  # (B, U)
    lens: Tensor  # (B,)
    target_lens: Tensor  # (B,)
    blank: int

    def alone(self, b: int) -> "Problem":
        """Utterance b without padding."""
        n, u = int(self.lens[b]), int(self.target_lens[b])
        rest = (self.lens[b : b + 1], self.target_lens[b : b + 1], self.blank)
        return Problem(self.logits[b : b + 1, :n, : u + 1], self.targets[b : b + 1, :u], *rest)

    def inside(self) -> Tensor:
        """(B, T, U+1), True at the nodes of each lattice."""
        T, U1 = self.logits.shape[1:3]
        frames = torch.arange(T) < self.lens[:, None]
        columns = torch.arange(U1) <= self.target_lens[:, None]
        return frames[:, :, None] & columns[:, None]


def random_problem(lens: list, target_lens: list, V: int, blank: int, seed: int = 1) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    B, T, U = len(lens), max(lens), max(target_lens)
    logits = 2 * torch.randn(B, T, U + 1, V, dtype=torch.float64, generator=generator)
    targets = torch.randint(V - 1, (B, U), generator=generator)
    targets += targets >= blank  # any class but the blank
    return Problem(logits, targets, torch.tensor(lens), torch.tensor(target_lens), blank)


def table_joint(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A joint network with these logits: encoded, predicted, weight, bias.

    It has a hidden unit for every node (b, t, u). The encoder gives 1 to the units of its frame,
    the predictor takes 1 from the units of every other column: after the ReLU the node's own unit
    is 1, the others are 0. Column (b, t, u) of the weight is the node's logits.
    """
    B, T, U1, V = logits.shape
    encoded = torch.eye(B * T, dtype=logits.dtype).repeat_interleave(U1, 1).view(B, T, -1)
    predicted = torch.eye(U1, dtype=logits.dtype).repeat(1, B * T).expand(B, -1, -1) - 1
    return encoded, predicted, logits.reshape(-1, V).T, logits.new_zeros(V)


def loss_of_table(logits: Tensor, *arguments, reduction: str = "mean", **options) -> Tensor:
    return loss.joint_transducer_loss(*table_joint(logits), *arguments, reduction=reduction,
                                      **options)


LOSSES = {"logits": loss.transducer_loss, "joint": loss_of_table}
both = pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)


def costs_and_grad(loss_of, problem: Problem, weights: Tensor | None = None) -> tuple:
    """Costs (B,) and the gradient of their weighted sum with respect to the logits."""
    logits = problem.logits.clone().requires_grad_()
    costs = loss_of(logits, *problem[1:], reduction="none")
    costs.backward(torch.ones_like(costs) if weights is None else weights)
    return costs.detach(), logits.grad


def joint_arguments(B: int, T: int, U: int, V: int, J: int,
                    dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random encoded, predicted, weight, bias that require gradients."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, T, J), (B, U + 1, J), (V, J), (V,))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for s in shapes]


def joint_costs(arguments: list[Tensor], rest: tuple) -> Tensor:
    return loss.joint_transducer_loss(*arguments, *rest, reduction="none")


def explicit_costs(arguments: list[Tensor], rest: tuple) -> Tensor:
    """The costs of the joint network's logits, all of which exist at once."""
    encoded, predicted, weight, bias = arguments
    logits = F.linear(F.relu(encoded[:, :, None] + predicted[:, None]), weight, bias)
    return loss.transducer_loss(logits, *rest, reduction="none")


def with_grads(costs: Tensor, arguments: list[Tensor]) -> list[Tensor]:
    """Costs, and the gradients of their sum with unequal weights."""
    weights = torch.linspace(0.5, 2, len(costs), dtype=costs.dtype)
    return [costs.detach(), *torch.autograd.grad((costs * weights).sum(), arguments)]


def assert_close(actual: Tensor, expected, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).view(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


# -------------------------------------------------------------------------------- golden numbers

# HawkAaron/warp-transducer, pytorch_binding/test/test.py, small_test; torchaudio, 1ytic/warp-rnnt,
# NeMo and SpeechBrain test with the same logits.
SMALL = [
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
]
# The gradient that warp-transducer's test and torchaudio's get_B1_T2_U3_D5_data print.
SMALL_GRAD_BLANK_FIRST = [
    [-0.13116688, -0.3999269, 0.17703125, 0.17703125, 0.17703125],
    [-0.18572757, 0.12247056, -0.18168412, 0.12247056, 0.12247056],
    [-0.32091254, 0.06269141, 0.06928472, 0.12624499, 0.06269141],
    [0.05456069, -0.21824276, 0.05456069, 0.05456069, 0.05456069],
    [0.12073959, 0.12073959, -0.48295835, 0.12073959, 0.12073959],
    [-0.6925882, 0.16871116, 0.18645467, 0.16871116, 0.16871116],
]
SMALL_GRAD_BLANK_LAST = [
    [0.17703132, -0.39992708, 0.17703132, 0.17703132, -0.13116692],
    [0.12247062, 0.12247062, -0.181684, 0.12247062, -0.1857276],
    [0.06269141, 0.06269141, 0.06928471, 0.12624498, -0.32091248],
    [0.05456069, -0.2182428, 0.05456069, 0.05456069, 0.05456069],
    [0.12073967, 0.12073967, -0.48295838, 0.12073967, 0.12073967],
    [0.30741188, 0.16871123, 0.18645471, 0.16871123, -0.83128875],
]


@both
@pytest.mark.parametrize(
    ("blank", "cost", "grad"),
    [(0, 4.495666, SMALL_GRAD_BLANK_FIRST), (4, 5.09566688538, SMALL_GRAD_BLANK_LAST)],
)
def test_published_small_case_B1_T2_U2_V5(loss_of, blank, cost, grad):
    lens = torch.tensor([2])
    problem = Problem(torch.tensor([SMALL]).double(), torch.tensor([[1, 2]]), lens, lens, blank)
    costs, grads = costs_and_grad(loss_of, problem)
    assert_close(costs, cost, 1e-6)  # printed with six decimals, from float32
    assert_close(grads, grad, 1e-6)


@both
def test_published_batch_B2_T4_U2_V3(loss_of):
    # torchaudio's get_B2_T4_U3_D3_data: warp-transducer's big_test to six decimals.
    logits = [
        [0.065357, 0.787530, 0.081592, 0.529716, 0.750675, 0.754135, 0.609764, 0.868140, 0.622532],
        [0.668522, 0.858039, 0.164539, 0.989780, 0.944298, 0.603168, 0.946783, 0.666203, 0.286882],
        [0.094184, 0.366674, 0.736168, 0.166680, 0.714154, 0.399400, 0.535982, 0.291821, 0.612642],
        [0.324241, 0.800764, 0.524106, 0.779195, 0.183314, 0.113745, 0.240222, 0.339470, 0.134160],
        [0.505562, 0.051597, 0.640290, 0.430733, 0.829473, 0.177467, 0.320700, 0.042883, 0.302803],
        [0.675178, 0.569537, 0.558474, 0.083132, 0.060165, 0.107958, 0.748615, 0.943918, 0.486356],
        [0.418199, 0.652408, 0.024243, 0.134582, 0.366342, 0.295830, 0.923670, 0.689929, 0.741898],
        [0.250005, 0.603430, 0.987289, 0.592606, 0.884672, 0.543450, 0.660770, 0.377128, 0.358021],
    ]
    targets, lens = torch.tensor([[1, 2], [1, 1]]), torch.tensor([4, 4])
    problem = Problem(torch.tensor(logits).double().view(2, 4, 3, 3), targets, lens, lens // 2, 0)
    costs, _ = costs_and_grad(loss_of, problem)
    assert_close(costs, [4.280652859089074, 3.938436982250359], 1e-6)  # of the 16-digit logits


@both
def test_label_zero_is_a_label_when_blank_is_last_B1_T5_U3_V3(loss_of):
    # NVIDIA/NeMo, tests/collections/asr/k2, test_case_small_blank_last.
    am = torch.tensor([[0, 1, 2], [0, 0, 0], [0, 2, 4], [0, 3, 3], [2, 2, 0]]).double()
    lm = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 0, 1], [2, 2, 0]]).double()
    logits, targets = (am[:, None] + lm)[None], torch.tensor([[0, 1, 0]])
    problem = Problem(logits, targets, torch.tensor([5]), torch.tensor([3]), 2)
    assert_close(costs_and_grad(loss_of, problem)[0], 6.789285182952881, 1e-7)  # float32 source


@both
def test_blank_minus_one_is_the_last_class(loss_of):
    problem = random_problem([5, 2], [3, 4], V=5, blank=4)
    actual = costs_and_grad(loss_of, problem._replace(blank=-1))
    assert all(map(torch.equal, actual, costs_and_grad(loss_of, problem)))


# ----------------------------------------------------------------------------- every alignment


def enumerated_cost(logits: Tensor, targets: list[int], blank: int,
                    band: Tensor | None = None) -> Tensor:
    """Minus the logarithm of the probability of all paths, one by one: logits (T, U+1, V).

    U of the first T+U-1 moves are labels, in any places; the last move is a blank. Only paths
    inside the `band` (T, U+1) count.
    """
    log_probs = logits.log_softmax(-1)
    T, U = logits.shape[0], len(targets)
    paths = []
    for places in itertools.combinations(range(T + U - 1), U):
        t = u = 0
        score = logits.new_zeros(())
        for move in range(T + U):
            if band is not None and not band[t, u]:
                score = score - torch.inf
            if move in places:
                score = score + log_probs[t, u, targets[u]]
                u += 1
            else:
                score = score + log_probs[t, u, blank]
                t += 1
        paths.append(score)
    return -torch.logsumexp(torch.stack(paths), 0)


@both
@pytest.mark.parametrize("blank", [0, 2, 4], ids=["blank_first", "blank_middle", "blank_last"])
@pytest.mark.parametrize("U", range(5))
@pytest.mark.parametrize("T", range(1, 5))
def test_cost_and_gradient_are_those_of_all_paths(loss_of, T, U, blank):
    problem = random_problem([T], [U], V=5, blank=blank, seed=10 * T + U)
    costs, grads = costs_and_grad(loss_of, problem)
    logits = problem.logits[0].clone().requires_grad_()
    expected = enumerated_cost(logits, problem.targets[0].tolist(), blank)
    assert_close(costs, expected.detach())
    assert_close(grads, torch.autograd.grad(expected, logits)[0])


def test_gradcheck_of_logits():
    problem = random_problem([3, 2], [2, 3], V=4, blank=1)
    logits = problem.logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss.transducer_loss(x, *problem[1:], reduction="none"), [logits]
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_of_joint(dropout):
    # gradcheck compares with differences of forward passes, all with one mask thanks to the seed.
    problem = random_problem([3, 2], [2, 3], V=4, blank=1)

    def costs_of(*arguments):
        torch.manual_seed(5)
        return loss.joint_transducer_loss(*arguments, *problem[1:], dropout, "none")

    arguments = joint_arguments(2, 3, 3, V=4, J=6)
    assert torch.autograd.gradcheck(costs_of, arguments)


@both
def test_second_derivative_is_refused(loss_of):
    problem = random_problem([3, 2], [2, 3], V=4, blank=1)
    logits = problem.logits.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_of(logits, *problem[1:]), logits, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
def test_lattice_is_freed_with_the_costs(loss_of, dtype):
    problem = random_problem([3, 2], [2, 3], V=4, blank=1)
    gc.collect()
    gc.disable()  # so a reference cycle would keep the lattice
    try:
        loss_of(problem.logits.to(dtype).requires_grad_(), *problem[1:]).backward()
        assert not any(type(x) is loss.Lattice for x in gc.get_objects())
    finally:
        gc.enable()


# ------------------------------------------------------------- laws that need no expected number

PROBLEMS = {
    "blank_first": random_problem([5, 2, 1, 6], [3, 4, 2, 0], V=5, blank=0),
    "blank_middle": random_problem([5, 2, 1, 6], [3, 4, 2, 0], V=5, blank=2),
    "blank_last": random_problem([5, 2, 1, 6], [3, 4, 2, 0], V=5, blank=4),
}


@pytest.fixture(params=PROBLEMS.values(), ids=PROBLEMS)
def problem(request) -> Problem:
    return request.param


@pytest.mark.parametrize(
    ("loss_of", "scale"),
    # The joint loss multiplies by the whole table: NaN in its padding has a test of its own.
    [(loss.transducer_loss, 1e6), (loss.transducer_loss, math.nan), (loss_of_table, 1e6)],
    ids=["logits", "logits_nan", "joint"],
)
def test_padding_does_not_change_anything(loss_of, scale, problem):
    # The batch has one frame and one label more than its longest utterance. The padding holds huge
    # logits or NaN, and labels that do not exist.
    expected, grads = costs_and_grad(loss_of, problem)
    assert not grads[~problem.inside()].any()
    inside = F.pad(problem.inside(), (0, 1, 0, 1))
    wider = F.pad(problem.logits, (0, 0, 0, 1, 0, 1))
    generator = torch.Generator().manual_seed(2)
    garbage = scale * torch.randn(wider.shape, dtype=torch.float64, generator=generator)
    logits = torch.where(inside[..., None], wider, garbage)
    targets = F.pad(problem.targets, (0, 1))
    unused = torch.arange(targets.shape[1]) >= problem.target_lens[:, None]
    for bad in (problem.blank, -1, 2**40):
        padded = Problem(logits, targets.masked_fill(unused, bad), *problem[2:])
        costs, wider_grads = costs_and_grad(loss_of, padded)
        assert_close(costs, expected)
        assert_close(wider_grads[inside], grads[problem.inside()])
        if math.isfinite(scale):  # the gradient of a softmax of NaN is NaN
            assert not wider_grads[~inside].any()


@both
def test_int32_targets_and_lengths_give_the_same_result_as_int64(loss_of):
    problem = random_problem([5, 2], [3, 4], V=5, blank=0)
    short = Problem(problem.logits, *(x.int() for x in problem[1:4]), problem.blank)
    actual = costs_and_grad(loss_of, short)
    assert all(map(torch.equal, actual, costs_and_grad(loss_of, problem)))


@both
def test_utterance_in_a_batch_is_as_alone(loss_of, problem):
    costs, grads = costs_and_grad(loss_of, problem)
    for b in range(len(costs)):
        cost, grad = costs_and_grad(loss_of, problem.alone(b))
        assert_close(costs[b : b + 1], cost)
        assert_close(grads[b : b + 1, : grad.shape[1], : grad.shape[2]], grad)


@both
def test_upstream_weight_of_each_utterance_scales_its_gradient(loss_of, problem):
    costs, grads = costs_and_grad(loss_of, problem)
    weights = torch.linspace(-1, 2.5, len(costs), dtype=torch.float64)
    _, weighted = costs_and_grad(loss_of, problem, weights)
    assert_close(weighted, grads * weights[:, None, None, None])


# -------------------------------------------------------------------------------- the lattice


def lattice_of(problem: Problem) -> tuple[loss.Lattice, Tensor]:
    """The lattice and (B, T, U+1, 1) the class that each label arc emits."""
    B, T, U1, _ = problem.logits.shape
    log_probs = problem.logits.log_softmax(-1)
    emitted = F.pad(problem.targets, (0, 1))[:, None, :, None].expand(B, T, U1, 1)
    label = log_probs.gather(3, emitted)[..., 0]
    lens = (problem.lens, problem.target_lens)
    return loss.Lattice(log_probs[..., problem.blank], label, *lens), emitted


def test_lattice_of_float32_runs_in_float64():
    # In float32 the recursion over 300 x 301 nodes moves the sum over a frame by 3e-5.
    problem = random_problem([300], [300], V=3, blank=0)
    lattice, _ = lattice_of(problem._replace(logits=problem.logits.float()))
    on_blank, on_label = lattice.posteriors
    assert on_blank.dtype == on_label.dtype == lattice.costs.dtype == torch.float64
    assert_close(on_blank.sum(2), torch.ones(1, 300))


class NoFloat64(TorchDispatchMode):
    """Refuses float64 like a device that does not have it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(result)):
            raise TypeError("this device has no float64")
        return result


@pytest.mark.parametrize("costs_of", [explicit_costs, joint_costs], ids=LOSSES)
def test_a_device_without_float64_gets_a_lattice_of_float32(costs_of):
    T, U, V, J = 200, 100, 8, 6
    rest = random_problem([T, 90], [U, 60], V, blank=0)[1:]
    arguments = joint_arguments(2, T, U, V, J, torch.float32)
    exact = with_grads(costs_of(arguments, rest), arguments)
    with NoFloat64():
        single = with_grads(costs_of(arguments, rest), arguments)
    torch.testing.assert_close(single[0], exact[0], rtol=1e-5, atol=0)
    for actual, expected in zip(single[1:], exact[1:], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * scale)


@both
def test_logits_of_a_hundred_million_stay_finite(loss_of):
    # Costs are far above 1e8. The arcs that leave the second lattice, which is padded, must still
    # cost more.
    problem = random_problem([6, 2], [4, 5], V=5, blank=4)
    problem = problem._replace(logits=problem.logits * 1e8)
    costs, grads = costs_and_grad(loss_of, problem)
    for b in range(2):
        alone = problem.alone(b)
        assert_close(costs[b], enumerated_cost(alone.logits[0], alone.targets[0].tolist(), 4))
    assert grads.isfinite().all()
    assert grads.abs().amax((1, 2, 3)).min() > 0.1


def test_masked_classes_may_leave_nodes_that_no_path_reaches():
    # Both arcs that lead to node (1, 1) of T = 3, U = 1 have probability 0.
    torch.manual_seed(3)
    scores = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    rest = (torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1]), 3)
    gradients = []
    for zero in (-torch.inf, -500.0):  # exp(-500) is negligible
        logits = scores.clone()
        logits[0, 0, 1, 3] = logits[0, 1, 0, 1] = zero
        logits.requires_grad_()
        loss.transducer_loss(logits, *rest).backward()
        gradients.append(logits.grad)
    assert_close(*gradients)


def test_a_lattice_without_a_path_costs_infinity():
    logits = torch.full((1, 3, 2, 4), -torch.inf)
    logits[..., 0] = 0
    rest = (torch.tensor([[1]]), torch.tensor([3]), torch.tensor([1]), 3)
    assert loss.transducer_loss(logits, *rest, "none").tolist() == [torch.inf]


# ------------------------------------------------------------------------------------ reductions


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction_of_costs_and_gradients(loss_of, reduction):
    # The mean is over utterances; some libraries divide by labels or frames.
    problem = PROBLEMS["blank_last"]
    costs, grads = costs_and_grad(loss_of, problem)
    scale = 1 / len(costs) if reduction == "mean" else 1
    logits = problem.logits.clone().requires_grad_()
    value = loss_of(logits, *problem[1:], reduction=reduction)
    value.backward()
    assert value.shape == ()
    assert_close(value.detach(), costs.sum() * scale)
    assert_close(logits.grad, grads * scale)
    assert loss_of(*problem) == loss_of(*problem, reduction="mean")  # the default


# ------------------------------------------------- the joint network's loss against explicit logits


def joint_problem(dtype: torch.dtype, T: int = 9, U: int = 7) -> tuple[list[Tensor], tuple]:
    """Arguments of a joint network in `dtype`, of three unequal lattices and 30 classes."""
    problem = random_problem([T, T - 4, 1], [U - 3, U, 2], V=30, blank=29)
    return joint_arguments(3, T, U, 30, 16, dtype), problem[1:]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_joint_is_the_loss_of_explicit_logits(dtype, tolerance):
    arguments, rest = joint_problem(dtype)
    actual = with_grads(joint_costs(arguments, rest), arguments)
    expected = with_grads(explicit_costs(arguments, rest), arguments)
    assert actual[0].dtype == dtype
    assert_all_close(actual, expected, tolerance)


def kept_values(inside: Tensor, J: int, dropout: float, dtype=torch.float32) -> Tensor:
    """(nodes, J): joint hidden values of the nodes `inside` (B, T, U+1), 1 without dropout."""
    (B, T, U1), (b, t, u) = inside.shape, inside.nonzero(as_tuple=True)
    ones, zeros = torch.ones(B * T, J, dtype=dtype), torch.zeros(B * U1, J, dtype=dtype)
    nodes = torch.stack([b * T + t, b * U1 + u])
    torch.manual_seed(3)
    return loss.joint_hidden(ones, zeros, nodes, dropout, dtype)[: len(b)]


def test_joint_with_dropout_is_the_loss_of_the_logits_that_its_masks_give():
    arguments, rest = joint_problem(torch.float64, T=9, U=7)
    encoded, predicted, weight, bias = arguments
    torch.manual_seed(3)
    costs = loss.joint_transducer_loss(*arguments, *rest, 0.3, "none")
    inside = loss.inside_lattice(9, 7 + 1, *rest[1:3])  # (B, T, U+1)
    mask = torch.zeros(*inside.shape, 16, dtype=torch.float64)
    mask[inside] = kept_values(inside, 16, 0.3, torch.float64)
    assert 0.4 < mask[inside].mean() < 1
    scale = 2**15 / loss.kept_numbers(0.3)
    hidden = F.relu(encoded[:, :, None] + predicted[:, None]) * mask * scale
    expected = loss.transducer_loss(F.linear(hidden, weight, bias), *rest, "none")
    assert_all_close(with_grads(costs, arguments), with_grads(expected, arguments))


@pytest.mark.parametrize(("rows", "unit"), [(1, 1), (7, 1), (7, 5), (64, 16)])
def test_block_size_does_not_change_the_joint_loss(monkeypatch, rows, unit):
    arguments, rest = joint_problem(torch.float64)
    expected = with_grads(joint_costs(arguments, rest), arguments)
    monkeypatch.setattr(loss, "BLOCK_ROWS", rows)
    monkeypatch.setattr(loss, "ROW_UNIT", unit)
    assert_all_close(with_grads(joint_costs(arguments, rest), arguments), expected)


def relative_errors(arguments: list[Tensor], costs: Tensor, rest: tuple) -> Tensor:
    """Distance of costs and four gradients from float64, relative to their length: (5,)."""
    exact = [x.detach().double().requires_grad_() for x in arguments]
    reference = with_grads(explicit_costs(exact, rest), exact)
    pairs = zip(with_grads(costs, arguments), reference, strict=True)
    return torch.stack([(a - r).norm() / r.norm() for a, r in pairs])


def autocast_problem() -> tuple[list[Tensor], tuple]:
    """Under autocast, linear layers return bfloat16: encoded and predicted. Parameters stay.

    Rounding `encoded` later would move sums across the corner of the ReLU, and some gradients from
    0 to 1.
    """
    arguments, rest = joint_problem(torch.float32, T=30, U=20)
    rounded = [x.detach().bfloat16().requires_grad_() for x in arguments[:2]]
    return [*rounded, *arguments[2:]], rest


@pytest.mark.parametrize("rows", [loss.BLOCK_ROWS, 16])
def test_joint_under_autocast_is_as_accurate_as_autocast_on_explicit_logits(monkeypatch, rows):
    # Both round the same values, but add them up in another order. Sums over many blocks, taken in
    # bfloat16, would be less accurate. A gradient passes five roundings to bfloat16 (hidden,
    # weight, row of softmax, product, result) of at most 2**-8 each.
    monkeypatch.setattr(loss, "BLOCK_ROWS", rows)
    monkeypatch.setattr(loss, "ROW_UNIT", min(rows, loss.ROW_UNIT))
    arguments, rest = autocast_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        joint, plain = joint_costs(arguments, rest), explicit_costs(arguments, rest)
    assert joint.dtype == torch.float32
    errors = relative_errors(arguments, joint, rest)
    assert (errors < 1.5 * relative_errors(arguments, plain, rest)).all()
    assert 1e-5 < errors.min() < errors.max() < 5 * 2**-8  # bfloat16 is used for all of them


class Operations(TorchDispatchMode):
    """Records the arguments of every softmax and the elements of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes, self.largest = [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if "softmax" in operation.overloadpacket.__name__:
            self.softmaxes.append(args[0])
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


def test_softmax_under_autocast_is_in_float32():
    arguments, rest = autocast_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16), Operations() as forward:
        costs = loss.joint_transducer_loss(*arguments, *rest)
    with Operations() as backward:
        costs.backward()
    for operations in (forward, backward):
        assert {x.dtype for x in operations.softmaxes} == {torch.float32}


def test_backward_pass_keeps_the_forward_pass_dtype_under_autocast():
    arguments, rest = joint_problem(torch.float32)
    expected = with_grads(joint_costs(arguments, rest), arguments)
    costs = joint_costs(arguments, rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = with_grads(costs, arguments)
    assert all(map(torch.equal, actual, expected))


def test_float64_stays_exact_under_autocast():
    arguments, rest = joint_problem(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        costs = joint_costs(arguments, rest)
    assert relative_errors(arguments, costs, rest).max() < 1e-9


def test_softmax_of_bfloat16_logits_is_in_float32():
    # Rounded to bfloat16, log-probabilities near 3 would be off by 0.008.
    problem = random_problem([9, 5], [4, 7], V=30, blank=29)
    logits = problem.logits.bfloat16()
    expected = loss.transducer_loss(logits.double(), *problem[1:], reduction="none")
    costs = loss.transducer_loss(logits, *problem[1:], reduction="none")
    assert costs.dtype == torch.float32
    assert_close(costs, expected, 1e-6)


@pytest.mark.parametrize(("V", "J"), [(200, 8), (8, 200)])
def test_joint_holds_hidden_values_or_a_block_of_logits(V, J):
    B, T, U = 2, 150, 31
    problem = random_problem([T, T], [U, U], V, blank=0)
    arguments = joint_arguments(B, T, U, V, J, torch.float32)
    with Operations() as joint:
        loss.joint_transducer_loss(*arguments, *problem[1:], dropout=0.5).backward()
    with Operations() as plain:
        explicit_costs(arguments, problem[1:]).sum().backward()
    nodes = B * T * (U + 1)
    assert plain.largest == nodes * max(V, J)  # logits are seen where they exist
    assert joint.largest == max(loss.BLOCK_ROWS * V, loss.whole_rows(nodes) * J)


# ------------------------------------------------------------------------- nodes without gradient


def peaked_table(T: int, U: int, dtype: torch.dtype) -> Problem:
    """A lattice like a trained model's: paths near the diagonal have most of the probability.

    The logits are multiples of 1/4 below 32 and so exact in bfloat16.
    """
    problem = random_problem([T], [U], V=6, blank=5)
    t, u = torch.arange(T)[:, None], torch.arange(U + 1)
    ahead = (u + 1) / (U + 1) - (t + 1) / T  # (T, U+1) positive: too many labels for this frame
    logits = problem.logits[0].clone()  # (T, U+1, V)
    logits[..., 5] += 40 * ahead
    logits = ((4 * logits).round() / 4).clamp(-31, 31)[None]
    return problem._replace(logits=logits.to(dtype))


def visits(problem: Problem) -> Tensor:
    """(T, U+1) probabilities that a path visits each node of a batch of one."""
    exact = problem._replace(logits=problem.logits.double())
    return sum(lattice_of(exact)[0].posteriors)[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [
        (torch.bfloat16, 2**-7),  # the row is rounded
        (torch.float32, 1e-5),  # the log-probabilities of the 70 arcs of a path are
        (torch.float64, 1e-9),
    ],
)
def test_skipped_nodes_lose_less_gradient_than_the_stated_bound(dtype, tolerance):
    T, U = 40, 30
    least = loss.SKIP_BELOW * torch.finfo(dtype).eps
    problem = peaked_table(T, U, dtype)
    grads = costs_and_grad(loss_of_table, problem)[1][0]  # (T, U+1, V)
    double = problem._replace(logits=problem.logits.double())
    exact = costs_and_grad(loss.transducer_loss, double)[1][0]
    skipped = ~grads.any(-1)  # (T, U+1)
    assert torch.equal(skipped, visits(problem) <= least)
    assert 0.2 < skipped.double().mean() < 0.9  # a lattice with many of both kinds
    lost = exact[skipped].abs().sum() / (T + U)
    assert 0 < lost <= 2 * T * (U + 1) / (T + U) * least
    # The gradients of the other nodes are exact to rounding.
    off = (grads.double() - exact).abs().amax(-1)
    assert (off <= tolerance * visits(problem))[~skipped].all()


def test_backward_computes_the_softmax_of_visited_nodes_only():
    problem = peaked_table(40, 30, torch.float32)
    with Operations() as operations:
        grads = costs_and_grad(loss_of_table, problem)[1]
    *forward, backward = rows = [len(x) for x in operations.softmaxes]
    assert sum(forward) == loss.whole_rows(40 * 31)
    assert backward == loss.whole_rows(int(grads.any(-1).sum())) < 0.8 * 40 * 31
    # oneDNN builds and keeps a kernel for each number of rows of the products before them.
    assert all(n % loss.ROW_UNIT == 0 and n <= loss.BLOCK_ROWS for n in rows)


def test_utterances_with_upstream_gradient_zero_get_no_gradient():
    # Their values may be NaN: a caller leaves out an utterance by weight 0.
    arguments, rest = joint_problem(torch.float64)
    expected = torch.autograd.grad(joint_costs(arguments, rest).sum(), arguments)
    for skipped in ([0], [1], [0, 1, 2]):
        inputs = [x.detach().clone().requires_grad_() for x in arguments]
        inputs[0].data[skipped] = torch.nan
        upstream = torch.ones(3, dtype=torch.float64)
        upstream[skipped] = 0
        grads = torch.autograd.grad(joint_costs(inputs, rest), inputs, upstream)
        for actual, whole in zip(grads[:2], expected[:2], strict=True):
            assert not actual[skipped].any()
            assert_close(actual[upstream > 0], whole[upstream > 0])
        assert all(g.isfinite().all() for g in grads)


def test_nan_in_the_padding_reaches_neither_costs_nor_gradients():
    arguments, rest = joint_problem(torch.float64)
    _, lens, target_lens, _ = rest
    expected = with_grads(joint_costs(arguments, rest), arguments)
    T, U1 = arguments[0].shape[1], arguments[1].shape[1]
    padding = [torch.arange(T) >= lens[:, None], torch.arange(U1) > target_lens[:, None]]
    assert all(p.any() for p in padding)
    for x, padded in zip(arguments, padding, strict=False):
        x.data[padded] = torch.nan
    actual = with_grads(joint_costs(arguments, rest), arguments)
    assert all(map(torch.equal, actual, expected))


def test_nan_in_an_utterance_reaches_its_cost_and_gradients():
    arguments, rest = joint_problem(torch.float32)
    arguments[0].data[0, 0, 0] = torch.nan
    costs, *grads = with_grads(joint_costs(arguments, rest), arguments)
    assert costs.isnan().tolist() == [True] + [False] * (len(costs) - 1)
    encoded, predicted, weight, bias = grads
    for grad in (encoded[0], predicted[0], weight, bias):
        assert grad.isnan().any()
    assert encoded[1:].isfinite().all()
    assert predicted[1:].isfinite().all()


# -------------------------------------------------------------------------------- band and CTC


def band_of_five(T: int = 5, U: int = 4) -> Tensor:
    """(1, T, U+1): the diagonal and its neighbours."""
    return ((torch.arange(T)[:, None] - torch.arange(U + 1)).abs() <= 1)[None]


def test_costs_in_a_band_are_those_of_the_paths_inside():
    problem = random_problem([5], [4], V=5, blank=2)
    logits = problem.logits.clone().requires_grad_()
    costs = loss_of_table(logits, *problem[1:], reduction="none", band=band_of_five(),
                          border_visits=math.inf)
    grads = torch.autograd.grad(costs.sum(), logits)[0][0]
    logits = problem.logits[0].clone().requires_grad_()
    expected = enumerated_cost(logits, problem.targets[0].tolist(), 2, band_of_five()[0])
    assert_close(costs.detach(), expected.detach())
    assert_close(grads, torch.autograd.grad(expected, logits)[0])


def test_nodes_outside_a_band_are_not_computed(monkeypatch):
    monkeypatch.setattr(loss, "ROW_UNIT", 1)
    problem = random_problem([5], [4], V=5, blank=2)
    with Operations() as operations:
        loss_of_table(*problem, band=band_of_five(), border_visits=math.inf)
    assert [len(x) for x in operations.softmaxes] == [13]


def test_a_band_that_leaves_out_likely_paths_is_widened_to_the_lattice():
    problem = random_problem([5, 3], [4, 2], V=5, blank=2)
    band = torch.zeros(2, 5, 5, dtype=torch.bool)
    band[0] = band_of_five()
    band[1, :3, :3] = True
    costs = loss_of_table(*problem, reduction="none", band=band)
    assert_close(costs, loss_of_table(*problem, reduction="none"))
    assert torch.equal(band, problem.inside())


@pytest.mark.parametrize("border_visits", [loss.MOST_BORDER_VISITS, math.inf])
def test_a_band_without_any_path_is_widened_to_the_lattice(border_visits):
    problem = random_problem([5], [4], V=5, blank=2)
    band = torch.zeros(1, 5, 5, dtype=torch.bool)
    costs = loss_of_table(*problem, reduction="none", band=band, border_visits=border_visits)
    assert_close(costs, loss_of_table(*problem, reduction="none"))
    assert band.all()


def test_a_band_around_likely_paths_stays_and_changes_the_cost_little():
    problem = peaked_table(24, 16, torch.float64)
    band = (visits(problem) > 1e-6)[None]
    assert 0.1 < band.double().mean() < 0.7
    before = band.clone()
    costs = loss_of_table(*problem, reduction="none", band=band)
    exact = loss_of_table(*problem, reduction="none")
    assert torch.equal(band, before)
    assert 0 <= (costs - exact).item() < loss.MOST_BORDER_VISITS


def test_band_of_a_head_that_is_certain_surrounds_its_alignment():
    """Labels 1 and 2 are emitted in frames 1 and 3 of 5, so nodes (0, 0) to (4, 2) are visited."""
    logits = torch.full((1, 5, 4), -20.0)
    for position, label in enumerate([3, 1, 3, 2, 3]):
        logits[0, position, label] = 20
    arguments = torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2]), 3
    exact = loss.ctc_band(logits, *arguments, split=1, frames=0, labels=0)
    assert exact[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]
    near = loss.ctc_band(logits, *arguments, split=1, frames=1, labels=0)
    assert near[0].int().tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 1, 1], [0, 1, 1]]
    near = loss.ctc_band(logits, *arguments, split=1, frames=0, labels=1)
    assert near[0].int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_band_of_a_head_with_two_positions_a_frame_does_not_depend_on_padding():
    """Frame 0 emits both labels; the second utterance has one frame and no label."""
    logits = torch.full((2, 4, 4), -20.0)
    for position, label in enumerate([1, 2, 3, 3]):
        logits[:, position, label] = 20
    arguments = torch.tensor([[1, 2], [0, 0]]), torch.tensor([2, 1]), torch.tensor([2, 0]), 3
    band = loss.ctc_band(logits, *arguments, split=2, frames=0, labels=0)
    assert band.int().tolist() == [[[1, 1, 1], [0, 0, 1]], [[1, 0, 0], [0, 0, 0]]]


# ----------------------------------------------------------------------------------------- dropout


NODES = torch.ones(2, 50, 50, dtype=torch.bool)  # two whole lattices


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_drops_its_share(dropout, dtype):
    hidden = kept_values(NODES, 64, dropout, dtype)
    share = round(dropout * 2**15) / 2**15
    assert hidden.unique().tolist() == [0, 1]
    assert math.isclose(loss.kept_numbers(dropout) / 2**15, 1 - share)
    # Four standard deviations of a share among 320,000 values bound the difference.
    error = math.sqrt(share * (1 - share) / hidden.numel())
    assert abs((hidden == 0).double().mean() - share) < 4 * error


def test_dropout_masks_of_nodes_are_independent():
    kept = kept_values(NODES[:, :15, :20], 64, 0.5) > 0  # (600, 64)
    equal = (kept[:, None] == kept).double().mean(-1)  # (600, 600)
    # The mean of 64 fair coins is 0.5 +- 0.0625; six deviations bound the extreme of 180,000 pairs.
    assert equal.fill_diagonal_(0.5).sub(0.5).abs().max() < 6 * 0.0625


def test_dropout_masks_of_blocks_are_independent(monkeypatch):
    # All blocks take slices of the same random rows.
    monkeypatch.setattr(loss, "BLOCK_ROWS", 50)
    kept = (kept_values(NODES, 64, 0.5) > 0).float().view(100, 50 * 64) - 0.5  # (blocks, values)
    equal_more_than_half = (2 * kept @ kept.T / (50 * 64)).fill_diagonal_(0)
    # The mean of 3200 fair coins is 0.5 +- 0.0088; six deviations bound the extreme of 4950 pairs.
    assert equal_more_than_half.abs().max() < 6 * 0.0088


def test_dropout_mask_follows_the_global_seed():
    arguments, rest = joint_problem(torch.float32)
    costs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        costs += [loss.joint_transducer_loss(*arguments, *rest, 0.3).item() for _ in range(2)]
    assert costs[:2] == costs[2:4]
    assert len(set(costs)) == 4  # two calls after one seed differ


def test_without_dropout_the_random_state_is_left_alone():
    arguments, rest = joint_problem(torch.float32)
    before = torch.get_rng_state()
    loss.joint_transducer_loss(*arguments, *rest).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_just_below_one_is_possible():
    arguments, rest = joint_problem(torch.float32)
    value = loss.joint_transducer_loss(*arguments, *rest, dropout=0.99999)
    value.backward()
    assert value.isfinite()
    assert all(x.grad.isfinite().all() for x in arguments)


# ---------------------------------------------------------------------------------- wrong arguments

GOOD = random_problem([3, 2], [2, 1], V=4, blank=1)
WRONG_BATCHES = {
    "targets_shape": ({"targets": torch.zeros(2, 3).long()}, r"targets: \(2, 3\).*\(2, 2\)"),
    "targets_float": ({"targets": torch.zeros(2, 2)}, r"targets: .*torch\.float32"),
    "label_is_blank": ({"targets": torch.tensor([[0, 1], [0, 0]])}, r"targets\[0, 1\]: 1,.* 1$"),
    "label_negative": ({"targets": torch.tensor([[0, 2], [-1, 0]])}, r"targets\[1, 0\]: -1"),
    "label_too_large": ({"targets": torch.tensor([[0, 4], [0, 0]])}, r"targets\[0, 1\]: 4,.*4"),
    "lens_shape": ({"lens": torch.tensor([3])}, r"LENS: .*\(1,\).*\(2,\)"),
    "lens_int16": ({"lens": torch.tensor([3, 2]).short()}, r"LENS: .*int16, expected int32 or int"),
    "lens_zero": ({"lens": torch.tensor([3, 0])}, r"LENS\[1\]: 0,.*1 <= n <= 3"),
    "lens_too_large": ({"lens": torch.tensor([4, 3])}, r"LENS\[0\]: 4,.*1 <= n <= 3"),
    "target_lens_negative": ({"target_lens": torch.tensor([2, -1])}, r"target_lens\[1\]: -1,.*0"),
    "target_lens_too_large": ({"target_lens": torch.tensor([3, 1])}, r"target_lens\[0\]: 3,.*2"),
    "blank_negative": ({"blank": -2}, r"blank: -2, expected -1 or 0 <= blank < 4"),
    "blank_too_large": ({"blank": 4}, r"blank: 4, expected -1 or 0 <= blank < 4"),
    "label_is_last_class_and_blank": (
        {"blank": -1, "targets": torch.tensor([[0, 3], [0, 0]])},
        r"targets\[0, 1\]: 3,.*blank 3",
    ),
}


@pytest.mark.parametrize("name", ["logits", "joint"])
@pytest.mark.parametrize(("change", "message"), WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_impossible_batch_is_an_error_that_names_argument_and_value(name, change, message):
    own_name = {"logits": "logit_lens", "joint": "encoded_lens"}[name]
    problem = GOOD._replace(**change)
    with pytest.raises(ValueError, match=r"^" + message.replace("LENS", own_name)):
        LOSSES[name](*problem)


def test_a_batch_of_no_utterances_is_an_error():
    with pytest.raises(ValueError, match="a batch of 0 utterances"):
        loss.transducer_loss(*(x[:0] for x in GOOD[:4]), GOOD.blank)


@both
def test_unknown_reduction_is_an_error(loss_of):
    with pytest.raises(ValueError, match=r"^reduction: 'average', .*'none', 'mean' or 'sum'"):
        loss_of(*GOOD, reduction="average")


def test_logits_of_three_dimensions_are_an_error():
    with pytest.raises(ValueError, match=r"^logits: .*\(3, 3, 4\).*\(B, T, U\+1, V\)"):
        loss.transducer_loss(GOOD.logits[0], *GOOD[1:])


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (2, 6), r"encoded: shape \(2, 6\), predicted: \(2, 3, 6\)"),
        (0, (2, 3, 7), r"encoded: shape \(2, 3, 7\), predicted: \(2, 3, 6\)"),
        (1, (1, 3, 6), r"encoded: shape \(2, 3, 6\), predicted: \(1, 3, 6\)"),
        (1, (3, 6), r"encoded: shape \(2, 3, 6\), predicted: \(3, 6\)"),
        (2, (4, 5), r"weight: shape \(4, 5\), bias: \(4,\), expected \(V, 6\)"),
        (3, (5,), r"weight: shape \(4, 6\), bias: \(5,\)"),
    ],
)
def test_wrong_shape_of_a_joint_argument_is_an_error(position, shape, message):
    arguments = [x.detach() for x in joint_arguments(2, 3, 2, V=4, J=6)]
    arguments[position] = torch.zeros(shape)
    with pytest.raises(ValueError, match="^" + message):
        loss.joint_transducer_loss(*arguments, *GOOD[1:])


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_impossible_dropout_is_an_error(dropout):
    arguments = joint_arguments(2, 3, 2, V=4, J=6)
    with pytest.raises(ValueError, match=f"^dropout: {dropout}, expected 0 <= dropout < 1"):
        loss.joint_transducer_loss(*arguments, *GOOD[1:], dropout)
