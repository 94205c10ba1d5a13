"""One rule per kind of read: how an input and an output gradient give a parameter's samples.

In: one call of a torch function, or of a user's module. Out: d and a, tokens, a vector or G.
May import: linalg and errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kronecker_probe.gradients.layers.base import Rule
from kronecker_probe.gradients.layers.convolution import CONVOLUTIONS
from kronecker_probe.gradients.layers.embedding import EmbeddingRule
from kronecker_probe.gradients.layers.linear import LinearRule
from kronecker_probe.gradients.layers.normalization import NORMALIZATIONS

# Modules end in these functions, and so do models that call them on a weight of their own.
RULES: dict[Callable[..., Any], Rule] = {
    rule.function: rule for rule in (LinearRule(), EmbeddingRule(), *CONVOLUTIONS, *NORMALIZATIONS)
}
