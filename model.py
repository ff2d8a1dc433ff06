# SPDX-License-Identifier: Apache-2.0
"""The recurrent neural network transducer: encoder, prediction network, joint network.

This file stands alone: copy it and loss.py into another project (both need torch only).

    model = Transducer(PRESETS["democratized"])
    encoded, enc_lens = model.encode(feats, feat_lens)          # (B, T, J), (B,)
    predicted = model.predict(targets)                          # (B, U+1, J)
    logits = model.joint(encoded, predicted)                    # (B, T, U+1, V)

Shape letters, used in every file:
    B  utterances in a batch          T_in  input frames
    T  encoder frames                 U     target labels (the lattice axis is U+1)
    V  output classes, blank included D     size of an input frame
    H  LSTM hidden size               J     joint hidden size
    T_low  frames before StackTime: T_in, or fewer behind convolutions
Lengths are int64 (B,) and count valid items before padding: feat_lens, enc_lens, target_lens.

Graves (2012), arXiv:1211.3711: the transducer. He et al. (2019), arXiv:1811.06621: LSTM
encoder with time stacking. The defaults, initialisation included, are those of the MLPerf Training
v1.0 RNN-T; the normalisation layers are those of Intel e2eAIOK (modelzoo/rnnt).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LstmState = tuple[Tensor, Tensor]  # hidden and cell state, (layers, B, H) each
# A LowerState holds the frame before each convolution's input, the state of the LSTMs before
# StackTime, and, if the model looks ahead, the last frames, whose outputs need frames of the next
# chunk.
LowerState = tuple[list[Tensor], LstmState | None, list[Tensor]]
EncoderState = tuple[LowerState, LstmState | None]  # before and after StackTime


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. The defaults are the MLPerf v1.0 RNN-T (49,071,616 parameters)."""

    feature_size: int = 256  # D: 3 x 80 log-mel values padded to a multiple of 32
    vocab_size: int = 1024  # V: sentencepieces + 1; blank is the last class
    enc_hidden: int = 1024  # H of both encoder stacks
    pre_layers: int = 2  # LSTM layers before StackTime
    stack: int = 2  # frames that StackTime concatenates
    post_layers: int = 3  # LSTM layers after StackTime
    pred_hidden: int = 512  # H of the prediction network, and its embedding size
    pred_layers: int = 2  # LSTM layers of the prediction network
    joint_hidden: int = 512  # J
    enc_dropout: float = 0.1  # dropout probability after every LSTM layer of the encoder
    pred_dropout: float = 0.3  # dropout probability after every LSTM layer of the prediction net
    joint_dropout: float = 0.3  # dropout probability on the joint hidden layer
    normalization: bool = False  # BatchNorm on features, LayerNorm after every LSTM stack
    conv_layers: int = 0  # convolutions before the LSTMs; each halves time and frequency
    conv_channels: int = 32  # channels of the first two convolutions; later ones have twice as many
    look_ahead: int = 0  # frames before StackTime that the encoder looks ahead; multiple of stack
    bidirectional: bool = False  # half of each encoder layer reads the utterance backwards
    residual: bool = False  # adds an LSTM layer's input to its output, LayerNorm after every layer
    ctc_split: int = 0  # the CTC head's label positions per encoder frame, if a loss uses it
    char_head: bool = False  # a second CTC head, of characters, on the frames before StackTime
    orthogonal_init: bool = False  # recurrent weights orthogonal, input weights Xavier, not uniform
    forget_gate_bias: float = 1.0  # initial bias of the forget gate, before weights_init_scale
    weights_init_scale: float = 0.5  # multiplies LSTM weights and biases at the start

    def __post_init__(self) -> None:
        sizes = ("feature_size", "enc_hidden", "stack", "post_layers", "pred_hidden", "pred_layers",
                 "joint_hidden", "conv_channels")
        for name in (*sizes, "pre_layers", "conv_layers", "look_ahead", "ctc_split"):
            least = 1 if name in sizes else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least {least}")
        if self.look_ahead % self.stack:
            raise ValueError(f"look_ahead: {self.look_ahead}, expected a multiple of stack, "
                             f"{self.stack}")
        if self.bidirectional and self.enc_hidden % 2:
            raise ValueError(f"enc_hidden: {self.enc_hidden}, expected an even number with "
                             "bidirectional")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size: {self.vocab_size}, expected a label and the blank")
        for name in ("enc_dropout", "pred_dropout", "joint_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 <= p < 1")
        for name in ("forget_gate_bias", "weights_init_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: {getattr(self, name)}, expected a finite number")

    @property
    def blank(self) -> int:
        return self.vocab_size - 1

    @property
    def reduction(self) -> int:
        """Input frames per encoder frame."""
        return 2**self.conv_layers * self.stack


PRESETS = {
    "baseline": ModelConfig(),
    # This is Intel's "democratized" model: 21,001,216 parameters, a quarter of baseline's frames.
    "democratized": ModelConfig(enc_hidden=512, stack=8, post_layers=2, normalization=True,
                                orthogonal_init=True, weights_init_scale=1.0),
    # Five hours of speech overfit less with a small vocabulary and prediction network.
    "mini": ModelConfig(
        feature_size=80, vocab_size=128, conv_layers=2, enc_hidden=384, pre_layers=2,
        bidirectional=True, stack=2, post_layers=2, pred_hidden=128, pred_layers=1,
        joint_hidden=256, enc_dropout=0.3, pred_dropout=0.3, joint_dropout=0.2, normalization=True,
        residual=True, orthogonal_init=True, weights_init_scale=1.0,
    ),
    # The demo corpus has some 100 words; two cores train this model on it in minutes.
    "demo": ModelConfig(
        vocab_size=64, enc_hidden=160, pre_layers=1, stack=4, post_layers=1,
        pred_hidden=96, pred_layers=1, joint_hidden=128,
        pred_dropout=0.1, joint_dropout=0.1, normalization=True, residual=True,
        orthogonal_init=True, weights_init_scale=1.0,
    ),
}


# ---------------------------------------------------------------------------- building blocks


def valid_frames(lens: Tensor, max_len: int) -> Tensor:
    """(B,) lengths -> (B, max_len) booleans, True where the frame is not padding."""
    return torch.arange(max_len, device=lens.device) < lens[:, None]


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64.

    loss.py has the same function, so that each file stands alone.
    """
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):  # backends differ
        return torch.float32
    return torch.float64


class FeatureNorm(nn.Module):
    """BatchNorm over the frames of a batch that are not padding.

    Ioffe & Szegedy (2015), arXiv:1502.03167; eps and momentum are those of
    torch.nn.BatchNorm1d. A training forward normalises by the statistics of its own batch, except
    between `begin_step` and `end_step`: then all micro-batches and ranks of a step share theirs.
    The features depend on no parameter, so their moments can be added up beforehand, and no
    gradient flows through the statistics.

        moments = sum(norm.moments(feats, feat_lens) for feats, feat_lens in micro_batches)
        norm.begin_step(all_sum(moments, ranks))
        ...  # forward and backward of every micro-batch
        norm.end_step()
    """

    def __init__(self, size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))
        self.step_statistics = None  # mean and variance (D,) of the step that has begun

    @staticmethod
    def moments(feats: Tensor, feat_lens: Tensor) -> Tensor:
        """Number of valid frames, their sum and sum of squares: (1 + 2*D,), see widest_float."""
        dtype = widest_float(feats.device)
        sums = torch.zeros(2, feats.shape[2], dtype=dtype, device=feats.device)
        # The loop takes one utterance at a time because a batch in float64 exceeds the cache.
        for frames, n in zip(feats, feat_lens.tolist(), strict=True):
            frames = frames[:n].to(dtype)  # (n, D)
            sums += torch.stack([frames.sum(0), frames.square().sum(0)])
        return torch.cat([feat_lens.sum()[None].to(sums), sums.flatten()])

    def begin_step(self, moments: Tensor) -> None:
        """Normalises all forwards until `end_step` by `moments`; updates the running statistics."""
        self.step_statistics = self.update(moments)

    def end_step(self) -> None:
        self.step_statistics = None

    @torch.no_grad()
    def update(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Moves the running statistics towards `moments`; returns their mean and variance."""
        count = moments[0]
        mean, mean_square = (moments[1:] / count).chunk(2)  # (D,), (D,)
        var = (mean_square - mean.square()).clamp_min(0)
        unbiased = var * count / (count - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        return mean, var

    def forward(self, feats: Tensor, feat_lens: Tensor) -> Tensor:
        """(B, T_in, D), (B,) -> (B, T_in, D). Evaluation uses the running statistics."""
        if not self.training:
            statistics = self.running_mean, self.running_var
        elif self.step_statistics is not None:
            statistics = self.step_statistics
        else:
            statistics = self.update(self.moments(feats, feat_lens))
        mean, var = (x.to(feats) for x in statistics)
        scale = self.weight / torch.sqrt(var + self.eps)  # (D,)
        return torch.addcmul(self.bias - mean * scale, feats, scale)


class ConvFrontEnd(nn.Module):
    """3 x 3 convolutions that halve time and frequency, a linear layer, LayerNorm.

    Output frame t of a convolution sees its input frames 2t - 1, 2t and 2t + 1. So frame t of the
    last one needs no input frame past (t + 1) * 2^layers - 1, and chunks of 2^layers frames need
    none of the next chunk.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        channels = [1, *(cfg.conv_channels * (1 if i < 2 else 2) for i in range(cfg.conv_layers))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, kernel_size=3, stride=2, padding=(0, 1)) for pair in pairwise(channels)
        )
        bins = -(-cfg.feature_size // 2**cfg.conv_layers)
        self.linear = nn.Linear(channels[-1] * bins, cfg.enc_hidden)
        self.layer_norm = nn.LayerNorm(cfg.enc_hidden)

    def forward(self, x: Tensor, lens: Tensor,
                state: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(B, T_in, D), (B,), state -> (B, ceil(T_in / 2^layers), H), (B,), state.

        `state` holds the frame before each convolution's input; an empty list means zeros, which
        precede the first frame of an utterance.
        """
        x, last = x[:, None], []  # (B, 1, T_in, D)
        for i, convolution in enumerate(self.convolutions):
            # The frames behind an utterance's end must hold zeros, as for an utterance alone.
            x = x.masked_fill(~valid_frames(lens, x.shape[2])[:, None, :, None], 0.0)
            before = state[i] if state else torch.zeros_like(x[:, :, :1])
            last.append(x[:, :, -1:])
            x = F.pad(torch.cat([before, x], 2), (0, 0, 0, x.shape[2] % 2))
            x = F.relu(convolution(x))  # (B, channels, ceil(T / 2), ceil(D / 2))
            lens = (lens + 1) // 2
        x = self.linear(x.transpose(1, 2).flatten(2))  # (B, T, H)
        return self.layer_norm(x), lens, last


class WideLstm(nn.LSTM):
    """One layer of torch.nn.LSTM, faster to train in bfloat16 where the input is wide.

    oneDNN's backward pass adds to the gradient of all 4*H x input_size input weights at every
    frame, which moves them through memory T times. `unrolled` multiplies by the input weights
    once for all frames. In float32, in evaluation and for narrow inputs torch's own forward is
    faster and runs instead. In training under autocast to bfloat16 it computes narrow inputs of
    at most `float32_batch` utterances in float32.
    """

    MIN_INPUT_SIZE = 2048  # `unrolled` is faster from this input size on
    float32_batch = 0  # utterances; 0: all batches are trained in bfloat16

    def forward(self, x: Tensor, state: LstmState | None = None) -> tuple[Tensor, LstmState]:
        """(T, B, input_size), state -> (T, B, H), state after the last frame."""
        device = x.device.type
        is_bfloat16 = (torch.is_autocast_enabled(device)
                       and torch.get_autocast_dtype(device) == torch.bfloat16)
        if self.training and is_bfloat16:
            if self.input_size >= self.MIN_INPUT_SIZE:
                return self.unrolled(x, state)
            if x.shape[1] <= self.float32_batch:
                with torch.autocast(device, enabled=False):
                    return super().forward(x.float(), state)
        return super().forward(x, state)

    def unrolled(self, x: Tensor, state: LstmState | None = None) -> tuple[Tensor, LstmState]:
        """The same as `forward`, with the recurrence as a loop over frames."""
        if state is None:
            zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
            state = zeros, zeros
        gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)  # (T, B, 4*H)
        h, c = state[0][0].to(gates.dtype), state[1][0].to(self.weight_hh_l0.dtype)
        outputs = []
        for t, from_input in enumerate(gates):
            # Autograd sums the gradients of one copy of the weight in the copy's own dtype. A new
            # copy every 8 frames keeps those sums short; the copies add up in the weight's dtype.
            if t % 8 == 0:
                weight = self.weight_hh_l0.to(gates.dtype).t()  # (H, 4*H)
            i, f, g, o = torch.addmm(from_input, h, weight).to(c.dtype).chunk(4, dim=1)  # (B, H)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = (o.sigmoid() * c.tanh()).to(gates.dtype)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


def initialize_gates(name: str, parameter: Tensor) -> None:
    """Orthogonal recurrent and Xavier-uniform input weights for each gate, biases of zero.

    Saxe et al. (2013), arXiv:1312.6120; Glorot & Bengio (2010).
    """
    if "bias" in name:
        nn.init.zeros_(parameter)
        return
    for gate in parameter.chunk(4):  # (H, H) or (H, input_size)
        (nn.init.orthogonal_ if "weight_hh" in name else nn.init.xavier_uniform_)(gate)


def reverse(x: Tensor, lens: Tensor) -> Tensor:
    """(T, B, H), (B,) -> (T, B, H): the valid frames of each utterance in reverse order.

    Padding stays behind them. Reversing twice gives `x`.
    """
    time = torch.arange(x.shape[0], device=x.device)[:, None]  # (T, 1)
    source = torch.where(time < lens, lens - 1 - time, time)  # (T, B)
    return x.gather(0, source[:, :, None].expand(x.shape))


class LstmStack(nn.Module):
    """LSTM layers, dropout after each of them, LayerNorm (arXiv:1607.06450) after the last.

    With `cfg.residual` LayerNorm follows every layer, and a layer as wide as its input adds its
    input to its output before that LayerNorm. The layers are separate modules because torch.nn.LSTM
    has no dropout after its last layer. Between them time comes first, as oneDNN's LSTM reads and
    writes it.

    Args:
        bidirectional: every layer is two of half the size, and the second one reads each utterance
            from its end, Graves & Schmidhuber (2005), doi:10.1016/j.neunet.2005.06.042.
    """

    def __init__(self, input_size: int, hidden: int, layers: int, dropout: float,
                 cfg: ModelConfig, bidirectional: bool = False) -> None:
        super().__init__()
        input_sizes = [input_size] + [hidden] * (layers - 1)
        width = hidden // 2 if bidirectional else hidden
        self.layers = nn.ModuleList(WideLstm(size, width) for size in input_sizes)
        self.backward_layers = nn.ModuleList(
            WideLstm(size, width) for size in input_sizes if bidirectional
        )
        self.dropout = nn.Dropout(dropout)
        self.residual = cfg.residual
        if cfg.residual:
            self.layer_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        else:
            self.layer_norm = nn.LayerNorm(hidden) if cfg.normalization else nn.Identity()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "layer_norm" in name:
                    continue
                if cfg.orthogonal_init:
                    initialize_gates(name, parameter)
                # The gates stand in the order input, forget, cell, output. The LSTM adds two
                # forget biases: one is set to the wanted value and the other to zero.
                if "bias" in name:
                    forget_bias = cfg.forget_gate_bias if "bias_ih" in name else 0.0
                    parameter[width : 2 * width] = forget_bias
                parameter *= cfg.weights_init_scale

    def forward(self, x: Tensor, state: LstmState | None = None,
                lens: Tensor | None = None) -> tuple[Tensor, LstmState]:
        """(B, T, input_size), state, (B,) -> (B, T, H), state after the last frame.

        Only bidirectional layers need `lens`.
        """
        layer_states = [None] * len(self.layers)
        if state is not None:
            layer_states = list(zip(*(s.split(1) for s in state), strict=True))
        x = x.transpose(0, 1).contiguous()  # (T, B, input_size)
        for i, layer in enumerate(self.layers):
            y, layer_states[i] = layer(x, layer_states[i])
            if self.backward_layers:
                z, _ = self.backward_layers[i](reverse(x, lens))
                y = torch.cat([y, reverse(z, lens)], 2)  # (T, B, H)
            y = self.dropout(y)
            if self.residual:
                y = self.layer_norms[i](x + y if x.shape == y.shape else y)
            x = y
        h, c = (torch.cat(states) for states in zip(*layer_states, strict=True))
        if not self.residual:
            x = self.layer_norm(x)
        return x.transpose(0, 1), (h, c)


class LookAhead(nn.Module):
    """Row convolution: every frame becomes a weighted sum of itself and the frames after it.

    Amodei et al. (2016), arXiv:1512.02595, section 3.7. Each feature has weights of its own, which
    begin as 1 for the frame itself and 0 for the others. Zeros follow the last frame.

    Args:
        frames: number of frames after it, at least 1.
        size: H, features of a frame.
    """

    def __init__(self, frames: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([torch.ones(1, size), torch.zeros(frames, size)]))

    def forward(self, x: Tensor, waiting: Tensor | None = None,
                is_last: bool = True) -> tuple[Tensor, Tensor]:
        """(B, T, H) -> (B, T', H) sums of frames whose next ones are known, and frames that wait.

        The last `frames` frames of a chunk wait for the next one, which takes them as `waiting`,
        (B, frames, H). Zeros follow a chunk that `is_last`, or a whole utterance, and all sums are
        returned.
        """
        frames = len(self.weight) - 1
        if waiting is not None:
            x = torch.cat([waiting, x], 1)
        waiting = x[:, -frames:]
        if is_last:
            x = F.pad(x, (0, 0, 0, frames))
        y = x[:, :-frames] * self.weight[0]
        for i in range(1, frames + 1):
            # `or None` because a slice that ends at -0 is empty.
            y = torch.addcmul(y, x[:, i : i - frames or None], self.weight[i])
        return y, waiting


class StackTime(nn.Module):
    """Concatenates every `factor` frames into one; a last incomplete group is filled with 0."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """(B, T_low, H) -> (B, T, factor*H) with T = ceil(T_low / factor)."""
        B, T_low, H = x.shape
        x = F.pad(x, (0, 0, 0, -T_low % self.factor))
        return x.reshape(B, -1, self.factor * H)


# ------------------------------------------------------------------------------- the networks


class Encoder(nn.Module):
    """Transcription network of Graves (2012) with StackTime in the middle.

    Convolutions may come first (`cfg.conv_layers`). StackTime's input may look some frames ahead
    (`cfg.look_ahead`), or all layers to the end of the utterance (`cfg.bidirectional`).
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        H = cfg.enc_hidden
        self.feature_norm = FeatureNorm(cfg.feature_size) if cfg.normalization else None
        width = cfg.feature_size
        self.conv = self.pre = None
        if cfg.conv_layers:
            self.conv, width = ConvFrontEnd(cfg), H
        if cfg.pre_layers:
            self.pre = LstmStack(width, H, cfg.pre_layers, cfg.enc_dropout, cfg, cfg.bidirectional)
            width = H
        self.look_ahead = LookAhead(cfg.look_ahead, width) if cfg.look_ahead else None
        self.stack_time = StackTime(cfg.stack)
        self.lower_size = width  # of a frame before StackTime
        self.post = LstmStack(cfg.stack * width, H, cfg.post_layers, cfg.enc_dropout, cfg,
                              cfg.bidirectional)

    def forward(self, feats: Tensor, feat_lens: Tensor, state: EncoderState | None = None,
                is_last: bool = True) -> tuple[Tensor, EncoderState]:
        """(B, T_in, D), (B,), state -> (B, T, H), state after the last frame, padding included.

        `is_last` tells that no chunk of the utterances follows.
        """
        lower_state, upper_state = (None, None) if state is None else state
        x, lens, lower_state = self.lower(feats, feat_lens, lower_state, is_last)  # (B, T_low, H)
        if x.shape[1] == 0:  # all frames wait for those that they look ahead to
            x = x.new_empty(len(x), 0, self.post.layers[0].hidden_size)  # (B, 0, H)
        else:
            x, upper_state = self.upper(x, lens, upper_state)  # (B, T, H)
        return x, (lower_state, upper_state)

    def lower(self, feats: Tensor, feat_lens: Tensor, state: LowerState | None = None,
              is_last: bool = True) -> tuple[Tensor, Tensor, LowerState]:
        """All before StackTime: (B, T_in, D), (B,), state -> (B, T_low, H), (B,), state."""
        conv_state, pre_state, waiting = ([], None, []) if state is None else state
        x, lens = feats, feat_lens
        if self.feature_norm is not None:
            x = self.feature_norm(x, lens)  # (B, T_in, D)
        if self.conv is not None:
            x, lens, conv_state = self.conv(x, lens, conv_state)  # (B, T_low, H)
        if self.pre is not None:
            x, pre_state = self.pre(x, pre_state, lens)  # (B, T_low, H)
        # Look-ahead and StackTime put padding frames beside the last valid ones. They must hold
        # zeros, as for an utterance alone, and not the outputs of LSTM and LayerNorm.
        x = x.masked_fill(~valid_frames(lens, x.shape[1])[:, :, None], 0.0)
        if self.look_ahead is not None:
            x, *waiting = self.look_ahead(x, *waiting, is_last=is_last)
        return x, lens, (conv_state, pre_state, waiting)

    def upper(self, x: Tensor, lens: Tensor,
              state: LstmState | None = None) -> tuple[Tensor, LstmState]:
        """StackTime and the LSTMs behind it: (B, T_low, H), (B,), state -> (B, T, H), state."""
        factor = self.stack_time.factor
        return self.post(self.stack_time(x), state, (lens + factor - 1) // factor)


class Predictor(nn.Module):
    """Prediction network of Graves (2012): an LSTM over the labels emitted so far.

    The history starts with an all-zero embedding, so blank needs no embedding row.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        H = cfg.pred_hidden
        self.embed = nn.Embedding(cfg.vocab_size - 1, H)
        self.rnn = LstmStack(H, H, cfg.pred_layers, cfg.pred_dropout, cfg)

    def forward(self, targets: Tensor) -> Tensor:
        """(B, U) labels -> (B, U+1, H): the output before any label, then after each one."""
        # Padding may hold any value, even the blank, which has no row in the embedding.
        labels = targets.clamp(0, self.embed.num_embeddings - 1)
        history = F.pad(self.embed(labels), (0, 0, 1, 0))  # (B, U+1, H)
        return self.rnn(history)[0]

    def start(self, batch: int) -> tuple[Tensor, LstmState]:
        """Output (B, H) and state before the first label."""
        x, state = self.rnn(self.embed.weight.new_zeros(batch, 1, self.embed.embedding_dim))
        return x[:, 0], state

    def step(self, labels: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """(B,) one label per utterance, state -> output (B, H), state after the label."""
        x, state = self.rnn(self.embed(labels)[:, None], state)  # (B, 1, H)
        return x[:, 0], state


class Joint(nn.Module):
    """Joint network: linear(dropout(relu(encoder projection + predictor projection)))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.encoder_projection = nn.Linear(cfg.enc_hidden, cfg.joint_hidden)
        self.predictor_projection = nn.Linear(cfg.pred_hidden, cfg.joint_hidden)
        self.dropout = nn.Dropout(cfg.joint_dropout)
        self.output = nn.Linear(cfg.joint_hidden, cfg.vocab_size)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """(..., J) and (..., J) that broadcast -> logits (..., V), not normalised."""
        return self.output(self.dropout(F.relu(encoded + predicted)))


class Outputs(NamedTuple):
    """Outputs of both networks in the joint space, and of the CTC heads.

    `encoded` and `predicted` are None if the CTC heads are trained alone. Logits are None if the
    model lacks their head.
    """

    encoded: Tensor | None  # (B, T, J)
    enc_lens: Tensor  # (B,)
    predicted: Tensor | None  # (B, U+1, J)
    ctc_logits: Tensor | None  # (B, T*split, V)
    ctc_lens: Tensor  # (B,) label positions
    char_logits: Tensor | None  # (B, T_low, V), of the CTC head before StackTime
    char_lens: Tensor  # (B,) frames before StackTime


class Transducer(nn.Module):
    """The whole model. `encode` and `predict` end in the joint space (J).

    The joint network is left with one broadcast addition and one matrix product, the form that
    loss.joint_transducer_loss takes.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.predictor = Predictor(cfg)
        self.joint_network = Joint(cfg)
        # The heads have parameters of their own, which recognition does not use.
        self.ctc_head = self.char_head = None
        if cfg.ctc_split:
            self.ctc_head = nn.Linear(cfg.enc_hidden, cfg.ctc_split * cfg.vocab_size)
        if cfg.char_head:
            self.char_head = nn.Linear(self.encoder.lower_size, cfg.vocab_size)

    def scale_dropout(self, strength: float) -> None:
        """Sets every dropout probability to `strength` times that of the configuration."""
        networks = ((self.encoder, self.cfg.enc_dropout), (self.predictor, self.cfg.pred_dropout),
                    (self.joint_network, self.cfg.joint_dropout))
        for network, probability in networks:
            for module in network.modules():
                if isinstance(module, nn.Dropout):
                    module.p = strength * probability

    def num_frames(self, feat_lens: Tensor) -> Tensor:
        """Encoder frames of utterances of `feat_lens` input frames: (B,) -> (B,)."""
        return (feat_lens + self.cfg.reduction - 1) // self.cfg.reduction

    def encode(self, feats: Tensor, feat_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T_in, D), (B,) -> (B, T, J), (B,)."""
        assert feats.dim() == 3, feats.shape
        assert feats.shape[2] == self.cfg.feature_size, feats.shape
        x, _ = self.encoder(feats, feat_lens)  # (B, T, H)
        return self.joint_network.encoder_projection(x), self.num_frames(feat_lens)

    def split_positions(self, x: Tensor) -> Tensor:
        """(B, T, H) -> (B, T*split, V): every encoder frame has `cfg.ctc_split` label positions.

        CTC (Graves et al. 2006, doi:10.1145/1143844.1143891) emits at most one label per
        position, and StackTime may leave fewer frames than labels.
        """
        B, T, _ = x.shape
        return self.ctc_head(x).view(B, T * self.cfg.ctc_split, self.cfg.vocab_size)

    def encode_chunk(self, feats: Tensor, state: EncoderState | None = None,
                     is_last: bool = False) -> tuple[Tensor, EncoderState]:
        """(B, n, D) frames without padding, state after the previous chunk -> (B, T, J), state.

        In evaluation mode the outputs of consecutive chunks, concatenated, are those of `encode`
        on all frames. Every n but the last must be a multiple of `cfg.reduction`. The outputs of a
        model with `cfg.look_ahead` come that many frames before StackTime later: the first chunks
        have fewer outputs or none, and the call with `is_last` returns all that are left.

        Raises:
            ValueError: the encoder is bidirectional.
        """
        if self.cfg.bidirectional:
            raise ValueError("bidirectional: True, but chunks need an encoder that reads forwards")
        lens = torch.full((len(feats),), feats.shape[1], device=feats.device)
        x, state = self.encoder(feats, lens, state, is_last)  # (B, T, H)
        return self.joint_network.encoder_projection(x), state

    def predict(self, targets: Tensor) -> Tensor:
        """(B, U) -> (B, U+1, J)."""
        assert targets.dim() == 2, targets.shape
        return self.joint_network.predictor_projection(self.predictor(targets))

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """(B, T, J), (B, U+1, J) -> logits (B, T, U+1, V). For training see loss.py."""
        return self.joint_network(encoded[:, :, None], predicted[:, None])

    def forward(self, feats: Tensor, feat_lens: Tensor, targets: Tensor,
                ctc_alone: bool = False) -> Outputs:
        """Everything that the losses need; with `ctc_alone` only the CTC heads' logits."""
        low, low_lens, _ = self.encoder.lower(feats, feat_lens)  # (B, T_low, H), (B,)
        x, _ = self.encoder.upper(low, low_lens)  # (B, T, H)
        enc_lens = self.num_frames(feat_lens)
        heads = (None if self.ctc_head is None else self.split_positions(x),
                 self.cfg.ctc_split * enc_lens,
                 None if self.char_head is None else self.char_head(low), low_lens)
        if ctc_alone:
            return Outputs(None, enc_lens, None, *heads)
        encoded = self.joint_network.encoder_projection(x)  # (B, T, J)
        return Outputs(encoded, enc_lens, self.predict(targets), *heads)
