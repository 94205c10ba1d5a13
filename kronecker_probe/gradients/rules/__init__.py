"""Which torch functions have an exact rule for the gradients of the parameters that they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kronecker_probe.gradients.rules.base import Rule
from kronecker_probe.gradients.rules.convolution import CONVOLUTIONS
from kronecker_probe.gradients.rules.embedding import EmbeddingRule
from kronecker_probe.gradients.rules.linear import LinearRule
from kronecker_probe.gradients.rules.normalization import NORMALIZATIONS

# Modules end in these functions, and so do models that call them on a weight of their own.
RULES: dict[Callable[..., Any], Rule] = {
    rule.function: rule for rule in (LinearRule(), EmbeddingRule(), *CONVOLUTIONS, *NORMALIZATIONS)
}
