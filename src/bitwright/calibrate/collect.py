"""One pass over the calibration data that feeds the statistics of every value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from bitwright.calibrate.statistics import Statistics
from bitwright.errors import DataError
from bitwright.graph.graph import Graph
from bitwright.graph.replay import Replay


def collect(
    graph: Graph,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Statistics of every float value of *graph* over *batches* (input name -> `[n, ...]`).

    Float execution, evaluation mode. *progress* is called with the number of samples after each batch.
    *raises* `DataError` for no data, NaN or infinity anywhere, or an input that never varies.
    """
    replay = Replay(graph)
    statistics = Statistics()
    names = [i.name for i in graph.info.inputs]

    def observe(name: str, x: Tensor) -> None:
        try:
            statistics.update(name, x)
        except DataError:
            # Inside a network minus infinity is how scores are masked; in its inputs, or as NaN, it is an error.
            if name in names or bool(x.isnan().any()):
                raise
            statistics.update_masked(name, x)

    for batch in batches:
        inputs = {name: batch[name] for name in names}
        replay.run(inputs, observe=observe)
        samples = next(iter(inputs.values())).shape[0] if inputs else 0
        statistics.samples += samples
        if progress:
            progress(samples)
    _check(graph, statistics)
    return statistics


def _check(graph: Graph, statistics: Statistics) -> None:
    if statistics.samples == 0:
        raise DataError(
            "calibration data",
            expected="at least one sample",
            found="none",
            remedy="Check --data and --input-num.",
        )
    for spec in graph.info.inputs:
        if spec.name not in statistics:
            continue
        seen = statistics[spec.name]
        if seen.lo == seen.hi and seen.elements > 1:
            raise DataError(
                f"calibration data, input {spec.name}",
                expected="values that vary",
                found=f"the constant {seen.lo:g} in all {statistics.samples} samples",
                remedy="Check the data and the preprocessing flags.",
            )
