"""Putting quantizers where a plan quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from bitwright.graph.graph import OUTPUT, Graph, Value
from bitwright.graph.op import Role
from bitwright.graph.structure import graph_of, records_of
from bitwright.numerics.spec import QuantSpec
from bitwright.ops.conv import ConvTranspose
from bitwright.ops.norm import BatchNorm
from bitwright.plan.plan import Plan, ValueEntry
from bitwright.plan.qconfig import FakeQuantConfig, QConfig
from bitwright.plan.reads import is_made_quantized, is_quantized, read_edges
from bitwright.plan.target import Precision, Target
from bitwright.table import Table
from bitwright.train.batchnorm import fold_factor, over_channels, times_channels
from bitwright.train.fake_quants import FAKE_QUANTS, QUANTIZER_NAMES, Quantizer
from bitwright.train.observers import make_observer
from bitwright.train.prepared import Facts, Place, PreparedModel


@dataclass(frozen=True)
class Wishes:
    """What was asked for. *configs*: operator of the folded graph -> wish, None for float."""

    configs: Mapping[str, QConfig | None]
    report: Table


def insert_quantizers(
    graph: Graph, folded: Graph, plan: Plan, target: Target, wishes: Wishes, example: Mapping[str, Tensor]
) -> PreparedModel:
    """*graph* with quantizers. *folded*: the same with batch normalisation folded; *plan* is about that one.

    *raises* `UnknownName` for observers, fake quantizers and options that do not exist.
    """
    work = _Insertion(graph, folded, plan, target, wishes)
    for name, entry in plan.values.items():
        work.value(folded.value(name), entry)
    work.absorb_rectifiers()
    work.graph.lint()
    facts = Facts(
        tuple(records_of(graph.graph)),
        graph.info,
        work.plan,
        target,
        tuple(work.places),
        wishes.report,
        dict(example),
    )
    return PreparedModel.build(graph, work.graph, facts)


class _Insertion:
    """One graph being equipped. Quantizers become submodules of the graph's own modules."""

    def __init__(self, graph: Graph, folded: Graph, plan: Plan, target: Target, wishes: Wishes) -> None:
        self.source, self.folded, self.plan, self.target, self.wishes = graph, folded, plan, target, wishes
        self.graph = graph_of(records_of(graph.graph))
        self.nodes = dict(zip(graph.graph.nodes, self.graph.nodes, strict=True))
        self.places: list[Place] = []
        here = [pair for pair in folded.info.folded if pair not in graph.info.folded]
        self._norms = {pair.conv: pair.batchnorm for pair in here}

    def value(self, value: Value, entry: ValueEntry) -> None:
        """Quantize *value* for those who read it quantized."""
        edges = read_edges(value, lambda op: is_quantized(self.plan, op))
        if not edges or entry.role == "bias":
            return
        if entry.same_as is not None:
            if is_made_quantized(self.plan, value):
                return  # its codes are those of what the operator read
            self._alone(value.name)
        if entry.role == "weight":
            self._weight(value, edges)
        else:
            self._activation(value, edges, entry)

    def _alone(self, name: str) -> None:
        """A value whose producer passes codes on but is float has a range of its own."""
        values = {**self.plan.values, name: replace(self.plan.values[name], same_as=None)}
        self.plan = replace(self.plan, values=values)

    # --- activations -----------------------------------------------------------------------------------------

    def _activation(self, value: Value, edges: list[tuple[str, str]], entry: ValueEntry) -> None:
        decided_by = value.producer if is_made_quantized(self.plan, value) else edges[0][1]
        assert decided_by is not None
        config = self._config(decided_by).activation
        spec = self.target.activation_spec(self._width(value), nonnegative=self._is_nonnegative(value, entry))
        quantizer = self._quantizer(value.name, spec, config, (), is_weight=False)
        path = self._register(self._home(value, edges), quantizer)
        node = self.nodes[self.source.value(value.name).node]
        with self.graph.inserting_after(node):
            copy = self.graph.call_module(path, (node,))
        self._redirect(node, copy, edges)
        self.places.append(Place(value.name, path))

    def _width(self, value: Value) -> Precision:
        ops = [value.producer] if is_made_quantized(self.plan, value) else [r.op for r in value.readers]
        wide = any(op is not None and self.plan.ops[op].precision == "int16" for op in ops)
        return "int16" if wide else "int8"

    def _is_nonnegative(self, value: Value, entry: ValueEntry) -> bool:
        """Whether nothing negative can ever be in *value*: what a target with unsigned codes asks."""
        if entry.role == "constant":
            return bool((self.folded.constant(value.name) >= 0).all())
        if value.producer is None:
            return False
        op = self.folded.op(value.producer)
        bounds = op.output_range()
        if bounds is not None:
            return bounds[0] >= 0.0
        source = self.folded.op_inputs(op.name)[0] if op.passthrough else None
        return source is not None and self._is_nonnegative(self.folded.value(source), entry)

    def _home(self, value: Value, edges: list[tuple[str, str]]) -> str:
        """The path of a value's quantizer: beside the operator that makes it, else under the input's name."""
        suffix = QUANTIZER_NAMES["activation"]
        if value.producer is not None:
            target = str(self.folded.op_node(value.producer).target)
            index = self.folded.op(value.producer).outputs.index(value.name)
            return f"{self._target_of(value) or target}.{suffix}" + (f"_{index}" if index else "")
        if not value.is_constant:
            return f"_inputs.{_identifier(value.name)}.{suffix}"
        reader = edges[0][1]
        index = next(r.index for r in value.readers if r.op == reader)
        return f"{self.folded.op_node(reader).target}.input_{index}_post_process"

    def _target_of(self, value: Value) -> str | None:
        """The module that makes *value* before folding."""
        node = self.source.value(value.name).node
        while node.op == "call_function":
            node = node.args[0]  # type: ignore[assignment]
        return str(node.target) if node.op == "call_module" else None

    # --- weights ---------------------------------------------------------------------------------------------

    def _weight(self, value: Value, edges: list[tuple[str, str]]) -> None:
        readers = [r for r in value.readers if (value.name, r.op) in edges and r.role is Role.WEIGHT]
        if not readers:
            return
        config = self._config(readers[0].op).weight
        weight = self.source.constant(value.name)
        axes = {self.folded.op(r.op).weight_axis(r.index, weight.dim()) for r in readers}
        narrow = {self.plan.ops[r.op].precision for r in readers} == {"w4a8"}
        spec = self.target.weight_spec(axes.pop() if len(axes) == 1 else None, "w4a8" if narrow else "int8")
        if self.target.rescale.form == "shift":
            spec = replace(spec, power_of_two=True)
        spec = self._in_groups(spec, config, value.name, weight)
        quantizer = self._quantizer(value.name, spec, config, tuple(weight.shape), is_weight=True)
        leaf = str(value.node.target).rpartition(".")[2]
        home = f"{self.folded.op_node(readers[0].op).target}.{_identifier(leaf)}_fake_quant"
        path = self._register(home, quantizer)
        node = self.nodes[self.source.value(value.name).node]
        first = next(n for n in self.graph.nodes if n in node.users)
        norm = self._folded_by(readers[0].op, spec) if len(readers) == 1 else None
        with self.graph.inserting_before(first):
            copy = self._quantized_weight(node, path, readers[0].op, norm)
        self._redirect(node, copy, edges)
        self.places.append(Place(value.name, path, norm))

    def _in_groups(self, spec: QuantSpec, config: FakeQuantConfig, name: str, weight: Tensor) -> QuantSpec:
        """*spec* with the groups asked for, or the reason why not in the plan."""
        size = config.group_size
        if size is None:
            return spec
        why = ""
        if not self.target.weight.grouped:
            why = f"{self.target.name} has no groups of weights"
        elif weight.dim() != 2 or spec.axis is None:
            why = "only matrices with a scale per channel have groups"
        elif size < 1 or weight.shape[1 - spec.axis] % size:
            why = f"groups of {size} do not divide a row of {weight.shape[1 - spec.axis]}"
        if not why:
            return replace(spec, group=size)
        values = {
            **self.plan.values,
            name: replace(self.plan.values[name], why=f"one scale per channel: {why}"),
        }
        self.plan = replace(self.plan, values=values)
        return spec

    def _folded_by(self, op: str, spec: QuantSpec) -> str | None:
        """The batch normalisation behind *op*, if one scale serves channels that it scales differently."""
        if op not in self._norms:
            return None
        layer = self.source.op(op)
        shares = isinstance(layer, ConvTranspose) and layer.groups > 1
        return self._norms[op] if spec.axis is None or shares or spec.power_of_two else None

    def _quantized_weight(self, weight: fx.Node, path: str, op: str, norm: str | None) -> fx.Node:
        if norm is None:
            return self.graph.call_module(path, (weight,))
        module = self.source.op(norm)
        assert isinstance(module, BatchNorm)
        _, gain, _, _, variance = self.source.op_node(norm).args
        axis, groups = channels_of(self.source, op)
        operands = [
            self.graph.get_attr(str(n.target)) if isinstance(n, fx.Node) else None for n in (gain, variance)
        ]
        factor = self.graph.call_function(fold_factor, (*operands, module.epsilon))
        folded = self.graph.call_function(times_channels, (weight, factor, axis, groups))
        rounded = self.graph.call_module(path, (folded,))
        return self.graph.call_function(over_channels, (rounded, factor, axis, groups))

    def absorb_rectifiers(self) -> None:
        """ReLU and rounding in one step, where nobody else reads the ReLU's result: one byte for the backward pass instead of five."""
        for place in self.places:
            for node in [n for n in self.graph.nodes if n.op == "call_module" and n.target == place.path]:
                relu = node.args[0]
                assert isinstance(relu, fx.Node)
                if relu.op != "call_module" or len(relu.users) > 1:
                    continue
                if getattr(self.source.get_submodule(str(relu.target)), "kind", "") == "Relu":
                    node.args, node.kwargs = relu.args, {"rectified": True}
                    self.graph.erase_node(relu)

    # --- both ------------------------------------------------------------------------------------------------

    def _config(self, op: str) -> QConfig:
        """The wish that decides for *op*: its own, or that of another operator of its group."""
        own = self.wishes.configs.get(op)
        if own is not None:
            return own
        group = self.plan.ops[op].group
        members = (n for n, e in self.plan.ops.items() if e.group == group)
        return next((c for n in members if (c := self.wishes.configs.get(n)) is not None), QConfig())

    def _quantizer(
        self, value: str, spec: QuantSpec, config: FakeQuantConfig, shape: tuple[int, ...], *, is_weight: bool
    ) -> Quantizer:
        if config.power_of_two or (self.target.rescale.form == "shift" and not is_weight):
            spec = replace(spec, power_of_two=True)
        kind = FAKE_QUANTS.get(config.fake_quant, where="qconfig")
        observer = make_observer(config.observer, spec, spec.scales(shape), config.options)
        device = next((t.device for t in self.source.state_dict().values()), torch.device("cpu"))
        return kind(value, spec, shape, observer, is_weight=is_weight).to(device)

    def _register(self, path: str, quantizer: nn.Module) -> str:
        *parts, leaf = path.split(".")
        owner: nn.Module = self.source
        for part in parts:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        while hasattr(owner, leaf):
            leaf += "_"
        owner.add_module(leaf, quantizer)
        return ".".join([*parts, leaf])

    def _redirect(self, node: fx.Node, copy: fx.Node, edges: list[tuple[str, str]]) -> None:
        """Have the readers of *edges* read *copy* in place of *node*."""
        readers = {op for _, op in edges}
        for user in list(node.users):
            is_output = user.op == "output" and OUTPUT in readers
            if is_output or (user.op == "call_module" and self._op_name(user) in readers):
                user.replace_input_with(node, copy)

    def _op_name(self, node: fx.Node) -> str:
        return str(getattr(self.source.get_submodule(str(node.target)), "name", ""))


def channels_of(graph: Graph, op: str) -> tuple[int, int]:
    """Axis of the output channels in the weight of *op*, and the groups of a transposed convolution, else 1."""
    layer = graph.op(op)
    weight = graph.op_inputs(op)[1]
    rank = graph.constant(weight).dim() if weight is not None else 0
    return layer.weight_axis(1, rank) or 0, layer.groups if isinstance(layer, ConvTranspose) else 1


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}"
