"""Which parameters a polar factor is for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kronecker_probe.errors import InvalidInputError, unknown_name
from kronecker_probe.optim.presets import ADAM

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def hidden_groups(
    model: nn.Module, adam_lr: float = 1e-3, head: str | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for :func:`Muon`: hidden matrices, and all others with Adam.

    Hidden are matrices, as m x n with m and n above 1, but for embeddings and the head (Jordan et
    al., 2024): the sizes of their rows say how often a token occurs, which a polar factor would
    undo. An embedding that another module shares is the head, too.

    Args:
        model: Its parameters that require a gradient are split.
        adam_lr: Learning rate of Adam.
        head: Name of the head's weight; None for the last matrix that the model registers, unless
            an embedding is shared.

    Returns:
        Two groups: ``Muon(hidden_groups(model), lr=0.02)``.

    Raises:
        InvalidInputError: The model has no hidden matrix, or no parameter of the name ``head``.
    """
    named = dict(model.named_parameters())
    if head is not None and head not in named:
        raise unknown_name("head", head, named)
    embeddings, shared = _embeddings(model)
    matrices = [name for name, p in named.items() if _is_matrix(p) and id(p) not in embeddings]
    if head is None and not shared and matrices:
        head = matrices[-1]
    wanted = [(name, p) for name, p in named.items() if p.requires_grad]
    hidden = [(name, p) for name, p in wanted if name in matrices and name != head]
    if not hidden:
        last = head or "a shared embedding"
        raise InvalidInputError(
            f"The model has {len(matrices)} matrices besides embeddings, and {last} "
            "is the head: none is hidden, and Muon has nothing to do. Use another preset, such as "
            "SOAP."
        )
    names = {name for name, _ in hidden}
    others = [(name, p) for name, p in wanted if name not in names]
    return [{"params": hidden}, {"params": others, "lr": adam_lr, **ADAM}]


def _embeddings(model: nn.Module) -> tuple[set[int], bool]:
    """The weights of embeddings, and whether another module shares one of them."""
    modules = list(model.modules())
    held = {id(m.weight) for m in modules if isinstance(m, _EMBEDDINGS)}
    others = [m for m in modules if not isinstance(m, _EMBEDDINGS)]
    return held, any(id(p) in held for m in others for p in m.parameters(recurse=False))


def _is_matrix(param: Tensor) -> bool:
    return param.ndim > 1 and len(param) > 1 and param.numel() > len(param)
