# SPDX-License-Identifier: Apache-2.0
"""A tiny model of the original system and its outputs, under this project's names.

The original's own modules (intel/e2eAIOK, modelzoo/rnnt/pytorch), executed on random weights and
features, wrote the files in ../shared/oracles/seedrun. test_oracles.py uses this module.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from model import ModelConfig, Transducer

FOLDER = Path(__file__).parents[2] / "shared" / "oracles" / "seedrun"

# Maps modules of the original to ours. Linear and Embedding have the same parameters in both; the
# original's `weight_ih_l<k>` of LSTM layer k is `layers.<k>.weight_ih_l0` in ours.
MODULES = {
    "encoder.pre_rnn.lstm": "encoder.pre",
    "encoder.post_rnn.lstm": "encoder.post",
    "prediction.embed": "predictor.embed",
    "prediction.dec_rnn.lstm": "predictor.rnn",
    "joint_enc": "joint_network.encoder_projection",
    "joint_pred": "joint_network.predictor_projection",
    "joint_net.2": "joint_network.output",  # 0 is the ReLU, 1 the dropout
}


@cache
def facts() -> dict:
    return json.loads((FOLDER / "seed_model_golden.json").read_text(encoding="utf-8"))


@cache
def arrays() -> dict[str, torch.Tensor]:
    with np.load(FOLDER / "seed_model_golden.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def our_name(original: str) -> str | None:
    """Our name of a parameter of the original, None for an array that is no parameter."""
    module, _, parameter = original.rpartition(".")
    if module.endswith(".lstm"):
        parameter, _, layer = parameter.rpartition("_l")
        parameter = f"layers.{layer}.{parameter}_l0"
    return f"{MODULES[module]}.{parameter}" if module in MODULES else None


def by_our_names(prefix: str) -> dict[str, torch.Tensor]:
    """Returns all arrays `<prefix><original name>` under our parameter names."""
    named = {our_name(key.removeprefix(prefix)): value for key, value in arrays().items()
             if key.startswith(prefix)}
    named.pop(None, None)
    return named


def config(**changes) -> ModelConfig:
    cfg = facts()["cfg"]
    values = dict(
        feature_size=cfg["in_feats"], vocab_size=cfg["n_classes"], enc_hidden=cfg["enc_n_hid"],
        pre_layers=cfg["enc_pre_rnn_layers"], stack=cfg["enc_stack_time_factor"],
        post_layers=cfg["enc_post_rnn_layers"], pred_hidden=cfg["pred_n_hid"],
        pred_layers=cfg["pred_rnn_layers"], joint_hidden=cfg["joint_n_hid"],
        normalization=cfg["normalization"], forget_gate_bias=cfg["forget_gate_bias"],
    )
    return ModelConfig(**{**values, **changes})


def model(prefix: str) -> Transducer:
    """Our model with the original's weights, in evaluation mode like the original."""
    ours = Transducer(config())
    ours.load_state_dict(by_our_names(prefix))
    return ours.eval()


def features(prefix: str, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, T_in, D) and lengths for which our model repeats the original's numbers.

    The original's LSTM runs on over padding, and its StackTime puts the outputs beside the last
    valid frames, where ours puts zeros. So the lengths are rounded up to a multiple of the
    factor: the last incomplete group counts as valid as far as the batch reaches, and the number
    of encoder frames stays the same.
    """
    x = arrays()[f"{prefix}x"].transpose(0, 1)  # the original is time-first
    lens = arrays()[f"{prefix}x_lens"]
    return x, (-(-lens // factor) * factor).clamp_max(x.shape[1])
