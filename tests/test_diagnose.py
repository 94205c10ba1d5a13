"""Findings against tables whose right diagnosis is known by construction."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from subprocess import run

import pandas as pd
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError

Row = dict[str, object]


def cosine(
    name: str, value: float, stderr: float = 0.002, kind: str = "population", **more: object
) -> Row:
    return {"parameter": "fc", "approximation": name, "metric": "cosine", "value": value,
            "stderr": stderr, "kind": kind, "n_data": 256, "n_eff": 200.0} | more  # fmt: skip


def spectrum(values: Sequence[float], norm: float, **more: object) -> list[Row]:
    rows: list[Row] = [{"parameter": "fc", "metric": "norm", "value": norm} | more]
    return rows + [
        {"parameter": "fc", "metric": "singular_value", "index": i, "value": value} | more
        for i, value in enumerate(values)
    ]


def diagnose(rows: Sequence[Row]) -> dict[str, kp.Finding]:
    """Findings by subject; each subject at most once a layer."""
    columns = ["parameter", "approximation", "metric", "index", "value", "stderr", "kind",
               "n_data", "n_eff", "note"]  # fmt: skip
    table = pd.DataFrame(rows)
    found = kp.diagnose(table.reindex(columns=[*columns, *(set(table) - set(columns))]))
    subjects = [one.subject for one in found]
    assert len(subjects) == len(set(subjects))
    return {one.subject: one for one in found}


def test_a_close_rule_is_called_good_with_its_gap_and_error() -> None:
    found = diagnose([cosine("optimal", 0.912), cosine("shampoo-squared", 0.902, 0.004)])
    one = found["distance to the optimum"]
    assert one.level == "good"
    assert "within 0.010 ± 0.004" in one.message
    assert one.evidence["gap"] == pytest.approx(0.010)


def test_a_clear_gap_is_a_notice_with_advice() -> None:
    found = diagnose([cosine("optimal", 0.95), cosine("kfac", 0.80), cosine("shampoo", 0.70)])
    one = found["distance to the optimum"]
    assert one.level == "notice"
    assert "K-FAC, the closest rule, is 0.150" in one.message
    assert "power iteration" in one.advice


def test_under_the_noise_it_abstains_and_names_the_data_that_would_settle_it() -> None:
    found = diagnose([cosine("optimal", 0.95, 0.03), cosine("shampoo-squared", 0.94, 0.03)])
    one = found["distance to the optimum"]
    assert one.level == "abstained"
    # 2 stderr = .06 must come down to .02: nine times the 256 data
    assert "about 2310 data" in one.advice


def test_numbers_of_different_kinds_are_never_compared() -> None:
    found = diagnose([cosine("optimal", 0.95), cosine("shampoo-squared", 0.80, kind="plugin")])
    assert found["distance to the optimum"].level == "abstained"


def test_population_is_preferred_to_plugin() -> None:
    found = diagnose(
        [
            cosine("optimal", 0.99), cosine("shampoo-squared", 0.985),
            cosine("optimal", 0.80, math.nan, "plugin"),
            cosine("shampoo-squared", 0.60, math.nan, "plugin"),
            cosine("shampoo-squared", 0.10, math.nan, "held-out"),
        ]
    )  # fmt: skip
    assert found["distance to the optimum"].level == "good"


def test_too_few_effective_draws_silence_everything_but_staleness() -> None:
    rows = [cosine("optimal", 0.95, n_eff=10.0), cosine("shampoo", 0.5, n_eff=10.0)]
    found = diagnose(rows)
    assert set(found) == {"too few draws"}
    assert "count as 10 independent draws" in found["too few draws"].message
    assert "768 data" in found["too few draws"].advice  # 256 * 30 / 10


@pytest.mark.parametrize(("second", "told"), [(0.5, True), (0.1, False)])
def test_rank_two_is_advised_where_a_second_product_pays(second: float, told: bool) -> None:
    norm = 1.2
    rows = [cosine("optimal", 1 / norm), cosine("optimal", 1 / norm - 0.01, math.nan, "plugin")]
    told_noise = {"parameter": "fc", "metric": "noise_floor", "value": 0.98}
    rows += [told_noise, *spectrum([1.0, second], norm)]
    found = diagnose(rows)
    assert ("Kronecker rank" in found) == told
    if told:
        gain = (math.hypot(1, second) - 1) / norm
        assert f"rank 2 (+{gain:.2f})" in found["Kronecker rank"].advice


def test_rank_two_is_not_advised_on_sampling_noise() -> None:
    rows = [cosine("optimal", 0.99), cosine("optimal", 0.8, math.nan, "plugin")]
    assert "Kronecker rank" not in diagnose([*rows, *spectrum([1.0, 0.5], 1.25)])


def test_corrected_eigenvalues_beyond_the_optimum() -> None:
    found = diagnose([cosine("optimal", 0.80), cosine("eigen-corrected", 0.90)])
    assert "0.100 ± 0.002 beyond any Kronecker product" in found["eigenvalues"].message
    assert "SOAP" in found["eigenvalues"].advice
    assert "eigenvalues" not in diagnose(
        [cosine("optimal", 0.80), cosine("eigen-corrected", 0.90, 0.05)]
    )


def test_the_exponent() -> None:
    found = diagnose([cosine("shampoo-squared", 0.9), cosine("shampoo", 0.7)])
    assert "exponent -1/2" in found["exponent"].advice
    assert "exponent" not in diagnose([cosine("shampoo-squared", 0.9), cosine("shampoo", 0.88)])


@pytest.mark.parametrize(("scale", "told"), [(1.1, False), (40.0, True), (0.01, True)])
def test_the_scale(scale: float, told: bool) -> None:
    rows = [cosine("kfac", 0.9), cosine("kfac", scale, metric="best_scale")]
    assert ("scale" in diagnose(rows)) == told


def run_of(lags: dict[int, float], draws: str = "trajectory") -> list[Row]:
    rows = []
    for step, lag in lags.items():
        more = {"step": step, "draws": draws}
        rows += [cosine("shampoo", 0.8, math.nan, "plugin", **more),
                 cosine("live", 0.8 - lag, math.nan, "plugin", **more)]  # fmt: skip
    return rows


def test_stale_live_factors_say_since_when() -> None:
    found = diagnose(run_of({0: 0.0, 100: 0.3, 200: 0.01, 400: 0.2, 800: 0.2}))
    one = found["staleness"]
    assert one.level == "warning"
    assert one.message == "the live factors lag by 0.20 since step 400"
    assert "adaptive tolerance" in one.advice


def test_on_another_target_the_lag_is_not_called_staleness() -> None:
    found = diagnose(run_of({0: 0.0, 400: 0.2}, draws="ggn"))
    assert "staleness" not in found
    assert found["live factors"].level == "notice"
    assert "batches, labels, averaging" in found["live factors"].message


def test_plugin_numbers_are_judged_by_their_noise_floor() -> None:
    rows = [cosine("optimal", 0.9, math.nan, "plugin"), cosine("kfac", 0.7, math.nan, "plugin")]
    assert diagnose(rows)["distance to the optimum"].level == "abstained"  # an old table
    for floor, level in ((0.95, "notice"), (0.7, "abstained")):
        told = {"parameter": "fc", "metric": "noise_floor", "value": floor}
        assert diagnose([*rows, told])["distance to the optimum"].level == level
    assert "Kronecker rank" not in diagnose([*rows, *spectrum([1.0, 0.9], 1.4)])
    exact = [row | {"draws": "trajectory", "n_eff": 3.0} for row in rows]
    assert diagnose(exact)["distance to the optimum"].level == "notice"


def test_fresh_live_factors_say_nothing() -> None:
    assert "staleness" not in diagnose(run_of({0: 0.3, 100: 0.3, 200: 0.01}))


def test_divergence_comes_first() -> None:
    losses: list[Row] = [
        {"metric": "train_loss", "value": value, "step": step}
        for step, value in enumerate([2.3, 1.0, 50.0])
    ]
    found = kp.diagnose(pd.DataFrame([*run_of({0: 0.5, 2: 0.5}), *losses]))
    assert found.findings[0].subject == "divergence"
    assert "2.3 to 50" in str(found.findings[0])
    levels = [kp_levels().index(one.level) for one in found]
    assert levels == sorted(levels)


def kp_levels() -> tuple[str, ...]:
    return ("warning", "notice", "good", "abstained")


def test_an_undefined_layer_gives_its_reason() -> None:
    row = cosine("optimal", math.nan, note="H = 0: no quality number is defined")
    assert "H = 0" in diagnose([row])["undefined"].message


def test_of_real_scores() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batch = torch.randn(64, 6), torch.randint(0, 3, (64,))
    scores = kp.compare(kp.capture(model, torch.nn.CrossEntropyLoss(), batch, layers="*weight"))
    found = kp.diagnose(scores)
    assert {one.parameter for one in found} >= {"0.weight", "2.weight"}
    sentences = found.summary()
    assert len(sentences) == len({(one.level, one.subject) for one in found})
    assert found.summary(()) == []
    assert list(found.table.columns) == ["level", "parameter", "subject", "message", "advice"]
    assert len(found.table) == len(found)


def test_the_summary_says_alike_findings_once() -> None:
    rows = [
        cosine(name, value, parameter=layer)
        for layer in ("fc1", "fc2", "fc3")
        for name, value in (("shampoo-squared", 0.9), ("shampoo", 0.7))
    ]
    found = kp.diagnose(pd.DataFrame(rows)).summary(("notice",))
    assert len(found) == 1
    assert found[0].startswith("fc1: Shampoo's factors")
    assert found[0].endswith("(and 2 more: fc2, fc3).")


def test_refuses_what_is_no_table() -> None:
    with pytest.raises(InvalidInputError, match=r"got a dict; give the Scores of kp\.compare"):
        kp.diagnose({"fc": 1.0})


def test_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kronecker_probe.quality.diagnose import diagnose\n"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0
