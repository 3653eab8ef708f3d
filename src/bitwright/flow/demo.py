"""The whole story on two small networks that need no download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitwright.demo.digits import load_digits_split
from bitwright.demo.networks import load_demo
from bitwright.flow.progress import Watcher
from bitwright.flow.result import Tuned
from bitwright.flow.settings import Settings
from bitwright.flow.tune import tune

#: What each network is tuned for: a target on which plain int8 really loses accuracy.
DEMO_SETTINGS = {
    "cnn": Settings(target="bm1684", expected_cos=0.99, input_num=100, inference_num=30, max_float_ops=5),
    "transformer": Settings(
        target="generic-int8", expected_cos=0.99, input_num=100, inference_num=30, max_float_ops=8
    ),
}


def run_demo(
    network: str, output: Path, settings: Settings | None = None, watcher: Watcher | None = None
) -> Tuned:
    """Tune the demo network `cnn` or `transformer` on scikit-learn's digits; results in *output*.

    Calibrated on pictures that the network was trained on, measured on those it was not.
    """
    module, split = load_demo(network), load_digits_split()
    test = [{"x": x[None], "label": int(y)} for x, y in zip(split.test_x, split.test_y, strict=True)]
    return tune(
        module,
        test,
        output=output,
        settings=replace(settings or DEMO_SETTINGS[network], calibration_data=split.train_x),
        watcher=watcher,
        example_inputs=split.test_x[:2],
    )
