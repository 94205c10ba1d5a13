"""On a large batch a small part is checked, and the whole where that leaves a doubt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from kronecker_probe.errors import InvalidInputError
from kronecker_probe.gradients.layers.base import Layout, layouts
from kronecker_probe.gradients.tracing import batch_dimension as separation
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close
from tests.small_modules import CLASSES, Lambda, position_table, seq_first, three

N, PART = 64, 8  # what is checked of 64 data


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Watched(nn.Module):
    """Notes the size of each batch."""

    def __init__(self, model: nn.Module, noted: list[int]) -> None:
        super().__init__()
        self.model = model
        self.note = noted.append  # a list among the attributes would be put back

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return self.model(x)


def captured(
    forward: Callable[[nn.Module, Tensor], Tensor], *shape: int, n_examples: int = N
) -> tuple[kp.Capture, list[int]]:
    """What rules alone measure, and the batches that the model has seen."""
    sizes: list[int] = []
    model = Watched(three(forward).double().eval(), sizes)
    inputs = torch.randn(n_examples, *shape).double()
    targets = torch.randn_like(model(inputs).detach())
    sizes.clear()
    samples = kp.capture(
        model, F.mse_loss, (inputs, targets), target="empirical-fisher", fallback=False
    )
    names = [name for name in samples if name.endswith("weight")]
    expected = oracle.share_gradients(model, F.mse_loss, inputs, targets, names)
    for name in names:
        assert_close(oracle.matrices(samples[name])[:, 0].flatten(1), expected[name].flatten(1))
    return samples, sizes[:2]


def plain(m: nn.Module, x: Tensor) -> Tensor:
    return m.c(torch.tanh(m.b(torch.tanh(m.a(x)))))


def backward_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the outputs of each backward pass from now on."""
    seen: list[int] = []
    real = separation.pull_back

    def spy(outputs: Tensor, *args: object, **kwargs: object) -> list[Tensor]:
        seen.append(len(outputs))
        return real(outputs, *args, **kwargs)

    monkeypatch.setattr(separation, "pull_back", spy)
    return seen


def test_independent_data_cost_a_small_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = backward_rows(monkeypatch)
    samples, sizes = captured(plain, 3)
    assert len(samples) == 6
    assert sizes == [N, PART]
    assert rows == [PART, PART]


def test_a_small_batch_is_checked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = backward_rows(monkeypatch)
    samples, sizes = captured(plain, 3, n_examples=16)
    assert len(samples) == 6
    assert sizes == [16, 16]  # the second is the oracle's
    assert rows == [16, 16]


def test_the_part_is_a_tenth_and_at_most_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = backward_rows(monkeypatch)
    captured(plain, 3, n_examples=300)
    assert rows == [16, 16]


def rolled(by: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        return m.c(m.b(h) + h.roll(by, 0))

    return forward


def halves(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(m.b(h) * (1 + h.view(2, len(h) // 2, -1).std(0).mean(1).repeat(2)[:, None]))


def large_only(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(m.b(h) + (h.mean(0) if len(x) > PART else h))


def mean_of_all(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(m.b(h - h.mean(0)))


@pytest.mark.parametrize(
    ("forward", "mixed"),
    [
        (rolled(1), "a"),
        (rolled(PART), "a"),  # in the part itself each datum meets only itself
        (rolled(N // 2), "a"),
        (halves, "a"),
        (large_only, "a"),
        (mean_of_all, "a"),
    ],
    ids=["neighbour", "period of the part", "half a batch", "groups", "size", "mean"],
)
def test_couplings_are_seen(
    forward: Callable[[nn.Module, Tensor], Tensor], mixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = backward_rows(monkeypatch)
    samples, _ = captured(forward, 3)
    assert set(samples.skipped) == {f"model.{mixed}.weight", f"model.{mixed}.bias"}
    assert "mix in layer" in samples.skipped[f"model.{mixed}.weight"]
    assert rows[-2:] == [N, N]  # the whole batch has decided


@pytest.mark.parametrize("n_examples", [2, 6, 7, 16])
def test_every_pair_of_data_is_told_apart(n_examples: int) -> None:
    """One group of two data, of all others each is alone; whichever they are."""
    for one in range(n_examples):
        for other in range(one):
            group = torch.arange(n_examples)
            group[one] = other
            same = (group[:, None] == group).double()
            model = three(lambda m, x, same=same: m.c(m.b(torch.tanh(same @ m.a(x))))).double()
            batch = torch.randn(n_examples, 3).double(), torch.randint(CLASSES, (n_examples,))
            samples = kp.capture(
                model, F.cross_entropy, batch, target="empirical-fisher", fallback=False
            )
            assert set(samples.skipped) == {"a.weight", "a.bias"}


@pytest.mark.parametrize(
    "last", [lambda z: 1e-36 * z, lambda z: z.half().float()], ids=["underflow", "half"]
)
def test_where_scaled_gradients_underflow_zeros_decide(
    last: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = backward_rows(monkeypatch)
    for forward, apart in ((plain, True), (rolled(1), False)):
        model = three(lambda m, x, forward=forward: last(forward(m, x)))
        batch = torch.randn(16, 3), torch.randn(16, CLASSES)
        rows.clear()
        samples = kp.capture(model, F.mse_loss, batch, target="fisher", fallback=False)
        assert ("a.weight" in samples) == apart
        if apart:
            assert rows == [16] * (2 + 2 * 4)  # both halves of each bit of the index


def test_a_coupling_is_seen_in_half_precision() -> None:
    """Powers of two below 2^-24 are zero there, and zeros would agree with anything."""
    for forward, apart in ((plain, True), (rolled(N // 2), False)):
        model = three(forward).half()
        batch = torch.randn(N, 3).half(), torch.randn(N, CLASSES).half()
        samples = kp.capture(model, F.mse_loss, batch, target="fisher", fallback=False)
        assert ("a.weight" in samples) == apart


def test_an_expert_without_data() -> None:
    def routed(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.a(x))
        first, out = x[:, 0] > 0, torch.zeros_like(h)
        out[first], out[~first] = m.b(h[first]), m.d(h[~first])
        return m.c(out)

    model = three(routed).double()
    model.d = nn.Linear(4, 4).double()
    batch = torch.ones(1, 3).double(), torch.zeros(1, dtype=torch.int64)
    samples = kp.capture(model, F.cross_entropy, batch, target="empirical-fisher")
    expected = oracle.share_gradients(
        model, F.cross_entropy, *batch, [name for name, _ in model.named_parameters()]
    )
    assert "a.weight" not in samples.fallback
    assert "gives [0, 4] for a batch of 1 examples" in samples.fallback["d.weight"]
    assert float(oracle.matrices(samples["d.weight"]).norm()) == 0
    for name in ("a.weight", "b.weight", "c.bias"):
        assert_close(oracle.matrices(samples[name]).flatten(), expected[name].flatten())


def test_a_coupled_model_is_not_measured_by_the_fallback_either() -> None:
    model = three(mean_of_all).double()
    batch = torch.randn(N, 3).double(), torch.randint(CLASSES, (N,))
    samples = kp.capture(model, F.cross_entropy, batch)
    assert not samples.fallback
    assert "a.weight" in samples.skipped


@pytest.mark.parametrize("length", [5, PART, N, 2 * N])
def test_sequences_first_of_any_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = backward_rows(monkeypatch)
    samples, _ = captured(seq_first, length, 3)
    assert len(samples) == 6
    assert samples["model.b.weight"].n_positions == length
    assert rows == [PART, PART]


def test_a_table_as_long_as_the_batch_is_no_batch() -> None:
    model = three(position_table).double()
    model.b = nn.Linear(N, 4).double()
    table = torch.eye(N).double()
    model.function = lambda m, x: m.c(torch.tanh(m.a(x) + 2 * m.b(table)))  # no plain sum
    batch = torch.randn(N, N, 3).double(), torch.randn(N, N, CLASSES).double()
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher", fallback=False)
    assert set(samples.skipped) == {"b.weight", "b.bias"}


def test_a_model_that_takes_only_its_own_batch_size_is_checked_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fixed(m: nn.Module, x: Tensor) -> Tensor:
        return plain(m, x.view(N, 3))

    rows = backward_rows(monkeypatch)
    samples, sizes = captured(fixed, 3)
    assert len(samples) == 6
    assert sizes == [N, PART]
    assert rows == [N, N]


def test_a_model_that_is_never_twice_the_same_is_checked_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Lambda(
        lambda m, x: m.c(F.dropout(torch.tanh(m.a(x)), 0.5, training=True)),
        a=nn.Linear(3, 4), c=nn.Linear(4, CLASSES),
    ).double()  # fmt: skip
    rows = backward_rows(monkeypatch)
    samples = kp.capture(
        model, F.cross_entropy, (torch.randn(N, 3).double(), torch.randint(CLASSES, (N,)))
    )
    assert len(samples) == 4
    assert rows == [N, N]


@pytest.mark.parametrize(
    ("lead", "n_examples", "expected"),
    [
        ((4,), 4, [Layout(1, 1)]),
        ((4, 6), 4, [Layout(1, 6)]),
        ((6, 4), 4, [Layout(6, 1)]),
        ((4, 4), 4, [Layout(1, 4), Layout(4, 1)]),
        ((12,), 4, [Layout(1, 3), Layout(3, 1)]),
        ((2, 3), 4, []),
        ((), 1, [Layout(1, 1)]),
        ((), 2, []),
    ],
)
def test_where_a_batch_can_be(
    lead: tuple[int, ...], n_examples: int, expected: list[Layout]
) -> None:
    assert layouts(lead, n_examples) == expected


def test_a_layout_brings_a_datum_s_rows_together() -> None:
    datum = torch.arange(3)[:, None, None].expand(3, 5, 2)  # [N, T, k]
    for tensor, layout in (
        (datum, Layout(1, 5)),
        (datum.transpose(0, 1), Layout(5, 1)),
        (datum.reshape(15, 2), Layout(1, 5)),
        (datum.transpose(0, 1).reshape(15, 2), Layout(5, 1)),
    ):
        assert torch.equal(layout.arrange(tensor, tensor.ndim - 1), datum)


class Static(nn.Module):
    """Copies its inputs into a buffer of its own, as for replayed graphs; mixes data if coupled."""

    def __init__(self, n_examples: int, *, coupled: bool, registered: bool) -> None:
        super().__init__()
        self.b = nn.Linear(5, CLASSES)
        self.coupled = coupled
        self.register_buffer("held", torch.zeros(n_examples, 5))
        if not registered:
            del self._buffers["held"]
            self.held = torch.zeros(n_examples, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        held = self.held[: len(x)]
        held.copy_(x)
        y = self.b(held)
        return y + y.roll(1, 0) if self.coupled else y


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("n_examples", [PART, N])
def test_a_model_that_writes_into_its_own_buffer(n_examples: int, registered: bool) -> None:
    model = Static(n_examples, coupled=False, registered=registered).double()
    batch = torch.randn(n_examples, 5).double(), torch.randn(n_examples, CLASSES).double()
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher", fallback=False)
    expected = oracle.share_gradients(model.b, F.mse_loss, *batch, ["weight"])["weight"]
    measured = oracle.matrices(samples["b.weight"])[:, 0]
    assert_close(measured.flatten(1), expected.flatten(1))
    assert not model.held.any()


def test_a_model_that_writes_into_its_own_buffer_is_still_checked() -> None:
    model = Static(N, coupled=True, registered=True).double()
    batch = torch.randn(N, 5).double(), torch.randn(N, CLASSES).double()
    with pytest.raises(InvalidInputError, match="gradients of different examples mix"):
        kp.capture(model, F.mse_loss, batch, target="empirical-fisher", fallback=False)
