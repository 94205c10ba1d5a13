"""A step over many equal blocks: one batch, against a Python loop over the blocks.

The loop is Shampoo with Adam grafting written in plain torch calls, with as few of them as it
takes; both give the same weights. The floor is the four batched products of a step alone (which are
too small for half of a symmetric one to be left out), and one AdamW step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.timing import device, environment, interleaved, paired_ratio
from kronecker_probe import optim

BLOCKS, SIZE = 16, 64  # 16 x 16 blocks of 64 x 64
BETA1, BETA2, EPSILON, LR = 0.9, 0.999, 1e-8, 1e-4
FREQUENCY = 1000  # after the first refresh every step is a plain one


class Loop:
    """Blocks [b, b] of a matrix, each with tensors of its own."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.step_count = 0
        self.blocks = [
            tuple(like.clone() for like in (torch.zeros(SIZE, SIZE, device=weight.device),) * 4)
            for _ in range(BLOCKS**2)
        ]
        eye = torch.eye(SIZE, device=weight.device)
        self.roots = [(eye.clone(), eye.clone()) for _ in self.blocks]

    def step(self, gradient: Tensor) -> None:
        self.step_count += 1
        corrections = 1 - BETA1**self.step_count, 1 - BETA2**self.step_count
        for k, (L, R, M, v) in enumerate(self.blocks):
            row, column = divmod(k, BLOCKS)
            place = (
                slice(row * SIZE, (row + 1) * SIZE),
                slice(column * SIZE, (column + 1) * SIZE),
            )
            G = gradient[place]
            L.addmm_(G, G.T, beta=BETA2, alpha=1 - BETA2)
            R.addmm_(G.T, G, beta=BETA2, alpha=1 - BETA2)
            v.mul_(BETA2).addcmul_(G, G, value=1 - BETA2)
            M.lerp_(G, 1 - BETA1)
            if self.step_count == 1:
                self.roots[k] = _root(L / corrections[1]), _root(R / corrections[1])
            left, right = self.roots[k]
            U = left @ M @ right
            graft = M / (v / corrections[1]).sqrt_().add_(EPSILON)
            length = torch.linalg.vector_norm(graft) / torch.linalg.vector_norm(U)
            self.weight[place].sub_(U.mul_(length * (LR / corrections[0])))


def _root(A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * (values.clamp_min(0) + EPSILON).pow(-0.25)) @ vectors.T


def products(gradient: Tensor) -> Tensor:
    """Those of one step."""
    blocks = gradient.view(BLOCKS, SIZE, BLOCKS, SIZE).transpose(1, 2).reshape(-1, SIZE, SIZE)
    torch.bmm(blocks, blocks.mT)
    torch.bmm(blocks.mT, blocks)
    return torch.bmm(torch.bmm(blocks, blocks), blocks)


def main() -> None:
    on = device()
    torch.manual_seed(0)
    start = torch.randn(BLOCKS * SIZE, BLOCKS * SIZE, device=on)
    gradient = torch.randn_like(start)
    ours, adam = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.grad = adam.grad = gradient
    loop = Loop(start.clone())
    batched = optim.Shampoo(
        [ours],
        lr=LR,
        betas=(BETA1, BETA2),
        epsilon=EPSILON,
        basis={"start": 1, "frequency": FREQUENCY},
        shapes={"block_size": SIZE},
    )
    adamw = torch.optim.AdamW([adam], lr=LR)
    times = interleaved(
        {
            "batch": batched.step,
            "loop": lambda: loop.step(gradient),
            "products": lambda: products(gradient),
            "AdamW": adamw.step,
        },
        repetitions=15,
        warmup=2,
    )
    moved = torch.linalg.norm(ours.detach() - start)
    difference = float(torch.linalg.norm(ours.detach() - loop.weight) / moved)
    floor = times["products"].median + times["AdamW"].median
    print(f"{BLOCKS**2} blocks of {SIZE} x {SIZE}; {environment()}")
    print(f"  a step in one batch          {1e3 * times['batch'].median:8.2f} ms")
    print(f"  a loop over the blocks       {1e3 * times['loop'].median:8.2f} ms")
    print(f"  loop / batch                 {paired_ratio(times['loop'], times['batch']):8.2f}")
    print(f"  batch / (products + AdamW)   {times['batch'].median / floor:8.2f}")
    print(f"  relative difference of the weights' moves {difference:.1e}")


if __name__ == "__main__":
    main()
