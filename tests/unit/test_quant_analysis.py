"""`QuantAnalysis`: the worst input, layers, single quantizers and single tables."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.analysis import QuantAnalysis
from bitwright.analysis.metrics import METRICS
from bitwright.analysis.outputs import file_parts, named_tensors, paired
from bitwright.errors import DataError, ModelError, UnknownName
from bitwright.flow.prepare import prepare
from bitwright.numerics.lut import TableSettings
from bitwright.plan.setters import (
    calibration_8bit_weight_16bit_act_qconfig_setter,
    default_calibration_qconfig_setter,
    sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter,
)
from bitwright.train.control import set_fake_quantize
from bitwright.train.prepared import PreparedModel
from bitwright.train.states import FakeQuantState
from bitwright.train.tables import convert_segment_lut

SETTERS = {8: default_calibration_qconfig_setter, 16: calibration_8bit_weight_16bit_act_qconfig_setter}


class TwoHeads(nn.Module):
    """A convolution and a ReLU, then a linear layer for one output, a function that is looked up for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        self.score, self.box = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.relu(self.conv(x)).mean((2, 3))
        return self.score(y), torch.log(torch.sigmoid(self.box(y)))


@cache
def _models(bits: int = 8) -> tuple[nn.Module, PreparedModel]:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    x = torch.randn(8, 2, 4, 4)
    prepared = prepare(model, x, SETTERS[bits], target="journey6")
    set_fake_quantize(prepared, FakeQuantState.CALIBRATION)
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    return model, prepared


@pytest.fixture
def float_model() -> nn.Module:
    return _models()[0]


@pytest.fixture
def prepared() -> PreparedModel:
    return copy.deepcopy(_models()[1])


@pytest.fixture
def wide() -> PreparedModel:
    """With int16 activations, whose tables interpolate."""
    return copy.deepcopy(_models(16)[1])


@cache
def _converted() -> PreparedModel:
    model = copy.deepcopy(_models(16)[1])
    tables = convert_segment_lut(model)
    poor = {
        path: TableSettings(input_range=(0.6, 0.61), gradients=(0.0, 0.0)) for path in tables if "log" in path
    }
    convert_segment_lut(model, poor)
    return model


@pytest.fixture
def converted() -> PreparedModel:
    """`wide` with all tables in fixed point, of which one covers far too little."""
    return copy.deepcopy(_converted())


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 2, 4, 4) * (1 + i) for i in range(count)]


# --- metrics -------------------------------------------------------------------------------------------------


def test_identical_tensors() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0]])

    found = {name: METRICS.get(name, where="").measure(x, x.clone()) for name in METRICS}
    assert found == {"Cosine": pytest.approx(1.0), "MSE": 0.0, "L1": 0.0, "KL": 0.0, "SQNR": math.inf}


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)])
def test_the_cosine_of_zeros_is_zero(a: float, b: float) -> None:
    assert METRICS.get("Cosine", where="").measure(torch.full((4,), a), torch.full((4,), b)) == 0.0


def test_metrics_by_hand() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])

    found = {name: METRICS.get(name, where="").measure(a, b) for name in METRICS}
    p, q = torch.softmax(a, 0), torch.softmax(b, 0)
    assert found == pytest.approx(
        {
            "L1": 1.0,
            "MSE": 2.0,
            "Cosine": 17 / (5 * math.sqrt(13)),
            "SQNR": 10 * math.log10(25 / 4),
            "KL": float((p * (p / q).log()).sum()),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("name", list(METRICS))
def test_badness_grows_with_noise_and_nan_is_worst(name: str) -> None:
    metric = METRICS.get(name, where="")
    torch.manual_seed(0)
    a, noise = torch.randn(3, 50), torch.randn(3, 50)
    found = [metric.badness(metric.measure(a, a + k * noise)) for k in (0.01, 0.1, 1.0, math.nan)]

    assert found == sorted(found)
    assert len(set(found)) == 4


# --- outputs and inputs --------------------------------------------------------------------------------------


def test_outputs_have_stable_names() -> None:
    x = torch.zeros(1)

    assert list(named_tensors(x)) == ["0"]
    assert list(named_tensors((x, [x, x], {"boxes": x, "n": 3}))) == ["0", "1-0", "1-1", "2-boxes"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("0", "1-0", "boxes"), ("0", "1-0", "boxes")),
        (("a/b", "a_b"), ("a_b_2", "a_b")),
        (("a/b", "a b", "a_b_2"), ("a_b", "a_b_3", "a_b_2")),
    ],
)
def test_names_of_files_are_never_alike(names: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert file_parts(names) == dict(zip(names, expected, strict=True))


def test_outputs_whose_names_differ_in_a_slash_have_files_of_their_own(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    def named(outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"a/b": outputs[0], "a_b": outputs[1]}

    qa = QuantAnalysis(float_model, prepared, post_process=named, out_dir=tmp_path)
    qa.set_bad_case(batches()[0])
    tables = qa.sensitivity()
    for name, part in (("a/b", "a_b_2"), ("a_b", "a_b")):
        assert (tmp_path / f"output_{part}_L1_sensitive_ops.txt").read_text() == f"{tables[name]}\n"


def test_outputs_that_differ_are_refused() -> None:
    with pytest.raises(ModelError, match="same names and shapes"):
        paired(torch.zeros(2), torch.zeros(3))


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "mapping"])
def test_inputs_as_the_model_takes_them(
    form: str, float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    made = {
        "tensor": lambda x: x,
        "tuple": lambda x: (x,),
        "list": lambda x: [x],
        "mapping": lambda x: {"x": x},
    }
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)

    tables = qa.auto_find_bad_case([made[form](x) for x in batches()])
    qa.run()
    assert tables[2].rows[2] == {"metric": "L1", "index": 2}
    assert set(qa.sensitivity()) == {"0", "1"}


def test_labels_in_the_data_are_explained(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="Leave labels out"):
        QuantAnalysis(float_model, prepared, out_dir=tmp_path).auto_find_bad_case([(batches()[0], 1)])


# --- the bad case --------------------------------------------------------------------------------------------


def test_the_worst_input_is_found(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    data = batches()
    expected = [float((float_model(x)[1] - prepared(x)[1]).abs().mean().detach()) for x in data]

    seen: list[tuple[int, int]] = []
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path, progress=lambda i, n, _: seen.append((i, n)))
    indices, values, _ = qa.auto_find_bad_case(data)
    worst = max(range(3), key=expected.__getitem__)
    assert indices.rows[1]["L1"] == worst
    assert values.rows[1]["L1"] == pytest.approx(expected[worst], rel=1e-5)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    text = (tmp_path / "badcase.txt").read_text()
    assert text.count("bad case input index") == 2
    assert "dataloader index" in text


def test_no_more_items_are_taken_than_asked(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    taken = []

    def generate() -> Iterator[Tensor]:
        for x in batches():
            taken.append(x)
            yield x

    QuantAnalysis(float_model, prepared, out_dir=tmp_path).auto_find_bad_case(generate(), num_steps=2)
    assert len(taken) == 2


@pytest.mark.parametrize(("order", "expected"), [("ascending", 0), ("descending", 2)])
def test_a_metric_of_ones_own(
    order: Any, expected: int, float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    tables = qa.auto_find_bad_case(
        batches(),
        metric="custom",
        custom_metric_func=lambda a, b: float((a - b).abs().max()),
        custom_metric_order_seq=order,
    )

    assert tables[2].rows[-1] == {"metric": "custom", "index": expected}


def test_a_saved_bad_case_is_the_same_again(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    first = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    first.auto_find_bad_case(batches())
    second = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    second.load_bad_case()

    assert second.sensitivity()["0"].rows == first.sensitivity()["0"].rows
    second.clean()
    assert not (tmp_path / "badcase.pt").exists()
    assert (tmp_path / "badcase.txt").exists()
    with pytest.raises(DataError, match=r"badcase\.pt"):
        second.load_bad_case()


# --- layers --------------------------------------------------------------------------------------------------


def test_layers_against_the_float_model(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    x = batches()[0]
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(x)
    qa.run()
    rows = {row["mod_name"]: row for row in qa.compare_per_layer().rows}

    assert isinstance(float_model, TwoHeads)
    with torch.no_grad():
        expected, difference = float_model.relu(float_model.conv(x)), float_model(x)[0] - prepared(x)[0]
    assert rows["relu"]["base_model_max"] == pytest.approx(float(expected.max()))
    assert rows["relu"]["analy_op_type"] == "Relu"
    assert rows["relu"]["Cosine"] > 0.99
    assert rows["score"]["Atol"] == pytest.approx(float(difference.abs().max()), rel=1e-4)
    assert rows["_inputs.x"]["base_model_max"] == pytest.approx(float(x.max()))
    with (tmp_path / "compare_per_layer_out.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["mod_name"] for row in written] == list(rows)
    assert list(written[0])[:11] == [
        "index", "mod_name", "base_op_type", "analy_op_type", "shape", "quant_dtype", "qscale", "Cosine", "L1", "Atol",
        "max_qscale_diff",
    ]  # fmt: skip


def test_only_the_layer_with_a_poor_table_errs_by_itself(
    wide: PreparedModel, converted: PreparedModel, tmp_path: Path
) -> None:
    qa = QuantAnalysis(wide, converted, out_dir=tmp_path)
    qa.set_bad_case(batches()[0])
    qa.run()
    table = qa.compare_per_layer()

    own = {row["mod_name"]: row["own_error"] for row in table.rows if row["own_error"] is not None}
    worst = max(own, key=own.__getitem__)
    assert "log" in worst
    assert own[worst] > 3
    assert all(error <= 1.01 for name, error in own.items() if name != worst)


def test_the_same_model_differs_nowhere(prepared: PreparedModel, tmp_path: Path) -> None:
    qa = QuantAnalysis(prepared, copy.deepcopy(prepared), out_dir=tmp_path)
    qa.set_bad_case(batches()[0])
    qa.run()

    assert {row["L1"] for row in qa.compare_per_layer().rows} == {0.0}
    assert {row["own_error"] for row in qa.compare_per_layer().rows} <= {0.0, None}


def test_layers_can_be_chosen(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(batches()[0])
    qa.run()

    assert [row["mod_name"] for row in qa.compare_per_layer(prefixes=("co",)).rows] == ["conv"]
    assert {row["mod_name"] for row in qa.compare_per_layer(types=("Linear",)).rows} == {"score", "box"}


def test_data_beyond_the_scale_is_reported(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(batches()[0] * 100)
    qa.run()

    text = (tmp_path / "abnormal_layer_advisor.txt").read_text()
    assert "Current scale does not cover the data range" in text
    assert "set fixed scale" in text
    assert "maybe too large for quantization" in text


# --- sensitivity ---------------------------------------------------------------------------------------------


def test_each_quantizer_alone(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    x = batches()[0]
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(x)
    tables = qa.sensitivity()

    found = {(r["op_name"], r["sensitive_type"]): r["L1"] for r in tables["0"].rows}
    alone = copy.deepcopy(prepared)
    for path, quantizer in alone.quantizers:
        set_fake_quantize(alone, FakeQuantState.FLOAT)
        quantizer.state = FakeQuantState.VALIDATION
        kind = "weight" if quantizer.is_weight else "activation"
        with torch.no_grad():
            expected = float((alone(x)[0] - float_model(x)[0]).abs().mean())
        assert found[path.rpartition(".")[0], kind] == pytest.approx(expected, abs=1e-9), path
    losses = [r["L1"] for r in tables["0"].rows]
    assert losses == sorted(losses, reverse=True)
    assert found["box", "weight"] == pytest.approx(0.0, abs=1e-7)  # the other head


def test_each_table_alone(wide: PreparedModel, converted: PreparedModel, tmp_path: Path) -> None:
    qa = QuantAnalysis(wide, converted, out_dir=tmp_path)
    qa.auto_find_bad_case(batches())
    tables = qa.sensitivity()

    worst = tables["1"].rows[0]
    assert worst["sensitive_type"] == "table"
    assert worst["op_name"].endswith(".log")
    assert worst["L1"] > 0
    assert {row["L1"] for row in tables["0"].rows} == {0.0}
    saved = torch.load(tmp_path / "output_1_L1_sensitive_ops.pt", weights_only=True)
    assert saved[0][:3] == [worst["op_name"], "table", "Log"]
    assert worst["op_name"] in (tmp_path / "output_1_L1_sensitive_ops.txt").read_text()
    converted.get_submodule(worst["op_name"]).quantized_forward = False  # as seed scripts do
    assert all(row["op_name"] != worst["op_name"] for row in qa.sensitivity()["1"].rows)


def test_reserve_turns_the_list_round(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(batches()[0])

    values = [row["Cosine"] for row in qa.sensitivity(metric="Cosine", reserve=True)["0"].rows]
    assert values == sorted(values, reverse=True)


def test_the_list_tells_the_setters_what_needs_int16(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    qa.set_bad_case(batches()[0])
    qa.sensitivity()
    rows = torch.load(tmp_path / "output_0_L1_sensitive_ops.pt", weights_only=True)
    rows = [row for row in rows if row[0] == "score"]

    setter = sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(rows, topk=1)
    again = prepare(float_model, batches()[0], setter, target="journey6")
    widths = {p.rpartition(".")[0]: q.spec.dtype.bits for p, q in again.quantizers if not q.is_weight}
    assert widths["score"] == 16


# --- what is left behind -------------------------------------------------------------------------------------


def test_models_are_left_as_they_were(
    float_model: nn.Module, prepared: PreparedModel, converted: PreparedModel, tmp_path: Path
) -> None:
    float_model = copy.deepcopy(float_model).train()
    for baseline, analysed in ((float_model, prepared), (_models(16)[1], converted)):
        before = {k: v.clone() for k, v in analysed.state_dict().items()}
        modes = [m.training for m in (*baseline.modules(), *analysed.modules())]
        qa = QuantAnalysis(baseline, analysed, out_dir=tmp_path)
        qa.auto_find_bad_case(batches())
        qa.run()
        qa.sensitivity()

        assert modes == [m.training for m in (*baseline.modules(), *analysed.modules())]
        assert all(q.state is FakeQuantState.VALIDATION for _, q in analysed.quantizers)
        assert all(getattr(m, "quantized_forward", True) for m in analysed.modules())
        assert all(torch.equal(v, before[k]) for k, v in analysed.state_dict().items())
        assert not any(m._forward_hooks for m in baseline.modules())


# --- bad input -----------------------------------------------------------------------------------------------


def test_misuse_is_explained(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    qa = QuantAnalysis(float_model, prepared, out_dir=tmp_path)
    for early in (qa.run, qa.sensitivity, qa.save_bad_case):
        with pytest.raises(
            DataError, match=r"expected a bad case to look at; found none\. Call auto_find_bad_case"
        ):
            early()
    with pytest.raises(DataError, match="Call run"):
        qa.compare_per_layer()
    for empty in ([], iter(())):
        with pytest.raises(DataError, match="an empty data generator"):
            qa.auto_find_bad_case(empty)
    with pytest.raises(UnknownName, match=r"metric .*L1.* found 'L3'"):
        qa.auto_find_bad_case(batches(), metric="L3")
    with pytest.raises(DataError, match="custom_metric_order_seq"):
        qa.auto_find_bad_case(batches(), metric="custom", custom_metric_func=lambda a, b: 0.0)
    qa.auto_find_bad_case(batches())
    with pytest.raises(UnknownName, match="bad case"):
        qa.run(index=17)
    with pytest.raises(UnknownName, match="metric"):
        qa.sensitivity(metric="cosin")


def test_models_that_do_not_fit_are_explained(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="prepare"):
        QuantAnalysis(float_model, float_model, out_dir=tmp_path)
    with pytest.raises(UnknownName, match="type of model"):
        QuantAnalysis(float_model, prepared, "int9", out_dir=tmp_path)
    stranger = QuantAnalysis(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), prepared, out_dir=tmp_path)
    stranger.set_bad_case(batches()[0])
    with pytest.raises(ModelError, match="layers of the two models"):
        stranger.run()
    with pytest.raises(ModelError, match="outputs of the two models"):
        stranger.sensitivity()


def test_observing_models_are_refused(
    float_model: nn.Module, prepared: PreparedModel, tmp_path: Path
) -> None:
    set_fake_quantize(prepared, FakeQuantState.QAT)
    with pytest.raises(ModelError, match="VALIDATION"):
        QuantAnalysis(float_model, prepared, out_dir=tmp_path).auto_find_bad_case(batches())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_an_absent_device_is_said(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="device_ids: expected a device that torch can use"):
        QuantAnalysis(float_model, prepared, device_ids=0, out_dir=tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_analysis_runs_on_a_gpu(float_model: nn.Module, prepared: PreparedModel, tmp_path: Path) -> None:
    qa = QuantAnalysis(float_model, prepared, device_ids=0, out_dir=tmp_path)
    qa.auto_find_bad_case(batches())
    qa.run()
    on_gpu = qa.sensitivity()["0"].rows[0]

    assert on_gpu["op_name"] == qa.sensitivity(device="cpu")["0"].rows[0]["op_name"]
    assert next(prepared.parameters()).device.type == "cpu"
