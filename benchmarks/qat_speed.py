"""One training step with fake quantization against float, per kind: time and memory, in one run (ResNet-20, batch 64).

    python -m benchmarks.qat_speed

Beside it, if torchao is installed: its PT2E training with the X86 quantizer, same network, same batch.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared import loader, save, timed
from benchmarks.training import BATCH, resnet20
from bitwright import get_default_qconfig, prepare
from bitwright.plan.qconfig import UniformQconfigSetter

KINDS = ("fake_quant", "lsq", "pact")
ROUNDS = 15


def kept_for_backward(network: nn.Module, x: Tensor) -> int:
    """Bytes of distinct tensors that a forward pass keeps for the backward pass, and parameters with their gradients."""
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = network(x)
    for p in network.parameters():
        kept[p.untyped_storage().data_ptr()] = 2 * p.untyped_storage().nbytes()
    del output
    return sum(kept.values())


def torchao_network(network: nn.Module, x: Tensor) -> nn.Module | None:
    """*network* as torchao trains it, or None without torchao."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    exported = torch.export.export(network.train(), (x,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    return move_exported_model_to_train(prepare_qat_pt2e(exported, quantizer))


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    network = resnet20(loader()).train()
    networks: dict[str, nn.Module] = {"float": network}
    for kind in KINDS:
        networks[kind] = prepare(network, x[:2], UniformQconfigSetter(get_default_qconfig(kind, kind)))
    other = torchao_network(resnet20(loader()), x)
    if other is not None:
        networks["torchao"] = other
    optimizers = {k: torch.optim.SGD(n.parameters(), lr=1e-4) for k, n in networks.items()}

    def step(kind: str) -> None:
        optimizers[kind].zero_grad()
        F.cross_entropy(networks[kind](x), y).backward()
        optimizers[kind].step()

    memory = {k: kept_for_backward(n, x) for k, n in networks.items()}
    best = dict.fromkeys(networks, float("inf"))
    for _ in range(ROUNDS):  # interleaved: what disturbs one disturbs all
        for kind in networks:
            best[kind] = min(best[kind], timed(lambda k=kind: step(k))[1])  # type: ignore[misc]
    result: dict[str, Any] = {
        "model": "ResNet-20, batch 64",
        "step": {k: round(t / best["float"], 3) for k, t in best.items()},
        "memory": {k: round(m / memory["float"], 3) for k, m in memory.items()},
        "float_step_ms": round(1e3 * best["float"], 1),
        "float_memory_mib": round(memory["float"] / 2**20, 1),
    }
    save("qat_speed", result)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
