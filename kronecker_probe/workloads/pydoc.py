"""A small GPT on the text of Python's own bundled reference: bytes, no download."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kronecker_probe.workloads.registry import register_workload
from kronecker_probe.workloads.workload import Pair, Workload

BYTES = 256  # the vocabulary
CONTEXT = 64  # length of a window: a byte is predicted from at most so many before it
WIDTH, HEADS, BLOCKS = 64, 4, 2
TEST_SHARE = 0.1


@register_workload("pydoc-gpt")
def pydoc_gpt(seed: int) -> Workload:
    """A GPT of two blocks that predicts the next byte of Python's help texts.

    The texts come with the interpreter (``pydoc_data.topics``), so their number and wording, and
    with them the exact loss, depend on the version of Python.
    """
    train, test = _windows()
    return Workload(
        GPT(),
        next_byte_loss,
        train,
        test,
        steps=1200,
        batch_size=16,
        lr=1e-3,
        description=f"GPT of {BLOCKS} blocks, width {WIDTH}, on the bytes of Python's help texts "
        f"({len(train[0])} windows of {CONTEXT})",
        threads=1,
        target="fisher",
        layers=("*weight",),
    )


def next_byte_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of ``outputs`` [N, T, 256] at ``targets`` [N, T]."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _windows() -> tuple[Pair, Pair]:
    """Disjoint windows; the test set is the end of the text, which training never sees."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(text), dtype=torch.int64)
    count = (len(data) - 1) // CONTEXT
    inputs = data[: count * CONTEXT].view(count, CONTEXT)
    targets = data[1 : count * CONTEXT + 1].view(count, CONTEXT)
    train = count - int(TEST_SHARE * count)
    return (inputs[:train], targets[:train]), (inputs[train:], targets[train:])


class GPT(nn.Module):
    """Tokens [N, T] to logits [N, T, 256]: pre-norm blocks, learned positions, untied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each position."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class Block(nn.Module):
    """Causal self-attention and a GELU network, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] to the same."""
        x = x + self.out(self._attention(self.qkv(self.norm1(x))))
        added: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + added

    def _attention(self, qkv: Tensor) -> Tensor:
        count, length, _ = qkv.shape
        split = qkv.view(count, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind()
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return mixed.transpose(1, 2).reshape(count, length, WIDTH)
