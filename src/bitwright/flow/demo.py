"""The whole story on two small networks that need no download."""

from __future__ import annotations

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
    "transformer": Settings(target="generic-int8", expected_cos=0.99, input_num=100, inference_num=30, max_float_ops=8),
}


def run_demo(network: str, output: Path, settings: Settings | None = None, watcher: Watcher | None = None) -> Tuned:
    """Tune the demo network `cnn` or `transformer` on the digits that come with scikit-learn; results in *output*."""
    module = load_demo(network)
    _, _, x, y = load_digits_split()
    samples = [{"x": image[None], "label": int(label)} for image, label in zip(x, y, strict=True)]
    return tune(
        module, samples, output=output, settings=settings or DEMO_SETTINGS[network], watcher=watcher, example_inputs=x[:2]
    )
