# SPDX-License-Identifier: Apache-2.0
"""optimizer.py: learning rate, LAMB, clipping and averaged weights, against values typed in here.

    python -m pytest tests/test_optimizer.py

Recorded runs are in test_oracles.py.
"""

import math

import pytest
import torch
from torch import nn

from optimizer import Lamb, clip_gradients, lr_at, update_ema

# --------------------------------------------------------------------------- learning-rate schedule

DEMO = dict(lr=0.007, warmup_epochs=10, hold_epochs=33, steps_per_epoch=3, gamma=0.939, lr_min=1e-5)


def rates_by_epoch(schedule, epochs):
    """Epoch -> learning rates of its steps."""
    per_epoch = schedule["steps_per_epoch"]
    return {
        e: [lr_at((e - 1) * per_epoch + i, e, **schedule) for i in range(1, per_epoch + 1)]
        for e in range(1, epochs + 1)
    }


def test_first_rates_are_those_that_the_originals_demo_prints():
    # Cell output of demo/AIDK_RNNT_DEMO.ipynb, intel/e2eAIOK ea9889d3: 3 steps an epoch.
    printed = [f"{lr_at(step, (step + 2) // 3, **DEMO):.2e}" for step in range(1, 7)]
    assert printed == ["4.52e-04", "6.77e-04", "9.03e-04", "1.13e-03", "1.35e-03", "1.58e-03"]


def test_rate_warms_up_holds_and_decays_once_an_epoch():
    schedule = dict(lr=1.0, warmup_epochs=1, hold_epochs=1, steps_per_epoch=3, gamma=0.5, lr_min=0)
    rates = rates_by_epoch(schedule, 4)
    assert rates == {1: [0.5, 0.75, 1.0], 2: [1.0] * 3, 3: [0.5] * 3, 4: [0.25] * 3}


def test_rate_has_a_floor_in_warm_up_and_decay():
    schedule = dict(lr=1.0, warmup_epochs=1, hold_epochs=0, steps_per_epoch=9, gamma=0.1,
                    lr_min=0.3)
    rates = rates_by_epoch(schedule, 3)
    assert rates[1][:3] == [0.3, 0.3, 0.4]
    assert rates[3] == [0.3] * 9


@pytest.mark.parametrize("warmup_epochs", [0, 0.5])
def test_rate_without_a_whole_epoch_of_warm_up(warmup_epochs):
    schedule = dict(lr=1.0, hold_epochs=1, steps_per_epoch=4, gamma=0.5, lr_min=0)
    first = rates_by_epoch({**schedule, "warmup_epochs": warmup_epochs}, 1)[1]
    assert first == ([1.0] * 4 if warmup_epochs == 0 else [2 / 3, 1.0, 1.0, 1.0])


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
    """Tensors, the second of which starts at zero, and the gradients of six steps for each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), (2, 2, 2)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    values[1].zero_()
    grads = [[torch.randn(s, generator=generator, dtype=torch.float64) for _ in range(6)]
             for s in shapes]
    return values, grads


def test_lamb_has_the_defaults_of_torchs_adam():
    (param,) = as_parameters([[1.0]])
    ours, torchs = (o([param]).defaults for o in (Lamb, torch.optim.Adam))
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert ours[name] == torchs[name]


def run_lamb(optimizer, params, grads, steps):
    for t in steps:
        for param, param_grads in zip(params, grads, strict=True):
            param.grad = param_grads[t].clone()
        optimizer.step()


@pytest.mark.parametrize("part", [5, Lamb.PART])  # tensors of 12, 5 and 8 values
def test_lamb_follows_the_formula(monkeypatch, part):
    monkeypatch.setattr(Lamb, "PART", part)
    values, grads = random_problem()
    params = [nn.Parameter(v.clone()) for v in values]
    run_lamb(Lamb(params, 0.02, **LAMB), params, grads, range(6))
    for param, value, param_grads in zip(params, values, grads, strict=True):
        expected = lamb_by_the_formula(value, param_grads, 0.02, **LAMB)
        # The order of operations differs, in float64.
        torch.testing.assert_close(param.detach(), expected, rtol=1e-13, atol=1e-14)


def test_lamb_without_weight_decay_is_adam():
    values, grads = random_problem()
    params, others = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    run_lamb(Lamb(params, 0.02), params, grads, range(6))
    run_lamb(torch.optim.Adam(others, 0.02), others, grads, range(6))
    for ours, torchs in zip(params, others, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14)


def test_lamb_moves_a_tensor_without_gradient_by_its_weight_decay_alone():
    (param,) = as_parameters([[3.0, -4.0]])
    param.grad = torch.zeros_like(param)
    Lamb([param], lr=0.1, weight_decay=0.01).step()
    # The update is 0.01 * param, the ratio 100: the step is lr * param.
    assert param.tolist() == pytest.approx([2.7, -3.6], rel=1e-12)


def test_lamb_leaves_zeros_without_gradient_and_unused_parameters_alone():
    zeros, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zeros.grad = torch.zeros(3)
    Lamb([zeros, unused], lr=0.1, weight_decay=0.01).step()
    assert torch.equal(zeros, torch.zeros(3))
    assert torch.equal(unused, torch.ones(3))


def test_lamb_goes_on_from_its_state_with_gradients_of_any_strides():
    values, grads = random_problem()
    params = [nn.Parameter(v.clone()) for v in values]
    run_lamb(Lamb(params, 0.02, **LAMB), params, grads, range(6))

    others = [nn.Parameter(v.clone()) for v in values]
    first = Lamb(others, 0.02, **LAMB)
    run_lamb(first, others, grads, range(3))
    second = Lamb(others, 0.5, betas=(0.1, 0.1), eps=1.0)
    second.load_state_dict(first.state_dict())
    strided = [[g.transpose(0, -1).contiguous().transpose(0, -1) for g in of] for of in grads]
    assert not strided[0][0].is_contiguous()
    run_lamb(second, others, strided, range(3, 6))
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
