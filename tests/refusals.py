"""A capture that would succeed, and what is said when one thing about it is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F

import kronecker_probe as kp
from kronecker_probe.errors import KroneckerProbeError
from tests.small_models import SMALL_MODELS

INPUTS, LABELS = SMALL_MODELS["2-D"].batch("cross-entropy")
VALUES = SMALL_MODELS["2-D"].batch("mse")[1]
MODEL = SMALL_MODELS["2-D"].model()


def refused(error: type[KroneckerProbeError], *words: str, **given: Any) -> str:
    """The message of the refusal; ``given`` replaces what a good call gets."""
    call: dict[str, Any] = {"model": MODEL, "loss_fn": F.cross_entropy, "data": (INPUTS, LABELS)}
    with pytest.raises(error) as caught:
        kp.capture(**(call | given))
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message
