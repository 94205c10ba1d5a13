"""Optimizers by name, with settings as text."""

from __future__ import annotations

import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, UnknownNameError
from kronecker_probe.optim.build import (
    build_optimizer,
    learning_rates,
    optimizer_names,
    settings_for,
)


def params() -> list[torch.Tensor]:
    return [torch.ones(3, 2, requires_grad=True), torch.ones(3, requires_grad=True)]


@pytest.mark.parametrize("name", optimizer_names())
def test_every_name_builds_an_optimizer_that_steps(name: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    for one in model.parameters():
        torch.nn.init.ones_(one)
    held = list(model.parameters())
    optimizer = build_optimizer(name, held, lr=0.01, model=model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).mean().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(one).all()) and bool((one != 1).any()) for one in held)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_settings_reach_their_sections() -> None:
    settings = ["basis.tolerance=0.1", "basis.solver=qr", "weight_decay=0.2", "betas=(0.8, 0.9)",
                "shapes.block_size=None"]  # fmt: skip
    optimizer = build_optimizer("eshampoo", params(), settings=settings)
    (group,) = optimizer.param_groups
    assert group["basis"] == optim.Basis(start=1, tolerance=0.1, solver="qr")
    assert (group["weight_decay"], group["betas"]) == (0.2, (0.8, 0.9))


@pytest.mark.parametrize(("name", "settings", "error", "told"), [
    ("soup", [], UnknownNameError, "soap"),
    ("soap", ["basis.tolerence=1"], UnknownNameError, "tolerance"),
    ("soap", ["bases.tolerance=1"], UnknownNameError, "basis"),
    ("soap", ["basis.tolerance"], InvalidInputError, "section.field=value"),
    ("soap", ["basis.=1"], InvalidInputError, "section.field=value"),
    ("soap", ["basis.frequency=1", "basis.frequency=2"], InvalidInputError, "twice"),
    ("soap", ["basis.frequency=often"], InvalidInputError, "frequency"),
    ("soap", ["lr=1"], InvalidInputError, "use --lr"),
    ("kfac", [], InvalidInputError, "model"),
    ("adamw", ["basis.frequency=1"], InvalidInputError, "section"),
    ("adamw", ["weight_decey=1"], UnknownNameError, "weight_decay"),
    ("adamw", ["foreach=no"], InvalidInputError, "foreach of adamw is 'no'"),
    ("adamw", ["capturable=1"], InvalidInputError, "capturable .* True or False"),
    ("adamw", ["eps=abc"], InvalidInputError, "eps of adamw is 'abc'"),
    ("adam", ["betas=0.9"], InvalidInputError, "refuses"),
    ("sgd", ["momentum=-1"], InvalidInputError, "refuses"),
    ("soap", ["params=3"], InvalidInputError, "is none"),
    ("soap", ["defaults=3"], UnknownNameError, "option"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(
    name: str, settings: list[str], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        build_optimizer(name, params(), lr=0.1, settings=settings)


@pytest.mark.parametrize("text", ["false", "False", "FALSE"])
def test_booleans_are_booleans(text: str) -> None:
    optimizer = build_optimizer("adamw", params(), settings=[f"maximize={text}"])
    assert optimizer.param_groups[0]["maximize"] is False
    own = build_optimizer("muon", params(), settings=[f"nesterov={text}"])
    assert own.param_groups[0]["nesterov"] is False
    kept = build_optimizer("shampoo", params(), settings=["magnitude.grafting=none"])
    assert kept.param_groups[0]["magnitude"].grafting == "none"


# ---------------------------------------------------------------- settings of one of several

SHARED = ["weight_decay=0.1", "soap:basis.frequency=5", "adamw:lr=3e-3", "basis.frequency=7",
          " soap : weight_decay = 0.2"]  # fmt: skip
NAMES = ("soap", "adamw", "eshampoo")


@pytest.mark.parametrize(("name", "expected"), [
    ("soap", (None, ("basis.frequency=5", "weight_decay = 0.2"))),  # its own replace those of all
    ("adamw", (0.003, ("weight_decay=0.1", "basis.frequency=7"))),
    ("eshampoo", (None, ("weight_decay=0.1", "basis.frequency=7"))),
])  # fmt: skip
def test_a_prefix_names_the_optimizer_that_a_setting_is_for(
    name: str, expected: tuple[float | None, tuple[str, ...]]
) -> None:
    assert settings_for(name, SHARED, NAMES) == expected


def test_an_own_setting_reaches_the_optimizer() -> None:
    lr, settings = settings_for("soap", SHARED, NAMES)
    (group,) = build_optimizer("soap", params(), lr, settings).param_groups
    assert group["basis"].frequency == 5
    assert group["weight_decay"] == 0.2


@pytest.mark.parametrize(("text", "error", "told"), [
    ("adam:lr=1", UnknownNameError, "optimizer of this call 'adam'.*Known: adamw, eshampoo, soap"),
    ("muon:lr=1", UnknownNameError, "Known: adamw, eshampoo, soap"),
    (":lr=1", UnknownNameError, "optimizer of this call ''"),
    ("soap:lr=fast", InvalidInputError, "soap:lr is 'fast'; give a number"),
    ("soap:lr=-1", InvalidInputError, "soap:lr is -1"),
    ("soap:lr=True", InvalidInputError, "soap:lr is True"),
    ("soap:lr=1e999", InvalidInputError, "soap:lr is inf"),
    ("soap:lr", InvalidInputError, "soap:lr is ''"),
])  # fmt: skip
def test_a_prefix_or_a_rate_that_is_none_is_refused(
    text: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        settings_for("soap", [text], NAMES)


def test_an_own_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="'soap:lr' is given twice"):
        settings_for("soap", ["soap:lr=1", "soap:lr=2"], NAMES)
    _, settings = settings_for("soap", ["soap:basis.frequency=1"] * 2, NAMES)
    with pytest.raises(InvalidInputError, match="twice"):
        build_optimizer("soap", params(), settings=settings)


def test_rates_are_those_of_the_groups() -> None:
    one, two = params()
    assert learning_rates(build_optimizer("sgd", [one, two], 0.5)) == [0.5]
    groups: list[dict[str, object]] = [{"params": [one]}, {"params": [two], "lr": 0.25}]
    assert learning_rates(build_optimizer("muon", groups)) == [0.02, 0.25]
    assert learning_rates(build_optimizer("sgd", [one, two], settings=["lr=0.125"])) == [0.125]


def test_muon_has_the_hidden_matrices_of_a_model() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    hidden, others = build_optimizer("muon", model.parameters(), model=model).param_groups
    assert [one is model[0].weight for one in hidden["params"]] == [True]
    assert (hidden["spectrum"].eigenvalues, others["spectrum"].eigenvalues) == (
        "polar",
        "kronecker",
    )
    (alone,) = build_optimizer("muon", params()).param_groups
    assert len(alone["params"]) == len(params())
