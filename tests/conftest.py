"""Shared fixtures, and a hypothesis profile that draws the same examples on every machine."""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import pytest
import torch

for name, count in {"default": 25, "full": 100}.items():  # full: with the grid, HYPOTHESIS_PROFILE
    hypothesis.settings.register_profile(
        name, deadline=None, derandomize=True, max_examples=count, database=None
    )
hypothesis.settings.register_profile(  # a search for new counterexamples: HYPOTHESIS_PROFILE=...
    "explore", deadline=None, derandomize=False, max_examples=1000, print_blob=True
)
# Matrices here are tiny: threads cost more than they give, and tenfold on a busy machine.
torch.set_num_threads(1)
os.environ["COLUMNS"] = "200"  # what the command line prints is not cut, by whatever runs the tests
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20240617)
