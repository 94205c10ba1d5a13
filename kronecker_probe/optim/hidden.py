"""Which parameters a polar factor is for."""

from __future__ import annotations

from typing import Any

from torch import nn

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.presets import ADAM

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def hidden_groups(model: nn.Module, adam_lr: float = 1e-3) -> list[dict[str, Any]]:
    """Parameter groups for :func:`Muon`: hidden matrices, and all others with Adam.

    Hidden are weights of two and more dimensions but for embeddings and the head, the last such
    weight of the model (Jordan et al., 2024): the sizes of their rows say how often a token occurs,
    which a polar factor would undo.

    Args:
        model: Its parameters that require a gradient are split.
        adam_lr: Learning rate of Adam.

    Returns:
        Two groups: ``Muon(hidden_groups(model), lr=0.02)``.

    Raises:
        InvalidInputError: The model has no hidden matrix.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, _EMBEDDINGS) for p in [m.weight]}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.ndim > 1 and id(p) not in embeddings]
    hidden = matrices[:-1]
    if not hidden:
        raise InvalidInputError(
            f"The model has {len(matrices)} matrices besides embeddings, of which the last is the "
            "head: none is hidden, and Muon has nothing to do. Use another preset, such as SOAP."
        )
    names = {name for name, _ in hidden}
    others = [(name, p) for name, p in named if name not in names]
    return [{"params": hidden}, {"params": others, "lr": adam_lr, **ADAM}]
