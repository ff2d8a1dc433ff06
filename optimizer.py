# SPDX-License-Identifier: Apache-2.0
"""LAMB, the learning rate of a step, clipping, and the average of the weights.

You et al. (2019), arXiv:1904.00962: LAMB. Schedule and defaults are those of the MLPerf Training
v1.0 RNN-T. The file needs torch alone.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.profiler import record_function


def lr_at(step: int, epoch: int, *, lr: float, warmup_epochs: float, hold_epochs: float,
          steps_per_epoch: int, gamma: float, lr_min: float, epochs: int = 0,
          hold_share: float = 0.0) -> float:
    """Learning rate of a step; step and epoch count from 1.

    Linear warm-up, hold, then a factor `gamma` per epoch (constant inside an epoch), never less
    than `lr_min`: common/optimizers.py:20-46 of Intel e2eAIOK's RNN-T. With `hold_share` the rate
    is held for that share of all `epochs` instead and then falls linearly, to `lr_min` at their
    end.
    """
    warmup_steps = warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        scale = (step + 1) / (warmup_steps + 1)
    elif hold_share:
        done = step / (epochs * steps_per_epoch)
        scale = min(1.0, (1 - done) / (1 - hold_share))
    elif step < warmup_steps + hold_epochs * steps_per_epoch:
        scale = 1.0
    else:
        scale = gamma ** (epoch - warmup_epochs - hold_epochs)
    return max(scale * lr, lr_min)


@record_function("clip_gradients")
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales all gradients so that their common norm is at most `max_norm`.

    Returns:
        The norm before scaling.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if norm > max_norm:
        torch._foreach_div_(grads, norm / max_norm)
    return norm.item()


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments, You et al. (2019), arXiv:1904.00962, as in apex FusedLAMB.

    The step of a tensor is Adam's update plus weight decay, times the ratio of the norms of the
    parameter and of that update. The ratio is 1 if either norm is zero; IPEX's Lamb has no such
    rule, and there a bias that starts at zero stays zero. Without weight decay the ratio is 1 too,
    and LAMB is Adam: the rule of multi_tensor_lamb.cu. It does not clip: see `clip_gradients`.

    Args:
        parameters: contiguous and of one dtype.
        lr, betas, eps, weight_decay: as in torch.optim.Adam; the decay is decoupled.
    """

    # `move` updates so many values at a time: five tensors, 2.5 MB in all, stay in the caches of
    # two cores.
    PART = 2**17

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.0) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            sizes = [p.numel() for p in params]
            # All tensors share one buffer for their updates, since allocating memory takes time.
            updates = params[0].new_empty(max(sizes)) if params else None
            for p, size in zip(params, sizes, strict=True):
                if not self.state[p]:
                    self.state[p] = {"step": 0, "mean": torch.zeros_like(p),
                                     "square": torch.zeros_like(p)}
                self.state[p]["step"] += 1
                self.move(p, updates[:size], group)

    def move(self, p: Tensor, update: Tensor, group: dict) -> None:
        """Moves one parameter; `update`, of as many values, is overwritten with its update."""
        state, decays = self.state[p], group["weight_decay"] != 0
        tensors = (update, p, p.grad.reshape(-1), state["mean"], state["square"])
        norms = []
        for part in zip(*(x.view(-1).split(self.PART) for x in tensors), strict=True):
            self.adam_update(*part, state["step"], group)
            if decays:
                norms.append(torch.stack([part[1].norm(), part[0].norm()]))
        rate = group["lr"]
        if decays:
            ratio = float(torch.div(*torch.stack(norms).norm(dim=0)))  # of parameter and update
            # A norm of zero makes the ratio 0, infinite or NaN.
            rate *= ratio if math.isfinite(ratio) and ratio > 0 else 1.0
        p.add_(update.view_as(p), alpha=-rate)

    @staticmethod
    def adam_update(update: Tensor, p: Tensor, grad: Tensor, mean: Tensor, square: Tensor,
                    step: int, group: dict) -> None:
        """Moves the moments and writes Adam's update plus weight decay to `update`."""
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        torch.div(square, 1 - beta2**step, out=update)
        update.sqrt_().add_(group["eps"])
        torch.div(mean, update, out=update).div_(1 - beta1**step)
        update.add_(p, alpha=group["weight_decay"])


@record_function("update_ema")
@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, for parameters and buffers."""
    averaged, current = ema.state_dict(), model.state_dict()
    torch._foreach_lerp_(list(averaged.values()), list(current.values()), 1 - decay)
