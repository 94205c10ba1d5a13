"""Muon on hidden matrices, Adam on the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, UnknownNameError

# One formula in another order of operations, float64
SAME = 1e-12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.inner(self.tokens(x)))))  # type: ignore[no-any-return]


def test_embeddings_head_and_vectors_have_adam() -> None:
    hidden, others = optim.hidden_groups(Net(), adam_lr=0.5)
    assert [name for name, _ in hidden["params"]] == ["inner.weight"]
    assert {name for name, _ in others["params"]} == {
        "tokens.weight", "inner.bias", "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert others["lr"] == 0.5


def test_the_others_step_as_adam_does_and_the_hidden_ones_as_muon() -> None:
    torch.manual_seed(0)
    model, twin = Net().double(), Net().double()
    twin.load_state_dict(model.state_dict())
    mine = optim.Muon(optim.hidden_groups(model, adam_lr=1e-2), lr=1e-3)
    own = [p for name, p in twin.named_parameters() if name != "inner.weight"]
    adam = torch.optim.Adam(own, lr=1e-2)
    muon = optim.Muon([twin.inner.weight], lr=1e-3)
    x, y = torch.arange(7), torch.arange(7).roll(1)
    for _ in range(5):
        for net, optimizers in ((model, [mine]), (twin, [adam, muon])):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            for one in optimizers:
                one.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=SAME, atol=SAME)


def test_a_model_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"has 1 matrices .* none is hidden"):
        optim.hidden_groups(nn.Linear(3, 2))


def test_a_tracker_scores_what_each_of_several_optimizers_holds() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizers = [optim.Muon([model[0].weight]), torch.optim.AdamW([model[4].weight])]
    batch = torch.randn(16, 6), torch.arange(16) % 3
    loss = nn.CrossEntropyLoss()
    tracker = kp.Tracker(model, loss, optimizer=optimizers, every=2, metrics=["cosine"])
    for _ in range(3):
        for one in optimizers:
            one.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        tracker.step(batch)
        for one in optimizers:
            one.step()
    tracker.finish(batch)
    rows = tracker.table.query("approximation == 'in-use' and step == 3")
    scored = rows[rows["value"].notna()]["parameter"].unique()
    assert sorted(scored) == ["0.weight", "4.weight"]
    note = rows[rows["parameter"] == "2.weight"]["note"].iloc[0]
    assert "no optimizer of the tracker's holds it" in note


def test_a_tracker_refuses_what_is_no_optimizer() -> None:
    with pytest.raises(InvalidInputError, match="optimizer= of type str"):
        kp.Tracker(nn.Linear(3, 2), nn.MSELoss(), optimizer=["adamw"])  # type: ignore[list-item]


def hidden_of(model: nn.Module, **options: str) -> list[str]:
    return [name for name, _ in optim.hidden_groups(model, **options)[0]["params"]]  # type: ignore[arg-type]


def test_which_weight_is_the_head() -> None:
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 7))
    tied[3].weight = tied[0].weight
    assert hidden_of(tied) == ["1.weight", "2.weight"]
    frozen = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    frozen[2].weight.requires_grad_(False)
    assert hidden_of(frozen) == ["0.weight", "1.weight"]
    assert hidden_of(frozen, head="0.weight") == ["1.weight"]
    with pytest.raises(UnknownNameError, match="head"):
        optim.hidden_groups(frozen, head="3.weight")


def test_tokens_and_positions_are_no_matrices() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 4)))
    model.register_parameter("positions", nn.Parameter(torch.zeros(1, 9, 4)))
    assert hidden_of(model) == ["0.weight", "1.weight"]
