"""What the tracker says of an optimizer's factors, beside states whose spectra are known."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import kronecker_probe as kp
from kronecker_probe.findings.codes import Remedy
from kronecker_probe.optim import KroneckerOptimizer
from kronecker_probe.optim.presets import PRESETS
from kronecker_probe.tracking.optimizer_state.factors import factor_rows, inside_rows
from kronecker_probe.tracking.tracker import Tracker

CHAIN = (
    "in_use_fresh",
    "in_use_blocking",
    "in_use_statistics",
    "in_use_damping",
    "in_use_staleness",
)
TOLERANCE = 1e-6  # float32 state, float64 metrics
ONCE = {"start": 1, "frequency": 10}
JUNK = "directions below rounding"


def stepped(name: str, gradients: list[torch.Tensor], **options: Any) -> KroneckerOptimizer:
    """A preset after steps with given gradients of one parameter."""
    param = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = PRESETS[name]([param], lr=0.0, **options)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
    return optimizer


def rows_of(optimizer: KroneckerOptimizer) -> dict[tuple[str, int], float]:
    param = optimizer.param_groups[0]["params"][0]
    rows = factor_rows(optimizer.inspect(param).factors)
    return {(row["metric"], row["index"]): row["value"] for row in rows}


def test_the_factors_are_those_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(5, 3, generator=generator)
    optimizer = stepped("shampoo", [gradient], basis=ONCE)
    found = optimizer.inspect(optimizer.param_groups[0]["params"][0])
    left, right = found.factors
    torch.testing.assert_close(left.factor, gradient @ gradient.T)
    torch.testing.assert_close(right.factor, gradient.T @ gradient)
    assert (left.side, right.side, left.block, left.staleness, left.refreshes) == (0, 1, 0, 0, 1)
    assert found.rule == "shampoo"
    assert found.block_size is None


def test_an_inspection_prints_what_is_held() -> None:
    optimizer = stepped("shampoo", [torch.ones(5, 3)], basis=ONCE)
    told = repr(optimizer.inspect(optimizer.param_groups[0]["params"][0]))
    assert "of shape [5, 3], step 1: shampoo" in told
    assert "side 0: 5 rows in torch.float32, refreshed 0 steps ago, 1 refreshes" in told


def test_a_large_factor_has_both_triangles() -> None:
    """From a side on the optimizer computes half of the symmetric product only."""
    gradient = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    optimizer = stepped("shampoo", [gradient], basis={"start": 9, "frequency": 9})
    found = optimizer.inspect(optimizer.param_groups[0]["params"][0])
    torch.testing.assert_close(found.factors[0].factor, gradient @ gradient.T)
    assert found.factors[0].staleness is None


def test_the_numbers_of_a_known_spectrum() -> None:
    """G = diag(2, 1, 0, 0): eigenvalues 4, 1, 0, 0 with the root of exponent -1/4."""
    gradient = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0]))
    rows = rows_of(stepped("shampoo", [gradient], basis=ONCE, epsilon=1e-4))
    for side in (0, 1):
        assert rows["factor_rank", side] == 2
        assert rows["factor_stable_rank", side] == pytest.approx(17 / 16)
        assert rows["factor_under_floor", side] == 0.5
        # the median of two resolved eigenvalues is the lower one
        expected = ((1 + 1e-4) / 1e-4) ** 0.25
        assert rows["factor_amplification", side] == pytest.approx(expected, rel=TOLERANCE)
        assert rows["factor_suggested_epsilon", side] == pytest.approx(1.0, rel=TOLERANCE)
        assert rows["steps_since_refresh", side] == 0
    large = rows_of(stepped("shampoo", [gradient], basis=ONCE, epsilon=2.0))
    assert ("factor_suggested_epsilon", 0) not in large  # there is nothing to suggest


def test_a_relative_epsilon_is_suggested_as_one() -> None:
    gradient = torch.diag(torch.tensor([20.0, 10.0, 0.0]))
    spectrum = {"relative": True, "epsilon": 1e-6}
    rows = rows_of(stepped("shampoo", [gradient], basis=ONCE, spectrum=spectrum))
    assert rows["factor_suggested_epsilon", 0] == pytest.approx(0.25, rel=TOLERANCE)
    expected = ((100 + 400e-6) / 400e-6) ** 0.25
    assert rows["factor_amplification", 0] == pytest.approx(expected, rel=TOLERANCE)


def test_corrected_eigenvalues_have_no_epsilon_of_their_factors() -> None:
    gradient = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    rows = rows_of(stepped("eshampoo", [gradient], basis=ONCE))
    assert rows["factor_rank", 0] == 2
    assert ("factor_amplification", 0) not in rows


def test_a_held_basis_that_its_factor_left() -> None:
    """The basis of diag(4, 1, ..) beside a factor that is dense in it."""
    first = torch.diag(torch.tensor([2.0, 1.0]))
    other = torch.tensor([[3.0, 3.0], [3.0, 3.0]])
    optimizer = stepped("eshampoo", [first, other, other], basis=ONCE, betas=(0.9, 0.5))
    rows = rows_of(optimizer)
    kept = [0.5**2, 0.5, 1.0]  # weights of the three squares, up to their sum
    squares = [w * g @ g.T for w, g in zip(kept, [first, other, other], strict=True)]
    A = torch.stack(squares).sum(0)
    expected = math.sqrt(2) * float(A[0, 1]) / float(A.norm())
    assert rows["basis_off_diagonal", 0] == pytest.approx(expected, rel=TOLERANCE)
    assert rows["steps_since_refresh", 0] == 2
    assert rows["refreshes", 0] == 1


def test_of_several_blocks_the_worst_is_told() -> None:
    """Blocks diag(1, 1) and diag(1, 0)."""
    gradient = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    # blocks off the diagonal are zero, of rank 0
    rows = rows_of(stepped("shampoo", [gradient], basis=ONCE, shapes={"block_size": 2}))
    assert rows["factor_rank", 0] == 0
    assert rows["factor_stable_rank", 0] == 0
    assert rows["refreshes", 0] == 1
    assert rows["factor_under_floor", 0] == 1


def test_a_factor_that_is_not_finite_is_noted() -> None:
    optimizer = stepped("shampoo", [torch.ones(2, 2)], basis=ONCE)
    param = optimizer.param_groups[0]["params"][0]
    optimizer.inspect(param).stacks[0].state["factor_0"].fill_(math.nan)
    samples = kp.GradientSamples.from_matrices(torch.ones(1, 2, 2, dtype=torch.float64))
    rows = inside_rows(optimizer, "w", param, samples)
    notes = {row["metric"]: row["note"] for row in rows if row.get("note")}
    assert notes["factor_rank"] == "the factor is not finite"
    assert math.isnan(next(r["value"] for r in rows if r["metric"] == "in_use_statistics"))


# ---------------------------------------------------------------- the split of the error


def tracked(name: str, **options: Any) -> pd.DataFrame:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    loss_fn = nn.CrossEntropyLoss()
    inputs, targets = torch.randn(40, 6), torch.randint(0, 3, (40,))
    optimizer = PRESETS[name](model.parameters(), lr=0.01, **options)
    tracker = Tracker(model, loss_fn, optimizer=optimizer, probe=(inputs, targets), every=[3])
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(model(inputs), targets).backward()
        tracker.step()
        optimizer.step()
    table = tracker.table
    return table[table["parameter"] == "0.weight"]


def values_of(rows: pd.DataFrame) -> dict[str, float]:
    of = rows[rows["metric"].isin(CHAIN)]
    assert of["approximation"].isna().all()
    return dict(zip(of["metric"], of["value"], strict=True))


def in_use_error(rows: pd.DataFrame) -> float:
    live = rows[(rows["approximation"] == "in-use") & (rows["metric"] == "cosine")]
    return 1.0 - float(live.loc[live["kind"] == "plugin", "value"].iloc[0]) ** 2


STALE = {"basis": {"frequency": 2}}


@pytest.mark.parametrize(
    ("name", "options"),
    [("shampoo", STALE), ("shampoo", {**STALE, "shapes": {"block_size": 4}}),
     ("shampoo-squared", {**STALE, "shapes": {"block_size": 4}}), ("kl-shampoo", STALE),
     ("eshampoo", STALE), ("soap", STALE)],
)  # fmt: skip
def test_the_parts_add_up_to_the_error_of_live(name: str, options: dict[str, Any]) -> None:
    rows = tracked(name, **options)
    parts = values_of(rows)
    total = math.fsum(value for value in parts.values() if not math.isnan(value))
    assert total == pytest.approx(in_use_error(rows), rel=TOLERANCE)
    assert ("in_use_blocking" in parts) == ("shapes" in options)
    rules = {"soap": "eigen-corrected", "eshampoo": "eigen-corrected", "kl-shampoo": None}
    plain = rows[(rows["approximation"] == rules.get(name, name)) & (rows["metric"] == "cosine")]
    if len(plain):
        cosine = float(plain.loc[plain["kind"] == "plugin", "value"].iloc[0])
        assert parts["in_use_fresh"] == pytest.approx(1 - cosine**2, rel=TOLERANCE)
    else:
        assert name == "kl-shampoo"


def test_refreshed_and_undamped_there_is_neither_staleness_nor_damping() -> None:
    basis = {"frequency": 1, "start": 1}
    fresh = values_of(tracked("shampoo", basis=basis, epsilon=1e-12))
    assert abs(fresh["in_use_staleness"]) < 1e-4  # a root in float32
    assert abs(fresh["in_use_damping"]) < 1e-4
    damped = values_of(tracked("shampoo", basis=basis, epsilon=1e-2))
    assert abs(damped["in_use_damping"]) > 1e-3
    assert abs(damped["in_use_staleness"]) < 1e-4


def test_a_missing_link_has_a_note() -> None:
    rows = tracked("eshampoo", **STALE)
    absent = rows[rows["metric"] == "in_use_staleness"].iloc[0]
    assert math.isnan(absent["value"])
    assert "within in_use_statistics" in absent["note"]


def test_others_and_fresh_optimizers_have_no_rows() -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    samples = kp.GradientSamples.from_matrices(torch.ones(1, 2, 2))
    assert inside_rows(torch.optim.AdamW([param]), "w", param, samples) == []
    assert inside_rows(PRESETS["shampoo"]([param], lr=0.1), "w", param, samples) == []
    muon = stepped("muon", [torch.ones(2, 2)])
    assert inside_rows(muon, "w", muon.param_groups[0]["params"][0], samples) == []


# ---------------------------------------------------------------- findings


def finding(rows: list[dict[str, Any]]) -> dict[str, kp.Finding]:
    base = {"parameter": "fc", "m": 4, "n": 4, "n_examples": 100, "n_eff": 100.0, "index": pd.NA}
    cosines = [
        {"step": step, "metric": "cosine", "approximation": "kfac", "value": 0.9,
         "kind": "plugin", "target": "trajectory"}
        for step in (0, 5, 9)
    ]  # fmt: skip
    every = [base | {"approximation": None} | row for row in (*cosines, *rows)]
    return {one.subject: one for one in kp.diagnose(pd.DataFrame(every))}


def inside(metric: str, value: float, step: int = 9, side: int = 1) -> dict[str, Any]:
    return {"metric": metric, "value": value, "step": step, "index": side}


def test_amplified_junk_is_told_with_an_epsilon() -> None:
    rows = [inside("factor_under_floor", 0.4), inside("factor_amplification", 60.0)]
    rows += [inside("factor_suggested_epsilon", 2.5e-6), inside("factor_rank", 6.0)]
    one = finding(rows)[JUNK]
    assert one.parameter == "fc"
    assert one.evidence == {"share": 0.4, "amplification": 60, "suggested_epsilon": 2.5e-6}
    assert one.remedy == Remedy.RAISE_EPSILON
    assert list(one.details["sides"]) == [1]
    assert JUNK not in finding([*rows[:2], rows[3]])
    for place, mild in ((0, 0.05), (1, 3.0)):
        weak = [row | {"value": mild} if k == place else row for k, row in enumerate(rows)]
        assert JUNK not in finding(weak)
    assert JUNK not in finding([row | {"step": 5} for row in rows])
    # 1 of 10: what a softmax has by construction; and 1 of 3
    for share, rank in ((0.1, 9.0), (1 / 3, 2.0)):
        single = [rows[0] | {"value": share}, *rows[1:3], rows[3] | {"value": rank}]
        assert JUNK not in finding(single)


def amplified(epsilon: float, side: int = 1, layer: str = "fc") -> list[dict[str, Any]]:
    values = {"factor_under_floor": 0.4, "factor_amplification": 60.0, "factor_rank": 6.0,
              "factor_suggested_epsilon": epsilon}  # fmt: skip
    return [inside(metric, value, side=side) | {"parameter": layer} for metric, value in
            values.items()]  # fmt: skip


def test_both_factors_of_a_layer_are_one_finding_with_the_larger_epsilon() -> None:
    one = finding([*amplified(2.5e-6, 0), *amplified(4e-5, 1)])[JUNK]
    assert list(one.details["sides"]) == [0, 1]
    assert one.evidence["suggested_epsilon"] == 4e-5
    assert one.details["group"] == (1, "fc", 4e-5)


def test_one_epsilon_serves_all_layers_of_a_group() -> None:
    cosine = {"parameter": "b", "step": 9, "metric": "cosine", "approximation": "kfac",
              "value": 0.9, "kind": "plugin", "target": "trajectory"}  # fmt: skip
    rows = [*amplified(2.5e-6), *amplified(7e-4, layer="b"), cosine]
    columns = ["index", "approximation", "note", "rule"]
    base = [cosine | {"parameter": "fc"}]
    table = pd.DataFrame([*base, *rows]).reindex(
        columns=[*columns, "parameter", "step", "metric", "value", "kind", "target"]
    )
    found = [one for one in kp.diagnose(table) if one.subject == JUNK]
    assert len(found) == 2
    assert [one.details.get("group") for one in found] == [(2, "b", 7e-4), None]


def test_no_larger_epsilon_is_asked_for_where_damping_costs_already() -> None:
    rows = [*amplified(2.5e-6), inside("in_use_damping", 0.3) | {"index": pd.NA}]
    one = finding(rows)[JUNK]
    assert (one.remedy, one.details["damping"]) == (Remedy.KEEP_EPSILON, 0.3)
    assert "suggested_epsilon" not in one.evidence


def test_a_basis_far_off_is_told_with_its_step() -> None:
    rows = [inside("basis_off_diagonal", value, step, 0) for step, value in ((0, 0.8), (5, 0.3))]
    assert "basis in use" not in finding(rows)
    one = finding([*rows, inside("basis_off_diagonal", 0.62, 9, 0)])["basis in use"]
    assert (one.level, one.remedy) == ("warning", Remedy.REFRESH)
    assert one.evidence == {"off_diagonal": 0.62, "since": 9}
    assert list(one.details["sides"]) == [0]
    late = [inside("basis_off_diagonal", 0.7, step, 0) for step in (5, 9)]
    assert finding(late)["basis in use"].evidence["since"] == 5
