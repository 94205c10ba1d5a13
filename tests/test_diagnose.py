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
EXPONENT = "Shampoo's exponent"


def cosine(
    name: str, value: float, stderr: float = 0.002, kind: str = "population", **more: object
) -> Row:
    return {"parameter": "fc", "approximation": name, "metric": "cosine", "value": value,
            "stderr": stderr, "kind": kind, "n_examples": 256, "n_eff": 200.0} | more  # fmt: skip


def spectrum(values: Sequence[float], norm: float, **more: object) -> list[Row]:
    rows: list[Row] = [{"parameter": "fc", "metric": "norm", "value": norm} | more]
    return rows + [
        {"parameter": "fc", "metric": "singular_value", "index": i, "value": value} | more
        for i, value in enumerate(values)
    ]


def diagnose(rows: Sequence[Row]) -> dict[str, kp.Finding]:
    """Findings by subject; each subject at most once a layer."""
    columns = ["parameter", "approximation", "metric", "index", "value", "stderr", "kind",
               "n_examples", "n_eff", "note"]  # fmt: skip
    table = pd.DataFrame(rows)
    found = kp.diagnose(table.reindex(columns=[*columns, *(set(table) - set(columns))]))
    subjects = [one.subject for one in found]
    assert len(subjects) == len(set(subjects))
    return {one.subject: one for one in found}


def test_a_close_rule_is_called_good_with_its_gap_and_error() -> None:
    found = diagnose([cosine("optimal", 0.912), cosine("shampoo-squared", 0.902, 0.004)])
    one = found["distance to the optimum"]
    assert one.level == "good"
    assert "Shampoo² is within 0.02 of the best" in one.message
    assert "(difference 0.010 ± 0.004)" in one.message
    assert one.evidence["gap"] == pytest.approx(0.010)


def test_a_clear_gap_is_a_notice_with_advice() -> None:
    found = diagnose([cosine("optimal", 0.95), cosine("kfac", 0.80), cosine("shampoo", 0.70)])
    one = found["distance to the optimum"]
    assert one.level == "notice"
    assert "K-FAC, the closest rule, is 0.150" in one.message
    assert one.advice == "kp.approximate(H, 'optimal') makes that product, which no preset follows"


def test_a_rule_at_the_optimum_is_indistinguishable_from_it_and_nothing_is_clipped() -> None:
    rows = [cosine("optimal", 0.95), cosine("shampoo-squared", 0.953, 0.004)]
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == "good"
    assert "Shampoo² is indistinguishable from the best" in one.message
    assert "difference -0.003 ± 0.004" in one.message
    assert one.evidence["gap"] == pytest.approx(-0.003)


def test_equal_up_to_rounding_is_no_negative_zero() -> None:
    rows = [cosine("optimal", 0.95, 0.0), cosine("kfac", 0.95 + 1e-9, 0.0)]
    assert "difference 0.000 ± 0.000" in diagnose(rows)["distance to the optimum"].message


def test_rules_within_error_of_each_other_are_both_named() -> None:
    pair = [cosine("shampoo-squared", 0.948, 0.003), cosine("kfac", 0.949, 0.003)]
    one = diagnose([cosine("optimal", 0.95), *pair, cosine("shampoo", 0.7)])
    message = one["distance to the optimum"].message
    assert message.startswith("Shampoo² and K-FAC are indistinguishable from the best")
    assert "differences 0.002 ± 0.003 and 0.001 ± 0.003" in message
    far = diagnose([cosine("optimal", 0.99), *pair])["distance to the optimum"]
    assert far.level == "notice"
    assert far.message.startswith(
        "Shampoo² and K-FAC, the closest rules, are 0.042 ± 0.003 and 0.041 ± 0.003 short"
    )
    apart = [cosine("shampoo-squared", 0.930, 0.003), cosine("kfac", 0.949, 0.003)]
    one = diagnose([cosine("optimal", 0.95), *apart])
    assert one["distance to the optimum"].message.startswith("K-FAC is indistinguishable")


def test_a_noisy_rule_does_not_become_the_closest_one() -> None:
    """K-FAC's .96 ± .03 lies above Shampoo^2's .948 ± .002 by noise: Shampoo^2 is what is known."""
    pair = [cosine("shampoo-squared", 0.948), cosine("kfac", 0.96, 0.03)]
    one = diagnose([cosine("optimal", 0.952), *pair])["distance to the optimum"]
    assert one.level == "good"
    assert one.message.startswith("Shampoo² is indistinguishable")


@pytest.mark.parametrize(
    ("top", "level", "words"),
    [(0.95, "good", "a cosine of"), (0.62, "notice", "only 0.620 ± 0.002"),
     (0.902, "notice", "need not be the 0.9")],
)  # fmt: skip
def test_close_to_a_bad_optimum_is_not_good(top: float, level: str, words: str) -> None:
    rows = [cosine("optimal", top), cosine("shampoo-squared", top - 0.001)]
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == level
    assert words in one.message
    if level == "notice" and top < 0.9:
        assert "no rule measured here clearly goes beyond it" in one.advice
        better = diagnose([*rows, cosine("eigen-corrected", 0.8)])["distance to the optimum"]
        assert better.advice == "to go beyond it: corrected eigenvalues (SOAP, EShampoo)"


def bracket(name: str, value: float, low: float, high: float) -> Row:
    note = "bracket: from held-out factors to the in-sample fit, each with its error"
    return cosine(name, value, math.nan, low=low, high=high, note=note)


def test_a_bracket_is_shown_as_one_and_reaches_to_its_ends() -> None:
    """.95 in [.94, .98] less .90 ± .005: the difference lies between .94 - .91 and .98 - .89."""
    rows = [bracket("optimal", 0.95, 0.94, 0.98), cosine("shampoo-squared", 0.90, 0.005)]
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == "notice"
    assert "0.050 in [0.030, 0.090] short of" in one.message
    assert "cosine 0.950 in [0.940, 0.980]" in one.message
    wide = [bracket("optimal", 0.95, 0.90, 0.98), rows[1]]
    one = diagnose(wide)["distance to the optimum"]
    assert one.level == "abstained"  # from .90 - .91 on
    assert "refits=8" in one.advice
    assert "±" not in one.message


@pytest.mark.parametrize(("low", "told"), [(0.80, False), (0.83, True)])
def test_a_second_product_must_exceed_the_reach_of_a_bracket(low: float, told: bool) -> None:
    """+.04 beside .85 in [low, .86]: the number is .05 or .02 from its farther end."""
    norm, second = 1 / 0.85, math.sqrt((1 + 0.04 / 0.85) ** 2 - 1)
    rows = [bracket("optimal", 0.85, low, 0.86), cosine("optimal", 0.85, math.nan, "plugin")]
    rows += [{"parameter": "fc", "metric": "noise_floor", "value": 0.99}]
    assert ("Kronecker rank" in diagnose([*rows, *spectrum([1.0, second], norm)])) == told


def test_a_bracketed_scale_is_judged_by_its_ends() -> None:
    """2.3 in [1.9, 2.4] may be under 2, though 2.3 less a quarter of the width is not."""
    rows = [cosine("kfac", 0.9), bracket("kfac", 2.3, 1.9, 2.4) | {"metric": "best_scale"}]
    assert "scale" not in diagnose(rows)
    rows[1]["low"] = 2.1
    assert "scale" in diagnose(rows)


@pytest.mark.parametrize(
    ("gap", "stderr", "advice"),
    [
        # 2 stderr = .018 must come down to |.008 - .02|: (.018 / .012)^2 = 2.25 times 256 = 576
        (0.008, 0.009, "580 to 1740 data would settle it"),
        # .016 to .0145: 1.2 times, but a few data more than there are decide nothing
        (0.0055, 0.008, "340 to 1020 data would settle it"),
        (0.0195, 0.008, "at the threshold of 0.02, and more data will not settle it"),
    ],
)
def test_the_data_that_settle_it(gap: float, stderr: float, advice: str) -> None:
    rows = [cosine("optimal", 0.95, stderr), cosine("shampoo-squared", 0.95 - gap, stderr)]
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == "abstained"
    assert advice in one.advice


def test_just_under_thirty_draws_is_not_printed_as_thirty() -> None:
    found = diagnose([cosine("optimal", 0.95, n_eff=29.8, n_examples=128)])["too few draws"]
    assert "count as 29.8 independent draws, and under 30" in found.message
    assert "at least 170 data" in found.advice  # 1.3 * 128 = 166.4


def test_few_draws_of_kfac_alone_silence_only_it() -> None:
    rows = [cosine("optimal", 0.95), cosine("shampoo-squared", 0.945),
            cosine("kfac", math.nan, n_eff=12.0),
            cosine("kfac", 0.99, kind="plugin", n_eff=12.0)]  # fmt: skip
    found = diagnose(rows)
    assert "too few draws" not in found
    assert found["distance to the optimum"].message.startswith("Shampoo² is")


def test_under_the_noise_it_abstains_and_names_the_data_that_would_settle_it() -> None:
    found = diagnose([cosine("optimal", 0.95, 0.03), cosine("shampoo-squared", 0.94, 0.03)])
    one = found["distance to the optimum"]
    assert one.level == "abstained"
    # 2 stderr = .06 must come down to .02: nine times the 256 data
    assert one.advice == "2310 to 6930 data would settle it"


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
    assert "770 data" in found["too few draws"].advice  # 256 * 30 / 10 = 768


@pytest.mark.parametrize(("second", "told"), [(0.5, True), (0.1, False)])
def test_rank_two_is_told_where_a_second_product_pays(second: float, told: bool) -> None:
    norm = 1.2
    rows = [cosine("optimal", 1 / norm), cosine("optimal", 1 / norm - 0.01, math.nan, "plugin")]
    told_noise = {"parameter": "fc", "metric": "noise_floor", "value": 0.98}
    rows += [told_noise, *spectrum([1.0, second], norm)]
    found = diagnose(rows)
    assert ("Kronecker rank" in found) == told
    if told:
        gain = (math.hypot(1, second) - 1) / norm
        assert f"the best sum of two has {gain:.2f} more" in found["Kronecker rank"].message
        assert found["Kronecker rank"].advice == ""  # a sum is no preconditioner


def test_rank_two_is_not_told_on_sampling_noise() -> None:
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
    assert "the preset ShampooSquared" in found[EXPONENT].advice
    assert EXPONENT not in diagnose([cosine("shampoo-squared", 0.9), cosine("shampoo", 0.88)])


@pytest.mark.parametrize(
    ("rule", "told"), [("shampoo", True), ("shampoo-squared", False), ("", False)]
)
def test_the_exponent_is_told_to_optimizers_that_have_it(rule: str, told: bool) -> None:
    rows = [cosine("shampoo-squared", 0.9, step=4), cosine("shampoo", 0.7, step=4)]
    rows.append(cosine("in-use", 0.7, step=4))
    note = f"live follows {rule}"
    named = {"parameter": "fc", "metric": "in_use_rule", "value": math.nan, "note": note, "step": 4}
    found = diagnose([*rows, named] if rule else rows)
    assert (EXPONENT in found) == told


@pytest.mark.parametrize(("scale", "told"), [(1.1, False), (40.0, True), (0.01, True)])
def test_the_scale(scale: float, told: bool) -> None:
    rows = [cosine("kfac", 0.9), cosine("kfac", scale, metric="best_scale")]
    assert ("scale" in diagnose(rows)) == told


def run_of(lags: dict[int, float], target: str = "trajectory", rule: str = "shampoo") -> list[Row]:
    rows = []
    for step, lag in lags.items():
        more = {"step": step, "target": target}
        rows += [cosine("shampoo", 0.8, math.nan, "plugin", **more),
                 cosine("shampoo-squared", 0.82, math.nan, "plugin", **more),
                 cosine("in-use", 0.8 - lag, math.nan, "plugin", **more)]  # fmt: skip
        if rule:
            rows.append({"parameter": "fc", "metric": "in_use_rule", "value": math.nan,
                         "note": f"live follows {rule}", "step": step})  # fmt: skip
    return rows


def test_stale_live_factors_say_since_when() -> None:
    found = diagnose(run_of({0: 0.0, 100: 0.3, 200: 0.01, 400: 0.2, 800: 0.2}))
    one = found["staleness"]
    assert one.level == "warning"
    assert one.message == "the live factors lag by 0.20 behind fresh Shampoo since step 400"
    assert "adaptive tolerance" in one.advice


def test_on_another_target_the_lag_is_not_called_staleness() -> None:
    found = diagnose(run_of({0: 0.0, 400: 0.2}, target="ggn"))
    assert "staleness" not in found
    assert found["live factors"].level == "notice"
    assert "batches, labels, averaging" in found["live factors"].message


def test_plugin_numbers_are_judged_by_their_noise_floor() -> None:
    rows = [cosine("optimal", 0.9, math.nan, "plugin"), cosine("kfac", 0.7, math.nan, "plugin")]
    old = diagnose(rows)["distance to the optimum"]
    assert (old.level, old.advice) == ("abstained", "add the estimate 'population'")
    for floor, level in ((0.95, "notice"), (0.7, "abstained")):
        told = {"parameter": "fc", "metric": "noise_floor", "value": floor}
        assert diagnose([*rows, told])["distance to the optimum"].level == level
    assert "Kronecker rank" not in diagnose([*rows, *spectrum([1.0, 0.9], 1.4)])
    for target in ("trajectory", "batch-gradient"):
        exact = [row | {"target": target, "n_eff": 3.0} for row in rows]
        assert diagnose(exact)["distance to the optimum"].level == "notice"


def test_fresh_live_factors_say_nothing() -> None:
    assert "staleness" not in diagnose(run_of({0: 0.3, 100: 0.3, 200: 0.01}))


def test_staleness_is_told_against_the_rule_that_is_followed_only() -> None:
    late = {0: 0.0, 400: 0.2}
    squared = diagnose(run_of(late, rule="shampoo-squared"))["staleness"]
    assert "lag by 0.22 behind fresh Shampoo² since" in squared.message
    assert not {"staleness", "live factors"} & set(diagnose(run_of(late, rule="")))
    # behind fresh Shampoo by .045, which is not stale, but behind its square by .065
    little = {0: 0.0, 400: 0.045}
    assert "staleness" not in diagnose(run_of(little))
    assert "staleness" in diagnose(run_of(little, rule="shampoo-squared"))


def truncated(share: float, step: int = 0) -> Row:
    return {"parameter": "fc", "metric": "dropped_energy", "value": share, "step": step}


def test_a_truncated_target_is_not_judged() -> None:
    rows = run_of({0: 0.0, 400: 0.3})
    rows += [cosine("optimal", 0.95, math.nan, "plugin", step=400, target="trajectory")]
    assert "distance to the optimum" in diagnose([*rows, truncated(0.41)])  # of another step
    found = diagnose([*rows, truncated(0.41, 400)])
    assert set(found) == {"truncated target"}
    assert found["truncated target"].level == "abstained"
    assert "dropped 41 % of the energy" in found["truncated target"].message
    assert "window_memory" in found["truncated target"].advice


@pytest.mark.parametrize(("share", "level"), [(0.0, "good"), (0.005, "good"), (0.03, "abstained")])
def test_no_difference_finer_than_what_was_dropped_is_judged(share: float, level: str) -> None:
    """.01 is within .02 if both cosines are known to .005, and not if they are to .03."""
    more = {"target": "trajectory", "step": 0}
    rows = [cosine("optimal", 0.95, math.nan, "plugin", **more),
            cosine("kfac", 0.94, math.nan, "plugin", **more), truncated(share)]  # fmt: skip
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == level
    assert ("off by up to 0.005" in one.message) == (share == 0.005)


def test_the_drop_is_added_to_what_counts_as_stale() -> None:
    rows = run_of({0: 0.0, 400: 0.08})
    assert "staleness" in diagnose([*rows, truncated(0.02, 400)])
    assert "staleness" not in diagnose([*rows, truncated(0.04, 400)])


def test_a_significant_difference_is_not_called_indistinguishable() -> None:
    for value in (0.947, 0.953):
        rows = [cosine("optimal", 0.95, 0.001), cosine("kfac", value, 0.001)]
        message = diagnose(rows)["distance to the optimum"].message
        assert "indistinguishable" not in message
        assert "within 0.02 of the best" in message
    assert "(difference -0.003 ± 0.001)" in message


def test_a_run_is_told_by_its_step_and_gets_no_advice_that_it_cannot_follow() -> None:
    wide = [bracket("optimal", 0.95, 0.90, 0.98), cosine("shampoo-squared", 0.90, 0.005)]
    table = pd.DataFrame([row | {"step": step} for step in (0, 80) for row in wide])
    found = kp.diagnose(table)
    assert found.at == "step 80"
    assert str(found).splitlines()[0] == "Judged at step 80:"
    assert "a run holds no error of this number" in found.findings[0].advice
    assert not str(kp.diagnose(pd.DataFrame(wide))).startswith("Judged")
    other = pd.DataFrame([row | {"step": 40, "parameter": "b"} for row in wide])
    both = kp.diagnose(pd.concat([table, other]))
    assert both.at == "the last step of each layer, 40 to 80"


def test_alike_findings_are_printed_twice_and_then_named() -> None:
    rows = [cosine(name, value, parameter=layer) for layer in ("a", "b", "c", "d", "e")
            for name, value in (("shampoo-squared", 0.95), ("shampoo", 0.7))]  # fmt: skip
    lines = str(kp.diagnose(pd.DataFrame(rows))).splitlines()
    lines = [line for line in lines if "exponent" in line]
    assert len(lines) == 3
    assert lines[1].startswith("[notice] b: Shampoo's factors")
    assert lines[2] == "[notice] Shampoo's exponent: likewise in 3 more: c, d, e."
    three = str(kp.diagnose(pd.DataFrame([row for row in rows if row["parameter"] in "abc"])))
    assert "likewise" not in three  # a line for one layer may as well say what it is


def test_a_layer_is_named_once_in_what_is_alike() -> None:
    """As of findings about both factors of a layer."""
    alike = [
        kp.Finding("notice", name, "its factors", "so it is")
        for name in ("4.w", "4.w", "6.w", "6.w", "8.w")
    ]
    found = kp.Diagnosis(tuple(alike))
    assert str(found).splitlines()[2] == "[notice] its factors: likewise in 2 more: 6.w, 8.w."
    assert found.summary() == ["4.w: so it is (and 2 more: 6.w, 8.w)."]


def test_the_exponent_is_not_advised_against_the_directions() -> None:
    rows = [cosine("shampoo-squared", 0.9), cosine("shampoo", 0.7)]
    metric = "direction_cosine:power=0.5,damping=0.001,gradients=16"
    for root, contradicts in ((0.97, True), (0.95, True), (0.90, False)):
        steps = [cosine("shampoo-squared", 0.95, math.nan, "plugin", metric=metric),
                 cosine("shampoo", root, math.nan, "plugin", metric=metric)]  # fmt: skip
        one = diagnose([*rows, *steps])[EXPONENT]
        assert ("ShampooSquared" not in one.advice) == contradicts
        told = f"direction cosine {root:.3f} against 0.950 (power=0.5,"
        assert (told in one.message) == contradicts


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


def test_held_out_numbers_alone_are_named_as_such() -> None:
    found = diagnose([cosine("optimal", 0.9, kind="held-out")])["undefined"]
    assert "held-out cosines alone" in found.message
    assert "'population' or 'plugin'" in found.advice


def test_where_every_number_abstains_the_reason_is_told() -> None:
    few = "N = 12 data (N_eff = 9.1) are few: under 30 effective draws no estimate can be trusted"
    rows = [cosine(name, math.nan, math.nan, n_eff=9.1, note=few) for name in ("optimal", "kfac")]
    assert few in diagnose(rows)["undefined"].message


@pytest.mark.parametrize(("m", "n"), [(5, 1), (1, 7)])
def test_what_is_exact_on_vectors_is_not_praised(m: int, n: int) -> None:
    rows = [cosine("optimal", 1.0, 0.0, m=m, n=n), cosine("shampoo-squared", 1.0, 0.0, m=m, n=n)]
    found = diagnose(rows)
    assert set(found) == {"vectors"}
    assert "fc is a vector" in found["vectors"].message
    more = [row | {"parameter": name} for name in ("a", "b") for row in rows]
    assert [one.message.partition(",")[0] for one in kp.diagnose(pd.DataFrame(more))] == [
        "a and b are vectors"
    ]


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
        for name, value in (("shampoo-squared", 0.95), ("shampoo", 0.7))
    ]
    found = kp.diagnose(pd.DataFrame(rows)).summary(("notice",))
    assert len(found) == 1
    assert found[0].startswith("fc1: Shampoo's factors")
    assert found[0].endswith("(and 2 more: fc2, fc3).")


def test_refuses_what_is_no_table() -> None:
    with pytest.raises(InvalidInputError, match=r"got a dict; give the Scores of kp\.compare"):
        kp.diagnose({"fc": 1.0})
    with pytest.raises(InvalidInputError, match=r"got a DataFrame without approximation, metric;"):
        kp.diagnose(pd.DataFrame({"parameter": ["fc"], "value": [1.0]}))


def test_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kronecker_probe.findings.diagnose import diagnose\n"
    )
    assert run([sys.executable, "-c", code], check=False).returncode == 0
