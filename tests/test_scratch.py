"""Memory that steps use again: no step sees what another left there."""

from __future__ import annotations

import pytest
import torch

from kronecker_probe.optim.blocks import scratch
from kronecker_probe.optim.blocks.scratch import Scratch
from tests.optimizer_cases import PRESETS


def test_memory_is_kept_by_name_and_dtype_and_grows() -> None:
    held = Scratch()
    like = torch.zeros(1)
    first = held.take("a", (3, 2), like)
    assert held.take("a", (2, 2), like).data_ptr() == first.data_ptr()
    assert held.take("b", (3, 2), like).data_ptr() != first.data_ptr()
    assert held.take("a", (3, 2), like.double()).dtype == torch.float64
    assert held.take("a", (9, 9), like).shape == (9, 9)


def test_large_tensors_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_LARGEST", 16)
    held = Scratch()
    like = torch.zeros(1)
    kept = held.take("a", (4,), like)
    assert held.take("a", (4,), like).data_ptr() == kept.data_ptr()
    assert held.take("a", (5,), like).data_ptr() != held.take("a", (5,), like).data_ptr()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("block_size", [None, 3])
def test_steps_are_those_without_memory_of_other_steps(
    name: str, block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage in the scratch memory before every use changes nothing."""

    def run(*, spoiled: bool) -> list[torch.Tensor]:
        if spoiled:
            take = Scratch.take

            def spoil(self: Scratch, *arguments: object) -> torch.Tensor:
                return take(self, *arguments).fill_(torch.nan)  # type: ignore[arg-type]

            monkeypatch.setattr(Scratch, "take", spoil)
        torch.manual_seed(0)
        shapes = [(6, 4), (6, 4), (3, 2, 2), (5,), (6, 7)]
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = PRESETS[name](params, shapes={"block_size": block_size})
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            for k, param in enumerate(params):
                param.grad = torch.randn(param.shape, generator=generator) if k != step else None
            optimizer.step()
        return [param.detach() for param in params]

    plain, spoiled = run(spoiled=False), run(spoiled=True)
    for one, other in zip(plain, spoiled, strict=True):
        assert torch.equal(one, other)
