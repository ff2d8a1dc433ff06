# SPDX-License-Identifier: Apache-2.0
"""The recurrent neural network transducer: encoder, prediction network, joint network.

Stands alone: copy this file and loss.py into another project and they work (torch only).

    model = Transducer(PRESETS["democratized"])
    encoded, enc_lens = model.encode(feats, feat_lens)          # (B, T, J), (B,)
    predicted = model.predict(targets)                          # (B, U+1, J)
    logits = model.joint(encoded, predicted)                    # (B, T, U+1, V)

Shape letters, used in every file:
    B  utterances in a batch          T_in  input frames before StackTime
    T  encoder frames                 U     target labels (the lattice axis is U+1)
    V  output classes, blank included D     size of an input frame
    H  LSTM hidden size               J     joint hidden size
Lengths are int64 (B,) and count valid items before padding: feat_lens, enc_lens, target_lens.

Graves (2012), arXiv:1211.3711: the transducer. He et al. (2019), arXiv:1811.06621: LSTM
encoder with time stacking. The architecture and its initialisation are those of the MLPerf
Training v1.0 RNN-T, with the normalisation layers of Intel e2eAIOK (modelzoo/rnnt).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    pred_layers: int = 2
    joint_hidden: int = 512  # J
    enc_dropout: float = 0.1  # after every LSTM layer of the encoder
    pred_dropout: float = 0.3  # after every LSTM layer of the prediction network
    joint_dropout: float = 0.3  # on the joint hidden layer
    normalization: bool = False  # BatchNorm on features, LayerNorm after every LSTM stack
    forget_gate_bias: float = 1.0  # of bias_ih, before weights_init_scale
    weights_init_scale: float = 0.5  # multiplies LSTM weights and biases at the start

    def __post_init__(self) -> None:
        for name in ("feature_size", "enc_hidden", "pre_layers", "stack", "post_layers",
                     "pred_hidden", "pred_layers", "joint_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}, expected at least 1")
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
        return self.stack


PRESETS = {
    "baseline": ModelConfig(),
    # Intel's "democratized" model: 21,001,216 parameters, a quarter of the encoder frames.
    "democratized": ModelConfig(enc_hidden=512, stack=8, post_layers=2, normalization=True),
    # For five hours of speech: small vocabulary and prediction network against overfitting.
    "mini": ModelConfig(
        vocab_size=256,
        enc_hidden=512,
        pre_layers=1,
        stack=4,
        post_layers=2,
        pred_hidden=128,
        pred_layers=1,
        joint_hidden=256,
        enc_dropout=0.2,
        pred_dropout=0.3,
        joint_dropout=0.2,
        normalization=True,
    ),
    # Learns the demo corpus (some 100 words) in minutes on two cores.
    "demo": ModelConfig(
        vocab_size=64,
        enc_hidden=160,
        pre_layers=1,
        stack=4,
        post_layers=1,
        pred_hidden=96,
        pred_layers=1,
        joint_hidden=128,
        pred_dropout=0.1,
        joint_dropout=0.1,
        normalization=True,
    ),
}


# ---------------------------------------------------------------------------- building blocks


def valid_frames(lens: Tensor, max_len: int) -> Tensor:
    """(B,) lengths -> (B, max_len) booleans, True where the frame is not padding."""
    return torch.arange(max_len, device=lens.device) < lens[:, None]


class FeatureNorm(nn.Module):
    """BatchNorm over the frames of a batch that are not padding.

    Ioffe & Szegedy (2015), arXiv:1502.03167, epsilon 1e-5 and momentum 0.1 as in
    torch.nn.BatchNorm1d. The input does not depend on any parameter, so the statistics of a
    step that is split over ranks or micro-batches can be added up beforehand: sum `moments`
    over the parts, call `update` once, and hand the sum to every forward.
    """

    def __init__(self, size: int, epsilon: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.epsilon, self.momentum = epsilon, momentum
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    @staticmethod
    def moments(feats: Tensor, feat_lens: Tensor) -> Tensor:
        """Number of valid frames, their sum and sum of squares: (1 + 2*D,) in float64."""
        sums = torch.zeros(2, feats.shape[2], dtype=torch.float64, device=feats.device)
        # One utterance at a time: in double precision a batch does not fit the cache.
        for frames, n in zip(feats, feat_lens.tolist(), strict=True):
            frames = frames[:n].double()  # (n, D)
            sums += torch.stack([frames.sum(0), frames.square().sum(0)])
        return torch.cat([feat_lens.sum()[None].to(sums), sums.flatten()])

    @staticmethod
    def mean_and_var(moments: Tensor) -> tuple[Tensor, Tensor]:
        mean, mean_square = (moments[1:] / moments[0]).chunk(2)  # (D,), (D,)
        return mean, (mean_square - mean.square()).clamp_min(0)

    @torch.no_grad()
    def update(self, moments: Tensor) -> None:
        """Moves the running statistics, which evaluation uses, towards those of one step."""
        mean, var = self.mean_and_var(moments)
        unbiased = var * moments[0] / (moments[0] - 1).clamp_min(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)

    def forward(self, feats: Tensor, feat_lens: Tensor, moments: Tensor | None = None) -> Tensor:
        """(B, T_in, D) -> (B, T_in, D). In training without `moments`: those of this batch."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            if moments is None:
                moments = self.moments(feats, feat_lens)
                self.update(moments)
            mean, var = (x.to(feats) for x in self.mean_and_var(moments))
        scale = self.weight / torch.sqrt(var + self.epsilon)  # (D,)
        return torch.addcmul(self.bias - mean * scale, feats, scale)


class Dropout(nn.Dropout):
    """torch.nn.Dropout with a probability rounded to 2^-15.

    Torch draws 64 bits for each value, one after the other: for 423 x 32 x 512 values that takes
    3 times as long in float32 and 10 times in bfloat16 (Intel Xeon). Here the numbers of a block
    of values are the exclusive or of two windows of the same few, at random places: uniform and
    independent in a block, and between two blocks but for a chance of some 1e-6.
    """

    BLOCK = 2**17  # values

    def __init__(self, p: float) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"dropout: {p}, expected 0 <= p < 1")
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        dropped = min(round(self.p * 2**15), 2**15 - 1)  # of the 2^15 numbers
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        scale = torch.tensor(2**15 / (2**15 - dropped), dtype=x.dtype).view(integer).item()
        size = min(self.BLOCK, 2 * (x.numel() // 2 + 1))  # values of a block, even
        words = torch.empty(2, size // 2, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)
        numbers = words.bitwise_and_(0x7FFF_7FFF_7FFF_7FFF).view(torch.int16)  # (2, 2*size)
        factors = torch.empty(x.shape, dtype=integer, device=x.device)  # the scale's bits, or 0
        for block in factors.view(-1).split(size):
            first, second = torch.randint(size, (2,)).tolist()
            ends = first + len(block), second + len(block)
            keep = numbers[0, first : ends[0]] ^ numbers[1, second : ends[1]]
            keep -= dropped  # negative: dropped
            keep = keep.bitwise_right_shift_(15).bitwise_not_()  # all bits, or none
            torch.bitwise_and(keep.to(integer), scale, out=block)
        return x * factors.view(x.dtype)


class WideLstm(nn.LSTM):
    """One layer of torch.nn.LSTM for inputs wider than its state.

    oneDNN's backward pass adds to the gradient of all 4*H x input_size input weights at every
    frame, which moves them through memory T times. Here they take one matrix product over all
    frames. In bfloat16 behind StackTime that is half the time; in float32 0.9 of it for an input 8
    times as wide (`democratized`), 1.2 for 4 times (`mini`), 1.4 for twice (`baseline`).
    """

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple:
        """(T, B, input_size) and two (1, B, H) -> (T, B, H) and those after the last frame."""
        if state is None:
            zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
            state = zeros, zeros
        gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)  # (T, B, 4*H)
        h, c = state[0][0].to(gates.dtype), state[1][0].to(self.weight_hh_l0.dtype)
        outputs = []
        for t, from_input in enumerate(gates):
            # Under autocast, a copy of the weight in its dtype for every 8 frames: only so many
            # gradients add up in that dtype, and then their sums in the weight's own.
            if t % 8 == 0:
                weight = self.weight_hh_l0.to(gates.dtype).t()  # (H, 4*H)
            i, f, g, o = torch.addmm(from_input, h, weight).to(c.dtype).chunk(4, dim=1)  # (B, H)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = (o.sigmoid() * c.tanh()).to(gates.dtype)
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


class LstmStack(nn.Module):
    """LSTM layers, dropout after each of them, LayerNorm (arXiv:1607.06450) after the last.

    The layers are modules of their own because those inside a torch.nn.LSTM have torch's dropout.
    Between them time comes first, as oneDNN's LSTM reads and writes it.
    """

    def __init__(self, input_size: int, hidden: int, layers: int, dropout: float,
                 cfg: ModelConfig, first: type[nn.LSTM] = nn.LSTM) -> None:
        super().__init__()
        self.layers = nn.ModuleList([first(input_size, hidden)])
        self.layers.extend(nn.LSTM(hidden, hidden) for _ in range(1, layers))
        self.dropout = Dropout(dropout)
        self.layer_norm = nn.LayerNorm(hidden) if cfg.normalization else nn.Identity()
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                # Gate order is input, forget, cell, output. One of the two forget biases is
                # set to the wanted value and the other to zero, since the LSTM adds them.
                if "bias" in name:
                    forget_bias = cfg.forget_gate_bias if "bias_ih" in name else 0.0
                    parameter[hidden : 2 * hidden] = forget_bias
                parameter *= cfg.weights_init_scale

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple:
        """(B, T, input_size) and two (layers, B, H) -> (B, T, H) and those after the last frame."""
        before = [None] * len(self.layers)
        if state is not None:
            before = zip(*(s.split(1) for s in state), strict=True)
        after = []
        x = x.transpose(0, 1).contiguous()  # (T, B, input_size)
        for layer, layer_state in zip(self.layers, before, strict=True):
            x, layer_state = layer(x, layer_state)
            x = self.dropout(x)
            after.append(layer_state)
        h, c = (torch.cat(layer_states) for layer_states in zip(*after, strict=True))
        return self.layer_norm(x).transpose(0, 1), (h, c)


class StackTime(nn.Module):
    """Concatenates every `factor` frames into one; a last incomplete group is filled with 0."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T_in, H), (B,) -> (B, T, factor*H), (B,) with T = ceil(T_in / factor)."""
        B, T_in, H = x.shape
        if T_in % self.factor:  # F.pad copies, be there anything to add or not
            x = F.pad(x, (0, 0, 0, -T_in % self.factor))
        return x.reshape(B, -1, self.factor * H), (lens + self.factor - 1) // self.factor


# ------------------------------------------------------------------------------- the networks


class Encoder(nn.Module):
    """Transcription network of Graves (2012), unidirectional, with StackTime in the middle."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        H = cfg.enc_hidden
        self.feature_norm = FeatureNorm(cfg.feature_size) if cfg.normalization else None
        self.pre = LstmStack(cfg.feature_size, H, cfg.pre_layers, cfg.enc_dropout, cfg)
        self.stack_time = StackTime(cfg.stack)
        self.post = LstmStack(cfg.stack * H, H, cfg.post_layers, cfg.enc_dropout, cfg, WideLstm)

    def forward(self, feats: Tensor, feat_lens: Tensor,
                moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T_in, D), (B,) -> (B, T, H), (B,)."""
        x = feats
        if self.feature_norm is not None:
            x = self.feature_norm(x, feat_lens, moments)  # (B, T_in, D)
        x, _ = self.pre(x)  # (B, T_in, H)
        # StackTime may put padding frames beside the last valid ones: they must hold zeros, as
        # they do for an utterance alone, not what the LSTM and LayerNorm made of padding.
        x = x.masked_fill(~valid_frames(feat_lens, x.shape[1])[:, :, None], 0.0)
        x, enc_lens = self.stack_time(x, feat_lens)  # (B, T, stack*H)
        x, _ = self.post(x)  # (B, T, H)
        return x, enc_lens


class Predictor(nn.Module):
    """Prediction network of Graves (2012): an LSTM over the labels emitted so far.

    The history starts with an all-zero embedding, so blank needs no embedding row.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(cfg.vocab_size - 1, cfg.pred_hidden)
        self.rnn = LstmStack(
            cfg.pred_hidden, cfg.pred_hidden, cfg.pred_layers, cfg.pred_dropout, cfg
        )

    def forward(self, targets: Tensor) -> Tensor:
        """(B, U) labels -> (B, U+1, H): the output before any label, then after each one."""
        # Padding may hold any value, the blank's included, which has no row in the embedding.
        labels = targets.clamp(0, self.embed.num_embeddings - 1)
        history = F.pad(self.embed(labels), (0, 0, 1, 0))  # (B, U+1, H)
        return self.rnn(history)[0]

    def step(self, labels: Tensor, state: tuple[Tensor, Tensor]) -> tuple:
        """One label an utterance: (B,) and a state (layers, B, H) each -> (B, H), new state."""
        x, state = self.rnn(self.embed(labels)[:, None], state)  # (B, 1, H)
        return x[:, 0], state

    def start(self, batch: int) -> tuple:
        """Output (B, H) and state before the first label."""
        x, state = self.rnn(self.embed.weight.new_zeros(batch, 1, self.embed.embedding_dim))
        return x[:, 0], state


class Joint(nn.Module):
    """Joint network: linear(dropout(relu(encoder projection + predictor projection)))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.encoder_projection = nn.Linear(cfg.enc_hidden, cfg.joint_hidden)
        self.predictor_projection = nn.Linear(cfg.pred_hidden, cfg.joint_hidden)
        self.dropout = Dropout(cfg.joint_dropout)
        self.output = nn.Linear(cfg.joint_hidden, cfg.vocab_size)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """(..., J) and (..., J) that broadcast -> logits (..., V), not normalised."""
        return self.output(self.dropout(F.relu(encoded + predicted)))


class Transducer(nn.Module):
    """The whole model. `encode` and `predict` end in the joint space (J).

    That leaves the joint network with one broadcast addition and one matrix product, the form
    that loss.joint_transducer_loss takes.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.predictor = Predictor(cfg)
        self.joint_network = Joint(cfg)

    def num_frames(self, feat_lens: Tensor) -> Tensor:
        """Encoder frames of utterances of `feat_lens` input frames: (B,) -> (B,)."""
        return (feat_lens + self.cfg.reduction - 1) // self.cfg.reduction

    def encode(self, feats: Tensor, feat_lens: Tensor,
               moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, T_in, D), (B,) -> (B, T, J), (B,). For `moments` see FeatureNorm."""
        assert feats.dim() == 3, feats.shape
        assert feats.shape[2] == self.cfg.feature_size, feats.shape
        x, enc_lens = self.encoder(feats, feat_lens, moments)  # (B, T, H)
        return self.joint_network.encoder_projection(x), enc_lens

    def predict(self, targets: Tensor) -> Tensor:
        """(B, U) -> (B, U+1, J)."""
        assert targets.dim() == 2, targets.shape
        return self.joint_network.predictor_projection(self.predictor(targets))

    def joint(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """(B, T, J), (B, U+1, J) -> logits (B, T, U+1, V). For small sizes: see loss.py."""
        return self.joint_network(encoded[:, :, None], predicted[:, None])

    def forward(self, feats: Tensor, feat_lens: Tensor, targets: Tensor,
                moments: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder and predictor outputs for the loss: (B, T, J), (B,), (B, U+1, J)."""
        encoded, enc_lens = self.encode(feats, feat_lens, moments)
        return encoded, enc_lens, self.predict(targets)
