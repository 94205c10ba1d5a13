"""What a capture says about itself: names, order, weights, coverage, notes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronecker_probe as kp
from tests import functional_oracle as oracle
from tests.functional_oracle import assert_close, second_moment
from tests.small_models import SMALL_MODELS, N
from tests.small_modules import CLASSES, Lambda, three


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("target", "options", "columns", "weight"),
    [
        ("ggn", {}, CLASSES, 1 / N),
        ("empirical-fisher", {}, 1, 1 / N),
        ("fisher", {}, 1, 1 / N),
        ("fisher", {"label_draws": 5}, 5, 1 / (5 * N)),
    ],
)
def test_columns_and_weights(
    target: str, options: dict[str, int], columns: int, weight: float
) -> None:
    small = SMALL_MODELS["2-D"]
    batch = small.batch("cross-entropy")
    samples = kp.capture(small.model(), F.cross_entropy, batch, target=target, **options)
    for one in samples.values():
        assert one.n_examples == N
        assert one.n_columns == columns
        assert one.n_positions == 1
        assert one.weights.dtype == torch.float64
        np.testing.assert_allclose(one.weights.numpy(), np.full(N, weight), rtol=1e-15)
    assert samples.target == target


def test_a_datum_of_several_positions_has_a_column_for_each_output() -> None:
    small = SMALL_MODELS["3-D"]
    samples = kp.capture(small.model(), small.loss("cross-entropy"), small.batch("cross-entropy"))
    assert samples["0.weight"].n_columns == 2 * CLASSES
    assert samples["0.weight"].n_positions == 2
    assert samples["0.weight"].inputs.shape == (N, 2, 3)


def test_a_convolution_is_out_by_in_k_k_as_its_weight_flattens() -> None:
    small = SMALL_MODELS["conv tuples"]
    model, batch = small.model(), small.batch("mse")
    samples = kp.capture(model, F.mse_loss, batch, target="empirical-fisher")
    weight = model[0].weight
    assert samples["0.weight"].shape == tuple(weight.flatten(1).shape) == (3, 2 * 3 * 2)
    F.mse_loss(model(batch[0]), batch[1]).backward()
    mean = samples["0.weight"].matrices().mean(0)[0]
    assert_close(mean, weight.grad.flatten(1))


@pytest.mark.parametrize("name", ["called twice", "tied", "registered twice"])
def test_calls_of_one_weight_are_positions_of_one_datum(name: str) -> None:
    small = SMALL_MODELS[name]
    samples = kp.capture(small.model(), F.mse_loss, small.batch("mse"))
    assert samples["b.weight"].n_positions == 2
    assert samples["b.weight"].n_examples == N


def test_names_are_those_of_named_parameters_in_their_order() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z, self.y, self.x = nn.Linear(4, 3), nn.Linear(4, 4), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.z(torch.tanh(self.y(self.x(x))))

    small = SMALL_MODELS["2-D"]
    model = Backwards().double()
    samples = kp.capture(model, F.cross_entropy, small.batch("cross-entropy"))
    assert list(samples) == [f"{n}.{kind}" for n in "zyx" for kind in ("weight", "bias")]
    some = kp.capture(model, F.cross_entropy, small.batch("cross-entropy"), layers="*.weight")
    assert list(some) == ["z.weight", "y.weight", "x.weight"]
    assert list(some.skipped) == ["z.bias", "y.bias", "x.bias"]
    assert samples["x.weight"].shape == tuple(model.x.weight.shape)


def test_layers_selects_by_glob_and_keeps_the_order_of_the_model() -> None:
    model, batch = three(lambda m, x: m.c(m.b(m.a(x)))).double(), SMALL_MODELS["2-D"].batch("mse")
    some = kp.capture(model, F.mse_loss, batch, layers=["c.*", "a.weight"])
    assert list(some) == ["a.weight", "c.weight", "c.bias"]
    assert "not selected by layers=['c.*', 'a.weight']" in some.skipped["b.weight"]
    whole = kp.capture(model, F.mse_loss, batch)
    assert len(whole) == 6
    assert torch.equal(some["a.weight"].output_grads, whole["a.weight"].output_grads)


# measured, by the fallback, and skipped
THREEFOLD = SMALL_MODELS["another weight by functional_call"]


def test_coverage_has_a_row_for_every_parameter() -> None:
    model = THREEFOLD.model()
    coverage = kp.capture(model, F.cross_entropy, THREEFOLD.batch("cross-entropy")).coverage
    assert sorted(coverage["parameter"]) == sorted(name for name, _ in model.named_parameters())
    rows = coverage.set_index("parameter")
    assert rows["status"].to_dict() == {
        "a.weight": "fallback", "a.bias": "measured", "c.weight": "measured",
        "c.bias": "measured", "b.weight": "skipped", "b.bias": "skipped",
    }  # fmt: skip
    assert rows.loc["a.weight", "shape"] == "4 x 3"
    assert rows.loc["a.bias", "shape"] == "4 x 1"
    assert tuple(rows.loc["c.weight", ["n_examples", "n_columns", "n_positions"]]) == (
        N,
        CLASSES,
        1,
    )
    assert "no rule" in rows.loc["a.weight", "reason"]
    assert pd.isna(rows.loc["a.weight", "n_positions"])
    assert pd.isna(rows.loc["b.weight", "n_examples"])


def test_the_notebook_view_is_the_coverage_table() -> None:
    samples = kp.capture(THREEFOLD.model(), F.cross_entropy, THREEFOLD.batch("cross-entropy"))
    html = samples._repr_html_()
    assert "the forward pass does not read it" in html
    assert html.count("<tr") == 1 + 6


def test_a_skipped_name_says_why_and_an_unknown_one_what_is_near() -> None:
    samples = kp.capture(THREEFOLD.model(), F.cross_entropy, THREEFOLD.batch("cross-entropy"))
    with pytest.raises(KeyError, match=r"'b\.weight' was skipped: unused"):
        samples["b.weight"]
    with pytest.raises(KeyError, match=r"'c\.wieght'.*Did you mean 'c\.weight'"):
        samples["c.wieght"]
    assert "b.weight" not in samples
    assert samples.get("b.weight") is None
    assert len(samples) == len(list(samples)) == 4


@pytest.mark.parametrize("class_dim", [1, 2])
def test_loss_and_accuracy_are_those_of_the_batch(class_dim: int) -> None:
    small = SMALL_MODELS["classes second" if class_dim == 1 else "3-D"]
    model, (inputs, targets) = small.model(), small.batch("cross-entropy")
    loss = small.loss("cross-entropy")
    samples = kp.capture(model, loss, (inputs, targets))
    outputs = model(inputs)
    assert samples.loss == pytest.approx(loss(outputs, targets).item(), rel=1e-14)
    correct = outputs.argmax(class_dim) == targets
    assert samples.accuracy == pytest.approx(float(correct.double().mean()), rel=1e-14)
    assert kp.capture(model, F.mse_loss, small.batch("mse")).accuracy is None


def test_one_datum_is_enough() -> None:
    small = SMALL_MODELS["3-D"]
    model, batch = small.model(), small.batch("mse", 1)
    samples = kp.capture(model, F.mse_loss, batch)
    expected = oracle.gauss_newton(model, F.mse_loss, *batch, small.measured)
    for name in small.measured:
        assert_close(second_moment(samples[name]), expected[name])


def test_samples_hold_no_graph() -> None:
    small = SMALL_MODELS["conv default"]
    for one in kp.capture(small.model(), F.mse_loss, small.batch("mse")).values():
        assert not one.output_grads.requires_grad
        assert not one.inputs.requires_grad
        assert one.output_grads.grad_fn is None


def regularized() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, CLASSES)
    )
    model[1].running_mean.normal_(generator=torch.Generator().manual_seed(3))
    return model.double()


def test_dropout_and_batch_norm_are_measured_as_in_eval_mode_and_the_note_says_so() -> None:
    batch = SMALL_MODELS["2-D"].batch("cross-entropy")
    model = regularized().train()
    training = kp.capture(model, F.cross_entropy, batch)
    assert training.note == "measured in eval mode: BatchNorm1d at 1, Dropout (p=0.5) at 3"
    reasons = training.coverage.set_index("parameter")["reason"]
    assert reasons["0.weight"] == training.note
    assert kp.compare(training, ["diagonal"]).table["note"].dropna().str.contains("eval mode").any()
    evaluated = kp.capture(model.eval(), F.cross_entropy, batch)
    assert evaluated.note == ""
    assert evaluated.loss == training.loss
    for name in ("0.weight", "4.weight"):
        assert torch.equal(training[name].output_grads, evaluated[name].output_grads)
        assert torch.equal(training[name].inputs, evaluated[name].inputs)
    expected = oracle.gauss_newton(model, F.cross_entropy, *batch, ["0.weight", "4.weight"])
    assert_close(second_moment(training["0.weight"]), expected["0.weight"])


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Dropout(0.0), ""),
        (nn.Dropout2d(0.25), "Dropout2d (p=0.25) at layer"),
        (nn.AlphaDropout(0.1), "AlphaDropout (p=0.1) at layer"),
        (nn.RReLU(), "RReLU at layer"),
        (nn.MultiheadAttention(3, 1, dropout=0.3), "MultiheadAttention (p=0.3) at layer"),
        (nn.LSTM(3, 3, 2, dropout=0.2), "LSTM (p=0.2) at layer"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "InstanceNorm1d at layer"),
        (nn.InstanceNorm1d(3), ""),
        (nn.SyncBatchNorm(3), "SyncBatchNorm at layer"),
        (nn.LayerNorm(3), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_note_names_what_changes_with_the_mode(layer: nn.Module, said: str) -> None:
    model = Lambda(lambda m, x: m.head(x), head=nn.Linear(3, CLASSES), layer=layer)
    batch = torch.randn(N, 3), torch.zeros(N, dtype=torch.int64)
    note = kp.capture(model.train(), F.cross_entropy, batch).note
    assert note == (f"measured in eval mode: {said}" if said else "")
    assert kp.capture(model.eval(), F.cross_entropy, batch).note == ""
