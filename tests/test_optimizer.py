# SPDX-License-Identifier: Apache-2.0
"""optimizer.py: learning rate, LAMB, clipping and averaged weights, against values typed in here.

    python -m pytest tests/test_optimizer.py

Recorded runs are in test_oracles.py.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn

from optimizer import Lamb, clip_gradients, lr_at, update_ema

# --------------------------------------------------------------------------- learning-rate schedule


def rates(epochs, steps_per_epoch, **changes):
    """The learning rates of the steps of each epoch."""
    schedule = dict(lr=1.0, warmup_epochs=0, hold_epochs=0, gamma=0.5, lr_min=0, epochs=epochs,
                    steps_per_epoch=steps_per_epoch) | changes
    return [[lr_at(epoch * steps_per_epoch + i, epoch + 1, **schedule)
             for i in range(1, steps_per_epoch + 1)] for epoch in range(epochs)]


def test_first_rates_are_those_that_the_originals_demo_prints():
    # Cell output of demo/AIDK_RNNT_DEMO.ipynb, intel/e2eAIOK ea9889d3.
    first, second = rates(2, 3, lr=0.007, warmup_epochs=10, hold_epochs=33, gamma=0.939,
                          lr_min=1e-5)
    printed = [f"{rate:.2e}" for rate in first + second]
    assert printed == ["4.52e-04", "6.77e-04", "9.03e-04", "1.13e-03", "1.35e-03", "1.58e-03"]


def test_rate_warms_up_holds_and_decays_once_an_epoch():
    expected = [[0.5, 0.75, 1.0], [1.0] * 3, [0.5] * 3, [0.25] * 3]
    assert rates(4, 3, warmup_epochs=1, hold_epochs=1) == expected


def test_rate_has_a_floor_in_warm_up_and_decay():
    first, _, last = rates(3, 9, warmup_epochs=1, gamma=0.1, lr_min=0.3)
    assert first[:3] == [0.3, 0.3, 0.4]
    assert last == [0.3] * 9


def test_rate_without_a_whole_epoch_of_warm_up():
    assert rates(1, 4, warmup_epochs=0, hold_epochs=1) == [[1.0] * 4]
    assert rates(1, 4, warmup_epochs=0.5, hold_epochs=1) == [[2 / 3, 1.0, 1.0, 1.0]]


def test_the_rate_is_held_and_then_falls_to_its_least_at_the_last_step():
    assert rates(4, 2, hold_share=0.5) == [[1, 1], [1, 1], [0.75, 0.5], [0.25, 0]]
    assert rates(2, 2, hold_share=0.5, lr_min=0.1) == [[1, 1], [0.5, 0.1]]


def test_more_epochs_stretch_the_schedule():
    short, long = (sum(rates(epochs, 2, hold_share=0.5), []) for epochs in (4, 8))
    assert long[1::2] == short


# -------------------------------------------------------------------------------------- optimiser


def as_parameters(values):
    return [nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in values]


def lamb_by_the_formula(param, grads, lr, betas, eps, weight_decay):
    """You et al. (2019), algorithm 2 with bias correction, one tensor after another."""
    mean, square = torch.zeros_like(param), torch.zeros_like(param)
    for t, grad in enumerate(grads, 1):
        mean = betas[0] * mean + (1 - betas[0]) * grad
        square = betas[1] * square + (1 - betas[1]) * grad**2
        update = mean / (1 - betas[0] ** t)
        update = update / ((square / (1 - betas[1] ** t)).sqrt() + eps)
        update = update + weight_decay * param
        norms = param.norm(), update.norm()
        ratio = norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else 1.0
        param = param - lr * ratio * update
    return param


LAMB = dict(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


def random_problem():
    """Parameters, the second of which starts at zero, and the gradients of six steps for each."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes = [(3, 4), (5,), (2, 2, 2)]
    params = [nn.Parameter(draw(s)) for s in shapes]
    params[1].data.zero_()
    return params, [[draw(s) for _ in range(6)] for s in shapes]


def run(optimizer, grads, steps=range(6)):
    for t in steps:
        for param, param_grads in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            param.grad = param_grads[t].clone()
        optimizer.step()


def test_lamb_has_the_defaults_of_torchs_adam():
    (param,) = as_parameters([[1.0]])
    ours, torchs = (o([param]).defaults for o in (Lamb, torch.optim.Adam))
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert ours[name] == torchs[name]


@pytest.mark.parametrize("part", [5, Lamb.PART])  # tensors of 12, 5 and 8 values
def test_lamb_follows_the_formula(monkeypatch, part):
    monkeypatch.setattr(Lamb, "PART", part)
    params, grads = random_problem()
    expected = [lamb_by_the_formula(param.detach(), param_grads, 0.02, **LAMB)
                for param, param_grads in zip(params, grads, strict=True)]
    run(Lamb(params, 0.02, **LAMB), grads)
    for param, value in zip(params, expected, strict=True):
        # The order of operations differs, in float64.
        torch.testing.assert_close(param.detach(), value, rtol=1e-13, atol=1e-14)


def test_lamb_without_weight_decay_is_adam():
    (params, grads), (others, _) = random_problem(), random_problem()
    run(Lamb(params, 0.02), grads)
    run(torch.optim.Adam(others, 0.02), grads)
    for ours, torchs in zip(params, others, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


def test_lamb_leaves_zeros_without_gradient_and_unused_parameters_alone():
    zeros, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zeros.grad = torch.zeros(3)
    Lamb([zeros, unused], lr=0.1, weight_decay=0.01).step()
    assert torch.equal(zeros, torch.zeros(3))
    assert torch.equal(unused, torch.ones(3))


def test_lamb_goes_on_from_its_state_with_gradients_of_any_strides():
    (params, grads), (others, _) = random_problem(), random_problem()
    run(Lamb(params, 0.02, **LAMB), grads)
    first = Lamb(others, 0.02, **LAMB)
    run(first, grads, range(3))
    second = Lamb(others, 0.5, betas=(0.1, 0.1), eps=1.0)
    second.load_state_dict(first.state_dict())
    strided = [[g.transpose(0, -1).contiguous().transpose(0, -1) for g in of] for of in grads]
    assert not strided[0][0].is_contiguous()
    run(second, strided, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def clip(grads, max_norm):
    params = as_parameters([[0.0] * len(g) for g in grads])
    for param, grad in zip(params, grads, strict=True):
        param.grad = torch.tensor(grad, dtype=torch.float64)
    norm = clip_gradients(iter(params), max_norm)
    return norm, [p.grad.tolist() for p in params]


def test_clipping_scales_all_gradients_to_the_common_norm():
    norm, clipped = clip([[3.0, 0.0], [0.0, 0.0, -4.0]], 1.0)
    assert norm == 5.0  # as it was
    assert clipped == [[3 / 5, 0.0], [0.0, 0.0, -4 / 5]]


@pytest.mark.parametrize("max_norm", [5.0, 7.0, math.inf])
def test_clipping_leaves_small_gradients_alone(max_norm):
    assert clip([[3.0], [-4.0]], max_norm) == (5.0, [[3.0], [-4.0]])


def test_ema_follows_the_formula_for_parameters_and_buffers():
    # optim_oracles.json, ema: decay 0.999, start at 1.
    model, ema = nn.BatchNorm1d(2).double(), nn.BatchNorm1d(2).double()
    del model.num_batches_tracked, ema.num_batches_tracked
    for x in [*model.state_dict().values(), *ema.state_dict().values()]:
        x.fill_(1.0)
    steps = ((2.0, 1.001), (3.0, 1.002999), (0.5, 1.002496001), (-1.0, 1.000493504999))
    for weight, expected in steps:
        for x in model.state_dict().values():
            x.fill_(weight)
        update_ema(ema, model, 0.999)
        assert len(ema.state_dict()) == 4  # weight, bias, running mean and variance
        for x in ema.state_dict().values():
            assert x.tolist() == pytest.approx([expected] * 2, rel=1e-15)
        assert all(x.eq(weight).all() for x in model.state_dict().values())
