"""Findings by code, level and evidence, of tables whose right diagnosis is known.

Their words are in tests/golden (test_findings_words.py).
"""

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
from kronecker_probe.findings.codes import Code, Remedy

Row = dict[str, object]
EXPONENT = "Shampoo's exponent"
FEW = "too few gradient samples"


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
               "n_examples", "n_eff", "note",
               "interval", "rule", "reason", "copies", "block_size"]  # fmt: skip
    table = pd.DataFrame(rows)
    found = kp.diagnose(table.reindex(columns=[*columns, *(set(table) - set(columns))]))
    subjects = [one.subject for one in found]
    assert len(subjects) == len(set(subjects))
    return {one.subject: one for one in found}


def rules(one: kp.Finding) -> list[str]:
    """The rules that a finding about the distance to the optimum is about."""
    return list(one.details["gaps"])


def test_a_close_rule_is_called_good_with_its_gap_and_error() -> None:
    found = diagnose([cosine("optimal", 0.912), cosine("shampoo-squared", 0.902, 0.004)])
    one = found["distance to the optimum"]
    assert one.level == "good"
    assert one.code == Code.CLOSE
    assert one.evidence == pytest.approx({"gap": 0.010, "stderr": 0.004, "optimal": 0.912})


def test_a_clear_gap_is_a_notice_with_advice() -> None:
    found = diagnose([cosine("optimal", 0.95), cosine("kfac", 0.80), cosine("shampoo", 0.70)])
    one = found["distance to the optimum"]
    assert one.level == "notice"
    assert (one.code, one.remedy) == (Code.FAR, Remedy.MAKE_OPTIMAL)
    assert list(one.details["gaps"]) == ["kfac"]
    assert one.evidence["gap"] == pytest.approx(0.15)
    assert one.details["others"]["shampoo"].value == pytest.approx(0.25)


def test_a_rule_at_the_optimum_is_indistinguishable_from_it_and_nothing_is_clipped() -> None:
    rows = [cosine("optimal", 0.95), cosine("shampoo-squared", 0.953, 0.004)]
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == "good"
    assert "indistinguishable" in one.message
    assert one.evidence["gap"] == pytest.approx(-0.003)


def test_equal_up_to_rounding_is_no_negative_zero() -> None:
    rows = [cosine("optimal", 0.95, 0.0), cosine("kfac", 0.95 + 1e-9, 0.0)]
    assert "difference 0.000 ± 0.000" in diagnose(rows)["distance to the optimum"].message


def test_rules_within_error_of_each_other_are_both_named() -> None:
    pair = [cosine("shampoo-squared", 0.948, 0.003), cosine("kfac", 0.949, 0.003)]
    one = diagnose([cosine("optimal", 0.95), *pair, cosine("shampoo", 0.7)])
    close = one["distance to the optimum"]
    assert close.code == Code.CLOSE
    assert rules(close) == ["shampoo-squared", "kfac"]
    far = diagnose([cosine("optimal", 0.99), *pair])["distance to the optimum"]
    assert (far.level, far.code) == ("notice", Code.FAR)
    assert rules(far) == ["shampoo-squared", "kfac"]
    apart = [cosine("shampoo-squared", 0.930, 0.003), cosine("kfac", 0.949, 0.003)]
    one = diagnose([cosine("optimal", 0.95), *apart])
    assert rules(one["distance to the optimum"]) == ["kfac"]


def test_a_noisy_rule_does_not_become_the_closest_one() -> None:
    """K-FAC's .96 ± .03 lies above Shampoo^2's .948 ± .002 by noise: Shampoo^2 is what is known."""
    pair = [cosine("shampoo-squared", 0.948), cosine("kfac", 0.96, 0.03)]
    one = diagnose([cosine("optimal", 0.952), *pair])["distance to the optimum"]
    assert (one.level, rules(one)) == ("good", ["shampoo-squared"])


@pytest.mark.parametrize(
    ("top", "level", "code"),
    [(0.95, "good", Code.CLOSE), (0.62, "notice", Code.CLOSE_TO_POOR),
     (0.902, "notice", Code.CLOSE_TO_UNSURE)],
)  # fmt: skip
def test_close_to_a_bad_optimum_is_not_good(top: float, level: str, code: Code) -> None:
    rows = [cosine("optimal", top), cosine("shampoo-squared", top - 0.001)]
    one = diagnose(rows)["distance to the optimum"]
    assert (one.level, one.code) == (level, code)
    if code == Code.CLOSE_TO_POOR:
        assert (one.remedy, one.details["beyond"]) == (Remedy.GO_BEYOND, [])
        better = diagnose([*rows, cosine("eigen-corrected", 0.8)])["distance to the optimum"]
        assert better.details["beyond"] == [Code.EIGENVALUES]


def bracket(name: str, value: float, low: float, high: float) -> Row:
    return cosine(name, value, math.nan, low=low, high=high, interval="bracket")


def test_a_bracket_is_shown_as_one_and_reaches_to_its_ends() -> None:
    """.95 in [.94, .98] less .90 ± .005: the difference lies between .94 - .91 and .98 - .89."""
    rows = [bracket("optimal", 0.95, 0.94, 0.98), cosine("shampoo-squared", 0.90, 0.005)]
    one = diagnose(rows)["distance to the optimum"]
    assert (one.level, one.code) == ("notice", Code.FAR)
    gap = one.details["gaps"]["shampoo-squared"]
    assert (gap.low, gap.high) == pytest.approx((0.03, 0.09))
    wide = [bracket("optimal", 0.95, 0.90, 0.98), rows[1]]
    one = diagnose(wide)["distance to the optimum"]
    assert one.level == "abstained"  # from .90 - .91 on
    assert one.remedy == Remedy.REFITS


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
    ("gap", "stderr", "settled"),
    [
        # 2 stderr = .018 must come down to |.008 - .02|: (.018 / .012)^2 = 2.25 times 256 = 576
        (0.008, 0.009, (580, 1740)),
        # .016 to .0145: 1.2 times, but a few data more than there are decide nothing
        (0.0055, 0.008, (340, 1020)),
        (0.0195, 0.008, None),
    ],
)
def test_the_examples_that_settle_it(
    gap: float, stderr: float, settled: tuple[int, int] | None
) -> None:
    rows = [cosine("optimal", 0.95, stderr), cosine("shampoo-squared", 0.95 - gap, stderr)]
    one = diagnose(rows)["distance to the optimum"]
    assert (one.level, one.code) == ("abstained", Code.UNCERTAIN)
    assert one.remedy == (Remedy.MEASURE_BETWEEN if settled else Remedy.AT_THRESHOLD)
    assert settled is None or (one.details["least"], one.details["most"]) == settled


def test_just_under_thirty_draws_is_not_printed_as_thirty() -> None:
    found = diagnose([cosine("optimal", 0.95, n_eff=29.8, n_examples=128)])[FEW]
    assert found.evidence == {"n_eff": 29.8}
    assert found.details["more"] == 170  # 1.3 * 128 = 166.4


def test_few_draws_of_kfac_alone_silence_only_it() -> None:
    rows = [cosine("optimal", 0.95), cosine("shampoo-squared", 0.945),
            cosine("kfac", math.nan, n_eff=12.0),
            cosine("kfac", 0.99, kind="plugin", n_eff=12.0)]  # fmt: skip
    found = diagnose(rows)
    assert FEW not in found
    assert rules(found["distance to the optimum"]) == ["shampoo-squared"]


def test_under_the_noise_it_abstains_and_names_the_data_that_would_settle_it() -> None:
    found = diagnose([cosine("optimal", 0.95, 0.03), cosine("shampoo-squared", 0.94, 0.03)])
    one = found["distance to the optimum"]
    assert (one.level, one.remedy) == ("abstained", Remedy.MEASURE_BETWEEN)
    # 2 stderr = .06 must come down to .02: nine times the 256 examples
    assert (one.details["least"], one.details["most"]) == (2310, 6930)


def test_numbers_of_different_kinds_are_never_compared() -> None:
    found = diagnose([cosine("optimal", 0.95), cosine("shampoo-squared", 0.80, kind="plugin")])
    one = found["distance to the optimum"]
    assert (one.level, one.code, one.remedy) == (
        "abstained", Code.KINDS_DIFFER, Remedy.MEASURE_MORE,
    )  # fmt: skip


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
    assert set(found) == {FEW}
    assert found[FEW].details["more"] == 770  # 256 * 30 / 10 = 768


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
        assert found["Kronecker rank"].evidence == pytest.approx({"gain": gain})
        assert found["Kronecker rank"].remedy == Remedy.NONE  # a sum is no preconditioner


def test_rank_two_is_not_told_on_sampling_noise() -> None:
    rows = [cosine("optimal", 0.99), cosine("optimal", 0.8, math.nan, "plugin")]
    assert "Kronecker rank" not in diagnose([*rows, *spectrum([1.0, 0.5], 1.25)])


def test_corrected_eigenvalues_beyond_the_optimum() -> None:
    found = diagnose([cosine("optimal", 0.80), cosine("eigen-corrected", 0.90)])
    assert found["eigenvalues"].evidence == pytest.approx({"gain": 0.1})
    assert found["eigenvalues"].remedy == Remedy.CORRECT_EIGENVALUES
    assert "eigenvalues" not in diagnose(
        [cosine("optimal", 0.80), cosine("eigen-corrected", 0.90, 0.05)]
    )


def test_the_exponent() -> None:
    found = diagnose([cosine("shampoo-squared", 0.9), cosine("shampoo", 0.7)])
    assert found[EXPONENT].remedy == Remedy.SQUARE
    assert EXPONENT not in diagnose([cosine("shampoo-squared", 0.9), cosine("shampoo", 0.88)])


@pytest.mark.parametrize(
    ("rule", "told"), [("shampoo", True), ("shampoo-squared", False), ("", False)]
)
def test_the_exponent_is_told_to_optimizers_that_have_it(rule: str, told: bool) -> None:
    rows = [cosine("shampoo-squared", 0.9, step=4), cosine("shampoo", 0.7, step=4)]
    rows.append(cosine("in-use", 0.7, step=4))
    named = {"parameter": "fc", "metric": "in_use_rule", "value": math.nan, "rule": rule, "step": 4}
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
                         "rule": rule, "step": step})  # fmt: skip
    return rows


def test_stale_factors_say_since_when() -> None:
    found = diagnose(run_of({0: 0.0, 100: 0.3, 200: 0.01, 400: 0.2, 800: 0.2}))
    one = found["staleness"]
    assert one.level == "warning"
    assert one.evidence == pytest.approx({"lag": 0.2, "since": 400})
    assert one.details["rule"] == "shampoo"
    assert one.remedy == Remedy.REFRESH


def test_on_another_target_the_lag_is_not_called_staleness() -> None:
    found = diagnose(run_of({0: 0.0, 400: 0.2}, target="ggn"))
    assert "staleness" not in found
    one = found["factors in use"]
    assert (one.level, one.code, one.remedy) == (
        "notice", Code.OFF_ITS_RULE, Remedy.TARGET_TRAJECTORY,
    )  # fmt: skip


def test_plugin_numbers_are_judged_by_their_noise_floor() -> None:
    rows = [cosine("optimal", 0.9, math.nan, "plugin"), cosine("kfac", 0.7, math.nan, "plugin")]
    old = diagnose(rows)["distance to the optimum"]
    assert (old.level, old.remedy) == ("abstained", Remedy.ADD_POPULATION)
    for floor, level in ((0.95, "notice"), (0.7, "abstained")):
        told = {"parameter": "fc", "metric": "noise_floor", "value": floor}
        assert diagnose([*rows, told])["distance to the optimum"].level == level
    assert "Kronecker rank" not in diagnose([*rows, *spectrum([1.0, 0.9], 1.4)])
    for target in ("trajectory", "batch-gradient"):
        exact = [row | {"target": target, "n_eff": 3.0} for row in rows]
        assert diagnose(exact)["distance to the optimum"].level == "notice"


def test_fresh_factors_say_nothing() -> None:
    assert "staleness" not in diagnose(run_of({0: 0.3, 100: 0.3, 200: 0.01}))


def test_staleness_is_told_against_the_rule_that_is_followed_only() -> None:
    late = {0: 0.0, 400: 0.2}
    squared = diagnose(run_of(late, rule="shampoo-squared"))["staleness"]
    assert squared.evidence == pytest.approx({"lag": 0.22, "since": 400})
    assert squared.details["rule"] == "shampoo-squared"
    assert not {"staleness", "factors in use"} & set(diagnose(run_of(late, rule="")))
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
    assert found["truncated target"].evidence == {"dropped": 0.41}
    assert found["truncated target"].remedy == Remedy.KEEP_MORE


@pytest.mark.parametrize(("share", "level"), [(0.0, "good"), (0.005, "good"), (0.03, "abstained")])
def test_no_difference_finer_than_what_was_dropped_is_judged(share: float, level: str) -> None:
    """.01 is within .02 if both cosines are known to .005, and not if they are to .03."""
    more = {"target": "trajectory", "step": 0}
    rows = [cosine("optimal", 0.95, math.nan, "plugin", **more),
            cosine("kfac", 0.94, math.nan, "plugin", **more), truncated(share)]  # fmt: skip
    one = diagnose(rows)["distance to the optimum"]
    assert one.level == level
    gap = one.details["gaps"]["kfac"]
    assert gap.high - gap.value == pytest.approx(share)


def test_the_drop_is_added_to_what_counts_as_stale() -> None:
    rows = run_of({0: 0.0, 400: 0.08})
    assert "staleness" in diagnose([*rows, truncated(0.02, 400)])
    assert "staleness" not in diagnose([*rows, truncated(0.04, 400)])


def test_a_significant_difference_is_not_called_indistinguishable() -> None:
    for value in (0.947, 0.953):
        rows = [cosine("optimal", 0.95, 0.001), cosine("kfac", value, 0.001)]
        one = diagnose(rows)["distance to the optimum"]
        assert one.code == Code.CLOSE
        assert "indistinguishable" not in one.message


def test_a_run_is_told_by_its_step_and_gets_no_advice_that_it_cannot_follow() -> None:
    wide = [bracket("optimal", 0.95, 0.90, 0.98), cosine("shampoo-squared", 0.90, 0.005)]
    table = pd.DataFrame([row | {"step": step} for step in (0, 80) for row in wide])
    found = kp.diagnose(table)
    assert found.at == "step 80"
    assert str(found).splitlines()[0] == "Judged at step 80:"
    assert found.findings[0].remedy == Remedy.REFITS_LATER
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
        kp.Finding("notice", Code.SCALE, name, message="so it is")
        for name in ("4.w", "4.w", "6.w", "6.w", "8.w")
    ]
    found = kp.Diagnosis(tuple(alike))
    assert str(found).splitlines()[2] == "[notice] scale: likewise in 2 more: 6.w, 8.w."
    assert found.summary() == ["4.w: so it is (and 2 more: 6.w, 8.w)."]


def test_the_exponent_is_not_advised_against_the_directions() -> None:
    rows = [cosine("shampoo-squared", 0.9), cosine("shampoo", 0.7)]
    metric = "direction_cosine:power=0.5,damping=0.001,gradients=16"
    for root, contradicts in ((0.97, True), (0.95, True), (0.90, False)):
        steps = [cosine("shampoo-squared", 0.95, math.nan, "plugin", metric=metric),
                 cosine("shampoo", root, math.nan, "plugin", metric=metric)]  # fmt: skip
        one = diagnose([*rows, *steps])[EXPONENT]
        assert one.remedy == (Remedy.JUDGE_BY_STEPS if contradicts else Remedy.SQUARE)
        options = metric.partition(":")[2]
        assert one.details["no_worse"] == ([(options, root, 0.95)] if contradicts else [])


def test_divergence_comes_first() -> None:
    losses: list[Row] = [
        {"metric": "train_loss", "value": value, "step": step}
        for step, value in enumerate([2.3, 1.0, 50.0])
    ]
    found = kp.diagnose(pd.DataFrame([*run_of({0: 0.5, 2: 0.5}), *losses]))
    assert found.findings[0].code == Code.LOSS_GREW
    assert found.findings[0].evidence == {"first": 2.3, "last": 50.0}
    levels = [kp_levels().index(one.level) for one in found]
    assert levels == sorted(levels)


def kp_levels() -> tuple[str, ...]:
    return ("warning", "notice", "good", "abstained")


def test_an_undefined_layer_gives_its_reason() -> None:
    row = cosine("optimal", math.nan, note="H = 0: no quality number is defined")
    one = diagnose([row])["undefined"]
    assert one.code == Code.UNDEFINED
    assert one.details["reason"] == row["note"]


def test_held_out_numbers_alone_are_named_as_such() -> None:
    found = diagnose([cosine("optimal", 0.9, kind="held-out")])["undefined"]
    assert (found.code, found.remedy) == (Code.HELD_OUT_ONLY, Remedy.ADD_ESTIMATE)


def test_where_every_number_abstains_the_reason_is_told() -> None:
    few = "N = 12 data (N_eff = 9.1) are few: under 30 effective draws no estimate can be trusted"
    rows = [cosine(name, math.nan, math.nan, n_eff=9.1, note=few) for name in ("optimal", "kfac")]
    assert diagnose(rows)["undefined"].details["reason"] == few


@pytest.mark.parametrize(("m", "n"), [(5, 1), (1, 7)])
def test_what_is_exact_on_vectors_is_not_praised(m: int, n: int) -> None:
    rows = [cosine("optimal", 1.0, 0.0, m=m, n=n), cosine("shampoo-squared", 1.0, 0.0, m=m, n=n)]
    found = diagnose(rows)
    assert set(found) == {"vectors"}
    assert found["vectors"].details["layers"] == ["fc"]
    more = [row | {"parameter": name} for name in ("a", "b") for row in rows]
    assert [one.details["layers"] for one in kp.diagnose(pd.DataFrame(more))] == [["a", "b"]]


def test_of_real_scores() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    batch = torch.randn(64, 6), torch.randint(0, 3, (64,))
    scores = kp.compare(kp.capture(model, torch.nn.CrossEntropyLoss(), batch, layers="*weight"))
    found = kp.diagnose(scores)
    assert {one.parameter for one in found} >= {"0.weight", "2.weight"}
    sentences = found.summary()
    assert len(sentences) == len({(one.level, one.code) for one in found})
    assert found.summary(()) == []
    assert list(found.table.columns) == [
        "level", "code", "parameter", "subject", "message", "advice",
    ]  # fmt: skip
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
