"""Solvers that fail, and the precision of statistics and steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from kronecker_probe import optim
from kronecker_probe.errors import InvalidInputError, NonFiniteError
from kronecker_probe.optim.preconditioners import factored as factors
from kronecker_probe.optim.preconditioners import inverse_free, kronecker, polar
from tests.optimizer_cases import PRESETS, Problem, break_eigh, step_of


def run(optimizer: Any, param: torch.Tensor, start: int, stop: int) -> None:
    problem = Problem(tuple(param.shape))
    for t in range(start, stop):
        optimizer.zero_grad()
        problem.loss(param, t).backward()
        optimizer.step()


def held(optimizer: Any, param: torch.Tensor, name: str) -> torch.Tensor:
    tensor: torch.Tensor = optimizer.state[param][name]
    return tensor.clone()


@pytest.mark.parametrize(
    ("preset", "tensor", "what"),
    [
        (optim.Shampoo, "root", "inverse root"),
        (optim.ShampooSquared, "root", "inverse root"),
        (optim.KLShampoo, "root", "inverse root"),
        (optim.EShampoo, "basis", "eigenbasis"),
    ],
)
def test_a_failed_factor_keeps_the_last_good_one_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, preset: Any, tensor: str, what: str
) -> None:
    param = Problem((5, 4)).parameter()
    optimizer = preset([("layer.weight", param)], lr=1e-3, basis={"frequency": 2, "start": 2})
    run(optimizer, param, 0, 2)
    kept, other = (held(optimizer, param, f"{tensor}_{side}") for side in (0, 1))
    with monkeypatch.context() as broken:
        break_eigh(broken, 5)
        text = f"No {what} of factor 0 of parameter 'layer.weight' was found at step 4"
        with pytest.warns(RuntimeWarning, match=text) as warned:
            run(optimizer, param, 2, 4)
        assert [one.filename for one in warned] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(optimizer, param, 4, 8)
    assert torch.equal(held(optimizer, param, f"{tensor}_0"), kept)
    assert not torch.equal(held(optimizer, param, f"{tensor}_1"), other)
    assert held(optimizer, param, "failures").tolist() == [[3, 0]]
    assert held(optimizer, param, "refreshed").tolist() == [[2, 8]]
    run(optimizer, param, 8, 10)
    assert not torch.equal(held(optimizer, param, f"{tensor}_0"), kept)
    assert held(optimizer, param, "failures").tolist() == [[0, 0]]
    assert param.isfinite().all()


def test_too_many_failures_in_a_row_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    param = Problem((5, 4)).parameter()
    optimizer = optim.Shampoo([param], basis={"frequency": 1}, failures=2)
    run(optimizer, param, 0, 1)
    with monkeypatch.context() as broken:
        break_eigh(broken, 5)
        with pytest.warns(RuntimeWarning):
            run(optimizer, param, 1, 3)
    run(optimizer, param, 3, 4)  # a success in between
    break_eigh(monkeypatch, 5)
    run(optimizer, param, 4, 6)
    before = param.detach().clone()
    with pytest.raises(InvalidInputError, match=r"at step 7, 3 times in a row.*spectrum\.epsilon"):
        run(optimizer, param, 6, 7)
    assert torch.equal(param, before)


def test_a_failure_in_a_stack_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal blocks one cannot be solved: its factor holds a marker."""
    params = [Problem((5, 5), seed=k).parameter() for k in (0, 1)]
    optimizer = optim.Shampoo(params, basis={"frequency": 1})
    for k, param in enumerate(params):
        run(optimizer, param, k, k + 1)
    solve = torch.linalg.eigh

    def eigh(A: torch.Tensor) -> Any:
        values, vectors = solve(A)
        bad = A.diagonal(dim1=1, dim2=2).sum(1) > 1e5
        return values.masked_fill(bad[:, None], torch.nan), vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    kept = [held(optimizer, param, "root_0") for param in params]
    for k, param in enumerate(params):
        param.grad = torch.full((5, 5), 1e6 if k else 1.0, dtype=torch.float64)
        param.grad += torch.eye(5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="of parameter 1 of group 0"):
        optimizer.step()
    assert not torch.equal(held(optimizer, params[0], "root_0"), kept[0])
    assert torch.equal(held(optimizer, params[1], "root_0"), kept[1])
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("root", ["newton", "matmul"])
def test_iterations_that_miss_their_tolerance_are_replaced_by_a_decomposition(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 4, generator=generator) for _ in range(3)]
    options: dict[str, Any] = {"epsilon": 1e-3, "basis": {"frequency": 1}}
    expected, *_ = step_of(gradients, **options)
    found, optimizer, param = step_of(gradients, spectrum={"root": root}, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert optimizer.state[param]["iterations"].min() > 0
    solve = kronecker._ITERATIONS[root]

    def failing(*arguments: Any) -> Any:
        roots = solve(*arguments)
        roots.ok.zero_()
        roots.values.fill_(torch.nan)
        return roots

    monkeypatch.setattr(kronecker, "_ITERATIONS", {root: failing})
    found, optimizer, param = step_of(gradients, spectrum={"root": root}, **options)
    assert torch.equal(found, expected)
    assert optimizer.state[param]["failures"].max() == 0


def test_a_polar_factor_that_is_not_found_is_approximated(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    expected, *_ = step_of(gradients, preset=optim.Muon)
    monkeypatch.setattr(polar, "polar", lambda G: torch.full_like(G, torch.nan))
    found, *_ = step_of(gradients, preset=optim.Muon, spectrum={"root": "eigh"})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_the_factor_of_the_batch_counts_in_what_overflows(structure: str) -> None:
    gradients = [torch.ones(4, 3), torch.full((4, 3), 4e18)]
    with pytest.raises(NonFiniteError, match="overflows its statistics"):
        step_of(
            gradients,
            torch.float32,
            optim.InverseFreeShampoo,
            batch_size=10**6,
            inverse={"structure": structure},
        )


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_that_overflows_does_not_reach_a_weight(structure: str, nonfinite: str) -> None:
    options: dict[str, Any] = {"inverse": {"structure": structure}, "nonfinite": nonfinite}
    _, optimizer, param = step_of(
        [torch.ones(4, 3)], torch.float32, optim.InverseFreeShampoo, **options
    )
    state = optimizer.state[param]
    for side in (0, 1):
        state[f"inverse_{side}"].mul_(1e10)
    before = param.detach().clone()
    param.grad = torch.ones(4, 3)
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=r"The step of parameter 0 .* No weight"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(param, before)
    assert all(v.isfinite().all() for k, v in state.items() if "velocity" in k or "inverse" in k)


def test_inputs_that_never_fire_stop_growing_without_damping() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = []
    for _ in range(600):
        gradient = torch.randn(6, 5, generator=generator)
        gradient[:, :2] = 0.0
        gradients.append(gradient)
    _, optimizer, param = step_of(
        gradients, torch.float32, optim.InverseFreeShampoo, inverse={"damping": 0.0, "lr": 1.0}
    )
    held = optimizer.state[param]["inverse_1"]
    assert 1e5 < float(held.abs().max()) < 1e8
    assert param.isfinite().all()


@pytest.mark.parametrize("grafting", ["adam", "rmsprop", "adagrad", "sgd", "none"])
@pytest.mark.parametrize("max_dim", [1, 1024])
def test_zero_gradients_without_epsilon_give_no_nan(grafting: str, max_dim: int) -> None:
    magnitude: dict[str, Any] = {"grafting": grafting}
    if grafting not in ("sgd", "none"):
        magnitude["epsilon"] = 0.0
    change, *_ = step_of(
        [torch.zeros(4, 3)] * 3,
        epsilon=0.0,
        magnitude=magnitude,
        shapes={"max_dim": max_dim},
        basis={"frequency": 1},
    )
    assert torch.equal(change, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_step_as_float32_ones_rounded(
    name: str, dtype: torch.dtype
) -> None:
    gradients = [torch.randn(6, 5, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    rounded = [gradient.to(dtype) for gradient in gradients]
    # Weights of 0 with weight decay would make states differ by the rounding of the weights
    _, low, param = step_of(rounded, dtype, PRESETS[name])
    _, full, twin = step_of([g.float() for g in rounded], torch.float32, PRESETS[name])
    for key, value in full.state[twin].items():
        same = low.state[param][key]
        assert torch.equal(same, value) if isinstance(value, torch.Tensor) else same == value
    resolution = torch.finfo(dtype).eps
    size = float(twin.detach().abs().max())
    # each of 4 steps rounds the weight once
    difference = float((param.float() - twin).abs().max())
    assert difference <= 4 * resolution * max(1.0, 2 * size)


def test_half_precision_rounds_the_weight_not_the_update() -> None:
    """An update above the range of float16 times a small rate is a step like any other."""
    param = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float16))
    optimizer = optim.Shampoo(
        [param],
        lr=1e-6,
        betas=(0.0, 0.9),
        epsilon=1e-16,
        magnitude={"grafting": "none"},
        basis={"start": 1, "frequency": 100},
    )
    for gradient in (1e-3 * torch.eye(3), torch.ones(3, 3) + torch.eye(3), torch.eye(3)):
        param.grad = gradient.half()
        param.grad[0] *= 0.0 if optimizer.state.get(param) is None else 1.0
        optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("name", ["shampoo", "eshampoo", "kl-shampoo", "inverse-free-shampoo"])
def test_autocast_and_reduced_products_do_not_reach_the_statistics(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = [torch.randn(40, 30, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    expected, *_ = step_of(gradients, torch.float32, PRESETS[name])
    seen = []
    module = inverse_free if "inverse" in name else factors
    unfold = module.unfold

    def spy(*arguments: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return unfold(*arguments)

    monkeypatch.setattr(module, "unfold", spy)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, *_ = step_of(gradients, torch.float32, PRESETS[name])
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert set(seen) == {"ieee"}
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("block_size", [None, 2])
def test_memory_format_does_not_matter(name: str, block_size: int | None) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(weight.clone().to(memory_format=form))
        optimizer = PRESETS[name](
            [param], lr=1e-3, weight_decay=0.1, shapes={"block_size": block_size}
        )
        for seed in (1, 2):
            gradient = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
            param.grad = gradient.to(memory_format=form)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_step_that_is_not_finite_moves_no_other_group(nonfinite: str) -> None:
    sound, huge = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
    optimizer = optim.InverseFreeShampoo([{"params": [sound]}, {"params": [huge]}], lr=0.1,
                                         nonfinite=nonfinite)  # fmt: skip
    sound.grad = huge.grad = torch.ones(4, 3)
    optimizer.step()
    for side in (0, 1):
        optimizer.state[huge][f"inverse_{side}"].mul_(1e10)
    before = sound.detach().clone()
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match="No weight was changed"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(sound, before)
