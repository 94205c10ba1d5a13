"""A large embedding: what needs no V x V matrix is measured, the rest says that it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import MemoryBudgetError, UnsupportedError
from kronecker_probe.operators.second_moment import planner
from kronecker_probe.operators.second_moment.routes import one_sided

V, D, N, T = 4000, 4, 12, 3
FREE = 3e8  # bytes: a few V x V matrices do not fit
SAME = 1e-12  # the same float64 sums, in another order
FITTING = ["right-only", "diagonal", "identity"]
LARGE = ["optimal", "shampoo-squared", "shampoo", "eigen-corrected", "left-only"]


@pytest.fixture
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planner, one_sided):
        monkeypatch.setattr(module, "available_bytes", lambda device: FREE)


def embedding() -> kp.GradientSamples:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (N, T), generator=generator)
    d = torch.randn(N, 1, T, D, generator=generator, dtype=torch.float64)
    return kp.GradientSamples.from_embedding(tokens, d, V)


def matrices() -> Tensor:
    """G, [N, V, D]."""
    return embedding().matrices()[:, 0]


@pytest.mark.usefixtures("_little_memory")
def test_what_needs_no_large_matrix_is_exact() -> None:
    H, G = kp.SecondMoment(embedding()), matrices()
    assert H.plan().route == "one-sided"
    assert "one-sided" in str(H.plan())
    gram = torch.einsum("imn,jmn->ij", G, G)
    assert H.norm() == pytest.approx(float(gram.square().mean().sqrt()), rel=SAME)
    assert H.trace() == pytest.approx(float(gram.diagonal().mean()), rel=SAME)
    right = torch.einsum("imn,imk->nk", G, G) / N
    torch.testing.assert_close(H.right_factor.matrix, right, rtol=SAME, atol=SAME)
    torch.testing.assert_close(H.diagonal(), G.square().mean(0), rtol=SAME, atol=SAME)
    forms = torch.einsum("imn,nk,imk->i", G, right, G)
    torch.testing.assert_close(H.quadratic_forms(None, right), forms, rtol=SAME, atol=SAME)
    P = kp.approximate(H, "right-only")
    expected = float((right * right).sum()) / (V**0.5 * float(right.norm()) * H.norm())
    assert kp.cosine_similarity(H, P) == pytest.approx(expected, rel=SAME)


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize("name", LARGE)
def test_what_needs_one_is_refused_with_what_works(name: str) -> None:
    told = f"left side of this {V} x {D} layer.*norm, trace, diagonal and right factor"
    with pytest.raises(MemoryBudgetError, match=told):
        kp.approximate(kp.SecondMoment(embedding()), name)


@pytest.mark.usefixtures("_little_memory")
def test_kfac_has_its_own_reason() -> None:
    with pytest.raises(UnsupportedError, match="K-FAC needs"):
        kp.approximate(kp.SecondMoment(embedding()), "kfac")


@pytest.mark.usefixtures("_little_memory")
def test_a_wide_layer_keeps_its_left_factor() -> None:
    G = matrices().mT.contiguous()
    H = kp.SecondMoment(kp.GradientSamples.from_matrices(G))
    assert H.plan().route == "one-sided"
    left = torch.einsum("imn,ikn->mk", G, G) / N
    torch.testing.assert_close(H.left_factor.matrix, left, rtol=SAME, atol=SAME)
    for asked in (lambda: H.right_factor, lambda: H.kronecker_spectrum(2)):
        with pytest.raises(MemoryBudgetError):
            asked()


@pytest.mark.usefixtures("_little_memory")
def test_the_other_layers_of_a_comparison_are_measured() -> None:
    small = kp.GradientSamples.from_factors(torch.randn(N, 4), torch.randn(N, 5))
    names = [*LARGE, *FITTING]
    table = kp.compare({"large": embedding(), "small": small}, names, estimates="plugin").table
    cosines = table[table["metric"] == "cosine"].set_index(["parameter", "approximation"])
    for name in names:
        assert cosines.loc[("small", name), "value"] > 0
        one = cosines.loc[("large", name)]
        assert (one["value"] > 0) == (name in FITTING)
        assert name in FITTING or "do not fit" in one["note"]


@pytest.mark.usefixtures("_little_memory")
def test_an_operator_of_the_caller_is_scored() -> None:
    left = 1 + torch.arange(V, dtype=torch.float64)
    P = kp.KroneckerOperator(left.diag(), torch.eye(D, dtype=torch.float64))
    expected = float((matrices().square().mean(0).sum(1) * left).sum())
    assert kp.SecondMoment(embedding()).inner(P) == pytest.approx(expected, rel=SAME)
    table = kp.compare(
        {"large": embedding()}, FITTING, estimates="plugin", extra={"large": {"mine": P}}
    ).table
    assert (table.loc[table["metric"] == "cosine", "value"] > 0).all()


@pytest.mark.usefixtures("_little_memory")
def test_a_tracked_run_goes_on(tmp_path: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(V, D), nn.Linear(D, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.table(tokens).mean(1))

    model, loss_fn = Bag(), nn.CrossEntropyLoss()
    batch = torch.randint(V, (N, T)), torch.arange(N) % 3
    tracker = kp.Tracker(model, loss_fn, out=tmp_path / "run", every=1, estimates="plugin")
    for _ in range(2):
        model.zero_grad()
        loss_fn(model(batch[0]), batch[1]).backward()
        tracker.step(batch)
    table = tracker.table.query("metric == 'cosine'").set_index(
        ["step", "parameter", "approximation"]
    )
    for step in range(2):
        assert table.loc[(step, "out.weight", "optimal"), "value"] > 0
        assert table.loc[(step, "table.weight", "diagonal"), "value"] > 0
        assert "do not fit" in table.loc[(step, "table.weight", "optimal"), "note"]


def test_samples_that_fit_in_no_way_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "available_bytes", lambda device: 1e6)
    with pytest.raises(MemoryBudgetError, match=f"EmbeddingSamples.{V} x {D}.*samples.block"):
        kp.SecondMoment(embedding())
