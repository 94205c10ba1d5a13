"""From the table of the variants to what is drawn and concluded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from kronecker_probe import optim
from kronecker_probe.plots.panels import GREY, Style

NAME, WORKLOAD = "purifying", "digits-mlp"

BETAS, WINDOW = (0.9, 0.99), 500

TESTED = 10  # steps from one test of the tolerance to the next

Build = Callable[..., optim.KroneckerOptimizer]

SQUARE = {"trace_scale": False, "exponent": -0.5}

UNGRAFTED = {"magnitude": {"grafting": "none"}}

# On white noise: the preset, its options, and the power of mn that theory gives its update.
MAGNITUDES: dict[str, tuple[Build, dict[str, Any], float]] = {
    "EShampoo": (optim.EShampoo, {}, 0.0),
    "Shampoo, Adam grafting": (optim.Shampoo, {}, 0.0),
    "Shampoo², trace scaled": (optim.ShampooSquared, {}, 0.0),
    "Shampoo": (optim.Shampoo, UNGRAFTED, -0.25),
    "Shampoo², no trace": (optim.ShampooSquared, {"spectrum": SQUARE}, -0.5),
}

GRAFTED, REFERENCE = "Shampoo, Adam grafting", "EShampoo, renewed every step"

ALWAYS = {"frequency": 1}

# What gets the gradients of the training: the preset, and what is changed in its basis and else.
FOLLOWERS: dict[str, tuple[Build, dict[str, Any], dict[str, Any]]] = {
    "Shampoo": (optim.Shampoo, {}, UNGRAFTED),
    GRAFTED: (optim.Shampoo, {}, {}),
    "EShampoo": (optim.EShampoo, {}, {}),
    "EShampoo, marginals matched": (optim.EShampoo, {"marginals": True}, {}),
    "Shampoo, renewed every step": (optim.Shampoo, ALWAYS, UNGRAFTED),
    # with second moments that follow the bases, as these turn in every step
    REFERENCE: (optim.EShampoo, ALWAYS | {"carry": "transport"}, {}),
}

# Okabe and Ito's colours, with markers and lines that differ, too
LOOKS = {
    "EShampoo": Style("#0072b2", "o", "-"),
    "Shampoo, Adam grafting": Style("#009e73", "s", (0, (5, 2))),
    "Shampoo², trace scaled": Style("#cc79a7", "D", "-"),
    "Shampoo": Style("#d55e00", "^", "-"),
    "Shampoo², no trace": Style("#e69f00", "v", "-"),
    "EShampoo, marginals matched": Style("#56b4e9", "X", (0, (3, 1))),
    "Shampoo, renewed every step": Style("#000000", "_", (0, (1, 1))),
    REFERENCE: Style(GREY, "|", (0, (3, 1, 1, 1))),
    "interval": Style("#d55e00", "^", "-"),
    "tolerance": Style("#0072b2", "o", "-"),
}

DRIFTS = {
    "basis_ratio": ("basis error: only a refresh repairs it", "beside that of renewed bases"),
    "eigenvalue_error": ("eigenvalue error: correction repairs it", "|diag(QᵀHQ) − D| / |H|"),
    "length": ("length of steps: grafting repairs it", "beside EShampoo renewed"),
    "cosine": ("direction: grafting leaves it", "cosine to EShampoo renewed"),
}

# grafting has the bases and directions of Shampoo, whose bases are those of EShampoo
SHOWN = {
    "basis_ratio": ("EShampoo", REFERENCE),
    "cosine": ("Shampoo", "EShampoo", "EShampoo, marginals matched"),
}

RULES = {
    "loss": ("loss after training", "training loss"),
    "seconds": ("CPU time of the optimizer", "seconds"),
}

# text, offset in points and rotation
LABELS: dict[str, tuple[str, tuple[int, int], int]] = {
    "interval": ("F = {:g}", (4, -8), 0),
    "tolerance": ("τ = {:g}", (-3, 6), 60),
}


def expected_rms(variant: str, mn: float) -> float:
    """Of an update of white noise, by theory."""
    return float(mn ** MAGNITUDES[variant][2])


def magnitude_errors(table: pd.DataFrame) -> pd.Series:
    """|measured / theory - 1| on white noise, the median of the seeds by variant and shape."""
    rows = table[table["part"] == "magnitude"]
    sizes = rows["m"] * rows["n"]
    theory = [expected_rms(v, mn) for v, mn in zip(rows["variant"], sizes, strict=True)]
    off = (rows["value"] / theory - 1).abs()
    return off.groupby([rows["variant"], rows["m"], rows["n"]]).median()


def drifted(table: pd.DataFrame, measured: str) -> pd.DataFrame:
    """One quantity by variant and age: median, least and largest of layers, cycles and seeds."""
    rows = table[(table["part"] == "drift") & (table["measured"] == measured)]
    return rows.groupby(["variant", "age"])["value"].agg(["median", "min", "max"])


def renewals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean refreshes of a factor, seconds and loss: a row a rule, setting and seed.

    Each rule and setting has the learning rate that gives it the least median loss.
    """
    rows = table[table["part"] == "refresh"]
    keys = ["variant", "setting", "lr"]
    means = rows.groupby([*keys, "seed", "measured"])["value"].mean().unstack("measured")
    medians = means["loss"].groupby(keys).median()
    best = medians.groupby(["variant", "setting"]).idxmin()
    chosen = [means.xs(key, level=keys, drop_level=False) for key in best]
    return pd.concat(chosen).reset_index("lr")


def sentences(table: pd.DataFrame) -> tuple[str, ...]:
    """What to conclude: of drift (the title), white noise, and rules of renewal."""
    return _of_drift(table), _of_noise(table), _of_rules(table)


def _of_drift(table: pd.DataFrame) -> str:
    length: Any = drifted(table, "length")
    values: Any = drifted(table, "eigenvalue_error")["median"]
    basis: Any = drifted(table, "basis_ratio")["median"]
    first, *_, last = values.index.unique("age")
    plain, grafted = (
        length.loc[name, "max"].max() / length.loc[name, "min"].min()
        for name in ("Shampoo", GRAFTED)
    )
    return (
        f"Grafting repairs the length of Shampoo's steps: it varies {plain:.0f}-fold over "
        f"layers and ages without, {grafted:.1f}-fold with it. Correction repairs eigenvalues: "
        f"their error is {values['EShampoo', first]:.2f} at a refresh and "
        f"{values['EShampoo', last]:.2f} after {last:.0f} steps, with grafting "
        f"{values[GRAFTED, first]:.2f} and {values[GRAFTED, last]:.2f}. Neither repairs the basis, "
        f"whose error grows by {basis['EShampoo', last] - 1:.1%}"
    )


def _of_noise(table: pd.DataFrame) -> str:
    rows = table[table["part"] == "magnitude"]
    sizes = rows["m"] * rows["n"]
    small = rows.loc[(sizes == sizes.max()) & (rows["variant"] == "Shampoo"), "value"].median()
    return (
        f"On white noise every update is within {magnitude_errors(table).max():.0%} of theory: "
        f"Shampoo's is (mn)^-1/4, {small:.3f} of full-matrix Adam's at mn = {sizes.max():.0f}; "
        "grafting, the trace scale and corrected eigenvalues each bring it to 1"
    )


def _of_rules(table: pd.DataFrame) -> str:
    over = renewals(table).groupby(["variant", "setting"])
    medians, low, high = (getattr(over, how)() for how in ("median", "min", "max"))
    parts = [
        f"{key[0]} {key[1]:g}: loss {one['loss']:.4f} ({low.loc[key, 'loss']:.4f} to "
        f"{high.loc[key, 'loss']:.4f}) at lr {one['lr']:g}, {one['refreshes']:.0f} refreshes of a "
        f"factor, {one['seconds']:.2f} s"
        for key, one in medians.iterrows()
    ]
    return "; ".join(parts).capitalize()
