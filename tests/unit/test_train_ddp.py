"""Training in two processes: the same scales on both, and what one process computes from both batches together."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.unit.qat_cases import calibrate, everywhere, features, of_kind, pixels, plain, small
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitwright import (
    FakeQuantState,
    PreparedModel,
    convert,
    get_default_qconfig,
    load_observer_params,
    prepare,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
CASES = [
    *("fake_quant", "lsq", "lsq, outlier", "lsq, calibrated", "pact", "batch norm", "synchronised"),
    *("fake_quant, no data", "lsq, no data", "mse, no data"),
]


def model_of(case: str) -> PreparedModel:
    """The model of *case*, the same in every process."""
    if case == "batch norm":
        return prepare(small().train(), pixels(2), of_kind("fake_quant"), batchnorm="frozen")
    if case == "synchronised":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(small().train())
        return prepare(net, pixels(2), of_kind("fake_quant"))
    kind = case.partition(",")[0]
    if kind == "mse":
        return prepare(plain(), features(2), everywhere(get_default_qconfig(activation_observer="mse")))
    model = prepare(plain(), features(2), of_kind(kind))
    if "calibrated" in case:
        load_observer_params(calibrate(prepare(plain(), features(2), of_kind(kind)), features()), model)
    return model


def data_of(case: str) -> Tensor:
    """Twelve samples for each step, `[steps, 12, …]`; the second half is much larger."""
    make = pixels if case in ("batch norm", "synchronised") else features
    x = torch.stack([make(12, seed) for seed in range(STEPS)])
    x = torch.cat([x[:, :6], 3.0 * x[:, 6:]], 1)
    if "outlier" in case:  # then LSQ starts at the mean magnitude, not at the range
        x[:, 0, 0] = 500.0
    return x


def share_of(case: str, rank: int) -> Tensor:
    """What one of two processes gets: half of each batch; or the first all, the second nothing."""
    x = data_of(case)
    return x[:, : 12 - 12 * rank] if "no data" in case else x.chunk(2, 1)[rank]


def trained(model: nn.Module, batches: Tensor, rate: float = 0.01) -> dict[str, Tensor]:
    """The state after a step on each of *batches*, under the names of a model that is not wrapped."""
    set_fake_quantize(model.train(), FakeQuantState.QAT)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        y = model(x).square()
        (y.mean() if len(x) else y.sum()).backward()
        optimizer.step()
    return {name.removeprefix("module."): t.clone() for name, t in model.state_dict().items()}


def process(rank: int, port: int, folder: str) -> None:
    """One of two processes: trains every case on its half of the data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for number, case in enumerate(CASES):
        model = DistributedDataParallel(model_of(case))
        torch.save(trained(model, share_of(case, rank)), f"{folder}/{number}.{rank}.pt")
        if rank == 0:
            convert(model)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<case>.<rank>.pt`."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(process, (port, str(folder)), nprocs=2, start_method="spawn")
    return folder


def states(folder: Path, case: str) -> list[dict[str, Tensor]]:
    return [torch.load(folder / f"{CASES.index(case)}.{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_have_the_same_parameters_ranges_and_scales(case: str, results: Path) -> None:
    first, second = states(results, case)

    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_does_from_both_batches(case: str, results: Path) -> None:
    rate = 0.005 if "no data" in case else 0.01  # the mean of a gradient and none is half of it
    found, expected = states(results, case)[0], trained(model_of(case), data_of(case), rate)

    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The gradient scale of LSQ counts the elements of a sample, so that it does not depend on the batch.
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
