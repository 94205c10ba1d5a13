"""Choices that do not go together."""

from __future__ import annotations

from collections.abc import Iterator

from kronecker_probe.errors import InvalidInputError
from kronecker_probe.optim.options.sections import (
    Basis,
    Inverse,
    Magnitude,
    Shapes,
    Spectrum,
    Statistics,
    Storage,
)

Refusal = tuple[bool, str]


def check_together(
    statistics: Statistics,
    basis: Basis,
    spectrum: Spectrum,
    inverse: Inverse,
    magnitude: Magnitude,
    shapes: Shapes,
    storage: Storage,
) -> None:
    """Refuse combinations that make no sense, or in which an option would have no effect.

    Raises:
        InvalidInputError: One of them; the message says why.
    """
    refusals = [
        *_without_eigenbases(statistics, basis, spectrum),
        *_of_corrected(statistics, basis, spectrum),
        *_without_factors(statistics, basis, spectrum),
        *_of_inverse(spectrum, inverse),
        *_of_magnitude(magnitude),
        *_of_storage(spectrum, storage),
        *_of_kfac(statistics, basis, shapes),
        (
            spectrum.eigenvalues == "polar" and shapes.max_dim != Shapes().max_dim,
            f"shapes.max_dim is {shapes.max_dim}, but a polar factor has no factors to leave out; "
            "drop it.",
        ),
        (
            spectrum.eigenvalues == "polar" and shapes.merge > 0,
            f"shapes.merge is {shapes.merge}, but a polar factor is that of a matrix; use merge=0.",
        ),
    ]
    for refused, text in refusals:
        if refused:
            raise InvalidInputError(text)


def _without_eigenbases(
    statistics: Statistics, basis: Basis, spectrum: Spectrum
) -> Iterator[Refusal]:
    """Roots by products alone, and what would need a basis."""
    alone = spectrum.root != "eigh" and spectrum.eigenvalues == "kronecker"
    root = f"spectrum.root={spectrum.root!r}"
    yield (
        alone and basis.solver == "qr",
        f"basis.solver='qr' refreshes a basis, and {root} has none; use root='eigh' or drop the "
        "solver.",
    )
    yield (
        alone and basis.tolerance is not None,
        f"basis.tolerance tests a basis, and {root} has none; use root='eigh', or a fixed "
        "frequency.",
    )
    yield (
        alone and statistics.rule == "whitened",
        f"statistics.rule='whitened' needs the eigenvalues of the factors, and {root} finds none; "
        "use root='eigh'.",
    )
    p = 1 / (spectrum.power if spectrum.exponent is None else -spectrum.exponent)
    yield (
        alone and abs(p - round(p)) > 1e-9 * p,
        f"{root} takes inverse roots of an integer order, and -1 / exponent is {p:g}; use "
        "root='eigh'.",
    )


def _of_corrected(statistics: Statistics, basis: Basis, spectrum: Spectrum) -> Iterator[Refusal]:
    """What is about second moments in the bases."""
    yield (
        spectrum.eigenvalues != "corrected" and (basis.carry != "keep" or basis.marginals),
        "basis.carry and basis.marginals are about corrected eigenvalues; use "
        "spectrum.eigenvalues='corrected', or drop them.",
    )
    yield (
        statistics.rule == "whitened" and basis.marginals,
        "basis.marginals takes the diagonals of the factors for sums of the second moment, which "
        "whitened factors do not have; use statistics.rule='gradient', or drop it.",
    )


def _without_factors(statistics: Statistics, basis: Basis, spectrum: Spectrum) -> Iterator[Refusal]:
    """Polar factors and inverse-free ones: no bases, roots or powers."""
    kind = spectrum.eigenvalues
    without = kind in ("polar", "inverse-free")
    has = f"spectrum.eigenvalues={kind!r} has no"
    yield (
        without and (basis != Basis() or spectrum.epsilon != Spectrum().epsilon),
        f"{has} bases or roots to refresh or to damp; drop basis and spectrum.epsilon.",
    )
    yield (
        without and (statistics.accumulate != "average" or statistics.initial > 0),
        f"{has} second moments; drop statistics.accumulate and statistics.initial.",
    )
    yield (
        kind == "polar" and (statistics.every > 1 or statistics.batch_size > 1),
        f"{has} statistics; drop statistics.every and statistics.batch_size.",
    )
    yield (
        without and statistics.rule != "gradient",
        f"{has} factors to whiten or to record; drop statistics.rule={statistics.rule!r}.",
    )
    yield (
        without and (spectrum.exponent is not None or spectrum.trace_scale or spectrum.relative),
        f"{has} eigenvalues; drop spectrum.exponent, trace_scale and relative.",
    )
    yield (
        kind == "inverse-free" and spectrum.root != "eigh",
        f"{has} roots; drop spectrum.root={spectrum.root!r}.",
    )
    yield (
        kind == "inverse-free" and spectrum.power != 1.0,
        f"spectrum.power is {spectrum.power}, but inverse-free factors are inverses; use power=1.",
    )
    yield (
        kind == "polar" and spectrum.root == "newton",
        "spectrum.root='newton' finds inverse roots; use 'eigh' or 'matmul' for a polar factor.",
    )


def _of_inverse(spectrum: Spectrum, inverse: Inverse) -> Iterator[Refusal]:
    yield (
        spectrum.eigenvalues != "inverse-free" and inverse != Inverse(),
        "inverse is about inverse-free factors; use spectrum.eigenvalues='inverse-free', or drop "
        "it.",
    )


def _of_magnitude(magnitude: Magnitude) -> Iterator[Refusal]:
    plain = magnitude.grafting in ("none", "sgd")
    yield (
        plain and magnitude.epsilon != Magnitude().epsilon,
        f"magnitude.epsilon is {magnitude.epsilon}, but grafting={magnitude.grafting!r} divides by "
        "nothing; drop it, or use 'adagrad', 'rmsprop' or 'adam'.",
    )


def _of_storage(spectrum: Spectrum, storage: Storage) -> Iterator[Refusal]:
    """Factors and roots that are not there."""
    kind = spectrum.eigenvalues
    instead = ": use inverse.precision='bfloat16'" if kind == "inverse-free" else "; drop it"
    yield (
        kind in ("polar", "inverse-free") and storage.factors != "full",
        f"storage.factors is {storage.factors!r}, but spectrum.eigenvalues={kind!r} accumulates no "
        f"factors{instead}.",
    )
    yield (
        kind != "kronecker" and storage.roots != "full",
        f"storage.roots is {storage.roots!r}, but spectrum.eigenvalues={kind!r} holds no roots, "
        "which are symmetric; drop it.",
    )


def _of_kfac(statistics: Statistics, basis: Basis, shapes: Shapes) -> Iterator[Refusal]:
    """Factors of inputs and output gradients, which are those of whole matrices."""
    kfac = statistics.rule == "kfac"
    yield (
        kfac and (shapes.block_size is not None or shapes.merge > 0),
        "statistics.rule='kfac' has factors of whole m x n matrices; drop shapes.block_size and "
        "shapes.merge.",
    )
    yield (
        kfac and shapes.vectors == "diagonal",
        "statistics.rule='kfac' gives biases the factor of the output gradients; drop "
        "shapes.vectors='diagonal', or put biases into a group of another rule.",
    )
    yield (
        kfac and basis.marginals,
        "basis.marginals takes the diagonals of the factors for sums of the second moment, which "
        "those of statistics.rule='kfac' are not; drop it.",
    )
