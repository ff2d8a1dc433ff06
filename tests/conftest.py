# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several test files."""

import pytest
import torch
from tones import tiny_corpus


@pytest.fixture(autouse=True)
def _restore_torch():
    """Programs that run in the process of the tests change these settings for good, and draw random
    numbers, which must not depend on the tests before."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def float64():
    """New tensors have 64 bits, so that equal results differ by small rounding errors only."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A corpus of tones, which tests must not change."""
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))
