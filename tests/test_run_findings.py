"""Findings about all layers of a run, from tables whose right diagnosis is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import pytest
import torch

import kronecker_probe as kp
from kronecker_probe.quality.rows import COLUMNS

Row = dict[str, object]
COPIES = "have the same gradients as another: if they are copies of it, measure each once"


def layer(name: str, top: float, stderr: float = 0.02, **more: object) -> list[Row]:
    row = {"parameter": name, "metric": "cosine", "kind": "population", "n_examples": 256,
           "n_eff": 200.0, "stderr": stderr, "m": 8, "n": 6}  # fmt: skip
    values = {"optimal": top, "shampoo-squared": top - 0.2}
    return [row | {"approximation": of, "value": x} | more for of, x in values.items()]


def diagnose(rows: Sequence[Row], step: bool = False) -> dict[str, kp.Finding]:
    """The findings about the run, by subject."""
    columns = (["step"] if step else []) + list(COLUMNS)
    found = [one for one in kp.diagnose(pd.DataFrame(rows, columns=columns)) if not one.parameter]
    assert len(found) == len({one.subject for one in found})
    return {one.subject: one for one in found}


def losses(values: Sequence[float]) -> list[Row]:
    return [{"metric": "train_loss", "step": 10 * k, "value": x} for k, x in enumerate(values)]


# ---------------------------------------------------------------- the worst layers


def test_the_worst_layers_are_ranked_by_their_cosine() -> None:
    tops = {"fc1": 0.95, "fc2": 0.62, "conv1": 0.71, "conv2": 0.85, "conv3": 0.8}
    rows = [row for name, top in tops.items() for row in layer(name, top)]
    one = diagnose(rows)["worst approximated layers"]
    assert one.level == "notice"
    assert one.message == (
        "the Kronecker form fits worst at: fc2 (cosine 0.620 ± 0.020), then conv1 (cosine 0.710 ± "
        "0.020), then conv3 (cosine 0.800 ± 0.020), and 1 more may lie under 0.9"
    )
    assert one.advice == "no rule measured clearly goes beyond it at fc2, conv1 and conv3"
    assert one.evidence["fc2"] == 0.62


def test_what_would_help_the_worst_layers() -> None:
    rows = layer("a", 0.8, 0.002) + layer("b", 0.7, 0.002)
    extra = layer("b", 0.78, 0.002)[0] | {"approximation": "eigen-corrected"}
    assert diagnose([*rows, extra])["worst approximated layers"].advice == (
        "corrected eigenvalues (SOAP, EShampoo) would add to b, no rule measured clearly goes "
        "beyond it at a"
    )


def test_it_is_good_where_all_are_clearly_good() -> None:
    rows = layer("fc1", 0.97, 0.002) + layer("fc2", 0.94, 0.002)
    one = diagnose(rows)["worst approximated layers"]
    assert one.level == "good"
    assert "all 2 layers" in one.message
    assert "fc2 worst (0.940 ± 0.002)" in one.message
    unsure = diagnose(layer("fc1", 0.97, 0.002) + layer("fc2", 0.94, 0.03))
    assert unsure["worst approximated layers"].level == "notice"


def test_what_cannot_be_judged_is_not_ranked() -> None:
    rows = layer("a", 0.8) + layer("b", 0.7)
    vector = layer("v", 0.1, m=1)
    few = layer("few", 0.2, n_eff=12.0)
    sampled = layer("plug-in", 0.3, math.nan, kind="plugin")
    message = diagnose([*rows, *vector, *few, *sampled])["worst approximated layers"].message
    assert message.startswith("the Kronecker form fits worst at: b (")
    assert not any(name in message for name in ("v (", "few (", "plug-in ("))
    assert "worst approximated layers" not in diagnose(layer("a", 0.8))
    exact = [row | {"target": "trajectory"} for row in sampled]
    assert "plug-in (cosine 0.300)" in diagnose(rows + exact)["worst approximated layers"].message


def test_a_poor_rule_alone_is_no_bad_fit_of_the_form() -> None:
    """The optimum is at least as good as each rule: those prove a good fit, never a bad one."""

    def alone(name: str, value: float) -> Row:
        return layer(name, value, 0.002)[0] | {"approximation": "kfac"}

    found = diagnose([alone("a", 0.5), alone("b", 0.98)])
    assert "worst approximated layers" not in found
    one = found["optimum not measured"]
    assert "K-FAC at a (cosine 0.500 ± 0.002)" in one.message
    assert one.advice == "measure 'optimal'"
    good = diagnose([alone("a", 0.97), alone("b", 0.98)])
    assert good["worst approximated layers"].level == "good"
    both = diagnose([alone("a", 0.5), *layer("b", 0.6, 0.002)])
    assert "fits worst at: b (" in both["worst approximated layers"].message
    assert "at a (" in both["optimum not measured"].message


def test_only_the_last_step_counts() -> None:
    rows = layer("a", 0.5, step=0) + layer("b", 0.5, step=0)
    rows += layer("a", 0.98, 0.001, step=9) + layer("b", 0.99, 0.001, step=9)
    assert diagnose(rows, step=True)["worst approximated layers"].level == "good"


# ---------------------------------------------------------------- copies, embeddings


def test_copies_are_told_once() -> None:
    rows = layer("a", 0.8) + layer("b", 0.7)
    rows += [
        {"parameter": name, "metric": metric, "kind": "population", "value": 1.0,
         "note": f"{count} of 256 data {COPIES}"}
        for name, count in (("a", 3), ("b", 7)) for metric in ("norm", "noise_floor")
    ]  # fmt: skip
    one = diagnose(rows)["copies"]
    assert one.level == "notice"
    assert one.message == "in a and b, up to 7 of 256 data have the same gradients as another"
    assert "measure each once" in one.advice
    assert "copies" not in diagnose(layer("a", 0.8))


def test_copies_of_real_draws_are_seen() -> None:
    """The note that the table carries is the one that is looked for."""
    torch.manual_seed(0)
    d, a = torch.randn(256, 5), torch.randn(256, 4)
    d[1], a[1] = d[0], a[0]
    twice = kp.compare(kp.GradientSamples.from_factors(d, a), ["optimal", "shampoo-squared"])
    found = {one.subject: one for one in kp.diagnose(twice)}
    assert "in samples, 1 of 256 data" in found["copies"].message


def test_an_embedding_is_told_what_to_do_without_kfac() -> None:
    torch.manual_seed(0)
    tokens, d = torch.randint(0, 9, (64, 3)), torch.randn(64, 3, 4)
    samples = kp.GradientSamples.from_embedding(tokens, d, 9)
    scores = kp.compare({"wte": samples}, ["optimal", "shampoo-squared", "kfac"])
    one = {found.subject: found for found in kp.diagnose(scores)}["no factors"]
    assert "K-FAC is not defined for wte" in one.message
    assert "Shampoo²" in one.advice
    assert "capture" not in str(one)
    without = kp.compare({"wte": samples}, ["optimal", "shampoo-squared"])
    assert "no factors" not in {found.subject for found in kp.diagnose(without)}


# ---------------------------------------------------------------- no sampling error


def test_batch_gradients_are_judged_as_the_matrix_that_they_are() -> None:
    """Eight batches are few draws, but they are H, and the table and the findings say the same."""
    torch.manual_seed(0)
    single = kp.GradientSamples.from_factors(torch.randn(64, 5), torch.randn(64, 4))
    batches = kp.batch_gradients(single, 8, batches=8)
    scores = kp.compare(batches, ["optimal", "shampoo-squared", "shampoo"])
    assert scores.table["note"].str.contains("no sampling error").any()
    found = kp.diagnose(scores)
    assert "too few draws" not in {one.subject for one in found}
    one = {finding.subject: finding for finding in found}["distance to the optimum"]
    assert one.level in ("good", "notice")
    values = scores.table[(scores.table["metric"] == "cosine") & scores.table["value"].notna()]
    values = values.set_index("approximation")["value"]
    assert one.evidence["gap"] == values["optimal"] - values["shampoo-squared"]
    assert not any(word in one.message for word in ("±", "plug-in"))
    alone = kp.diagnose(kp.compare(batches, ["optimal"], estimates="population"))
    assert "no sampling error" in alone.findings[0].message
    assert alone.findings[0].advice == "add the estimate 'plugin'"


# ---------------------------------------------------------------- bad tables


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([2.3, 1.0, math.nan, math.nan], "the train loss is not finite from step 20 on"),
        ([2.3, math.inf], "the train loss is not finite from step 10 on"),
        ([math.nan], "the train loss is not finite from step 0 on"),
        ([2.3, 50.0], "the train loss went from 2.3 to 50"),
        ([math.nan, 2.0, 1.0], None),
        ([-4.0, -2.0, 1.0], None),  # of a loss that may be negative no ratio says anything
        ([0.0, 0.5], None),
    ],
)
def test_a_run_that_diverged(values: Sequence[float], told: str | None) -> None:
    found = diagnose([*layer("a", 0.8, step=0), *losses(values)], step=True)
    assert ("divergence" in found) == (told is not None)
    if told:
        assert found["divergence"].level == "warning"
        assert told in found["divergence"].message


@pytest.mark.parametrize("step", [False, True])
def test_an_empty_table_says_that_it_is(step: bool) -> None:
    found = diagnose([], step=step)
    assert set(found) == {"nothing to judge"}
    assert "no cosine" in str(found["nothing to judge"])


def test_a_table_of_losses_alone() -> None:
    found = diagnose(losses([2.3, math.nan]), step=True)
    assert set(found) == {"divergence", "nothing to judge"}
