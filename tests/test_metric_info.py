"""What readers know of a metric: built-in, with options, and of a module they have not imported."""

from __future__ import annotations

import pytest

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.table.metric_info import METRIC_INFO, MetricInfo, add_metric_info, metric_info


def test_options_stand_behind_the_label() -> None:
    info = metric_info("kl_divergence:damping=0.1,power=1")
    assert (info.name, info.label) == (
        "kl_divergence:damping=0.1,power=1",
        "KL divergence, damping=0.1, power=1",
    )
    assert info.axis == f"{info.label} (nats)"
    assert (info.better, info.limits, info.drawing) == ("lower", (0.0, None), "log")


def test_an_unknown_metric_is_labelled_by_its_name() -> None:
    info = metric_info("spectral_gap:rank=2")
    assert (info.label, info.better) == ("spectral gap, rank=2", None)
    assert info.axis == info.label
    assert "spectral_gap" not in METRIC_INFO


@pytest.mark.parametrize(
    ("name", "match"), [("cosine", "already"), ("a:b", "letters"), ("", "letters")]
)
def test_names_taken_or_unreadable_are_refused(name: str, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        add_metric_info(MetricInfo(name, "mine"))
