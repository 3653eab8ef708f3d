"""Putting quantizers where a plan quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from bitwright.graph.device import device_of
from bitwright.graph.graph import OUTPUT, Graph, Value
from bitwright.graph.op import Role
from bitwright.graph.structure import graph_of, records_of
from bitwright.graph.training_branch import OfValue, TrainingBranch
from bitwright.numerics.spec import QuantSpec
from bitwright.ops.batchnorm import BatchNorm, channels_of, fold_factor, over_channels, times_channels
from bitwright.ops.conv import Conv, ConvTranspose
from bitwright.ops.dropout import Dropout
from bitwright.ops.linear import Gemm, Linear
from bitwright.plan.plan import Plan, ValueEntry
from bitwright.plan.qconfig import FakeQuantConfig, QConfig
from bitwright.plan.reads import is_made_quantized, is_quantized, read_edges, width
from bitwright.plan.target import Target
from bitwright.table import Table
from bitwright.train.biases import BiasRounding
from bitwright.train.fake_quants import FAKE_QUANTS, QUANTIZER_NAMES, Quantizer
from bitwright.train.observers import make_observer
from bitwright.train.prepared import ByMode, Facts, Place, PreparedModel


@dataclass(frozen=True)
class Wishes:
    """What was granted. *configs*: quantized operator of the folded graph -> how its group is fake-quantized."""

    configs: Mapping[str, QConfig]
    report: Table


def insert_quantizers(
    graph: Graph,
    folded: Graph,
    plan: Plan,
    target: Target,
    wishes: Wishes,
    example: Mapping[str, Tensor],
    branch: TrainingBranch | None = None,
) -> PreparedModel:
    """*graph* with quantizers. *folded*: the same with batch normalisation folded; *plan* is about that one. *branch*: *graph* with what
    training computes besides, in float, on the quantized values.

    *raises* `UnknownName` for observers, fake quantizers and options that do not exist.
    """
    source = graph if branch is None else branch.graph
    work = _Insertion(source, folded, plan, target, wishes)
    for name, entry in plan.values.items():
        work.value(folded.value(name), entry)
    work.biases()
    if branch is not None:
        work.branch(branch)
    work.absorb_rectifiers()
    work.graph.lint()
    facts = Facts(
        tuple(records_of(graph.graph)),
        graph.info,
        work.plan,
        work.norms,
        target,
        tuple(work.places),
        wishes.report,
        dict(example),
    )
    return PreparedModel.build(source, work.graph, facts)


class _Insertion:
    """One graph being equipped. Quantizers become submodules of the graph's own modules."""

    def __init__(self, graph: Graph, folded: Graph, plan: Plan, target: Target, wishes: Wishes) -> None:
        self.source, self.folded, self.plan, self.target, self.wishes = graph, folded, plan, target, wishes
        self.graph = graph_of(records_of(graph.graph))
        self.nodes = dict(zip(graph.graph.nodes, self.graph.nodes, strict=True))
        self.places: list[Place] = []
        here = [pair for pair in folded.info.folded if pair not in graph.info.folded]
        self.norms: dict[str, tuple[str, ...]] = {}
        for pair in here:
            self.norms[pair.conv] = (*self.norms.get(pair.conv, ()), pair.batchnorm)

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
        if value.producer is not None and is_made_quantized(self.plan, value):
            config = self.wishes.configs[value.producer].activation
        else:
            config = self.wishes.configs[edges[0][1]].of_inputs
        spec = self.target.activation_spec(
            width(self.folded, self.plan, value.name), nonnegative=self._is_nonnegative(value, entry)
        )
        quantizer = self._quantizer(value.name, spec, config, (), is_weight=False)
        path = self._register(self._home(value, edges), quantizer)
        self.places.append(Place(value.name, path))
        node = self.nodes[self.source.value(value.name).node]
        if self._is_dropped(value) and len(edges) == len(value.readers) and not value.is_output:
            # On the chip nothing is dropped: what it rounds is what dropout reads, not yet scaled by 1 / (1 - p).
            with self.graph.inserting_before(node):
                node.args = (self.graph.call_module(path, node.args),)
            return
        with self.graph.inserting_after(node):
            copy = self.graph.call_module(path, (node,))
        self._redirect(node, copy, edges)

    def _is_dropped(self, value: Value) -> bool:
        return value.producer is not None and isinstance(self.folded.op(value.producer), Dropout)

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
        config = self.wishes.configs[readers[0].op].weight
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
        norms = self._folded_by(readers[0].op, spec) if len(readers) == 1 else ()
        before = {pair.conv for pair in self.source.info.folded}
        quantizer.is_folded = bool(norms) or readers[0].op in before
        with self.graph.inserting_before(first):
            copy = self._quantized_weight(node, path, readers[0].op, norms)
        self._redirect(node, copy, edges)
        self.places.append(Place(value.name, path, norms))

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

    def _folded_by(self, op: str, spec: QuantSpec) -> tuple[str, ...]:
        """The batch normalisations behind *op*, if one scale serves channels that they scale differently."""
        layer = self.source.op(op)
        shares = isinstance(layer, ConvTranspose) and layer.groups > 1
        return self.norms.get(op, ()) if spec.axis is None or shares or spec.power_of_two else ()

    def _quantized_weight(self, weight: fx.Node, path: str, op: str, norms: tuple[str, ...]) -> fx.Node:
        if not norms:
            return self.graph.call_module(path, (weight,))
        layer = self.source.op(op)
        shape = self.source.value(str(self.source.op_inputs(op)[1])).info.shape or ()
        axis, groups = channels_of(layer, len(shape))
        factors = []
        for norm in norms:
            gain, _, _, variance, epsilon = self._norm(norm)
            operands = [None if n is None else self.graph.get_attr(str(n.target)) for n in (gain, variance)]
            factors.append(self.graph.call_function(fold_factor, (*operands, epsilon)))
        for factor in factors:
            weight = self.graph.call_function(times_channels, (weight, factor, axis, groups))
        weight = self.graph.call_module(path, (weight,))
        for factor in factors:
            weight = self.graph.call_function(over_channels, (weight, factor, axis, groups))
        return weight

    def _norm(self, name: str) -> tuple[fx.Node | None, fx.Node | None, fx.Node, fx.Node, float]:
        """Gain, shift, mean, variance (nodes of the new graph) and epsilon of a batch normalisation."""
        module = self.source.op(name)
        assert isinstance(module, BatchNorm)
        nodes = [
            self.nodes[n] if isinstance(n, fx.Node) else None for n in self.source.op_node(name).args[1:5]
        ]
        assert nodes[2] is not None
        assert nodes[3] is not None
        return nodes[0], nodes[1], nodes[2], nodes[3], module.epsilon

    # --- biases ----------------------------------------------------------------------------------------------

    def biases(self) -> None:
        """Round every bias that the plan quantizes, once the operands' quantizers stand."""
        for name, entry in self.plan.values.items():
            readers = [r for r in self.folded.value(name).readers if r.role is Role.BIAS]
            if entry.role != "bias" or len(readers) != 1 or not is_quantized(self.plan, readers[0].op):
                continue
            if isinstance(self.folded.op(readers[0].op), (Conv, ConvTranspose, Linear, Gemm)):
                self._bias(readers[0].op)

    def _bias(self, op: str) -> None:
        places = {place.value: place for place in self.places}
        x, w = self.folded.op_inputs(op)[:2]
        while x is not None and x not in places:
            entry = self.plan.values.get(x)
            x = None if entry is None else entry.same_as
        if x is None or w not in places:
            return
        operands = [self.source.get_submodule(places[v].path) for v in (x, w)]
        assert all(isinstance(q, Quantizer) for q in operands)
        if operands[1].spec.group:  # type: ignore[union-attr]
            return
        norms = [self._norm(n) for n in self.norms.get(op, ())]
        rounding = BiasRounding(
            *operands,  # type: ignore[arg-type]
            bits=self.target.bias_bits,
            epsilons=[norm[4] for norm in norms],
            folded=bool(places[w].folded_by),
        )
        path = self._register(f"{self.folded.op_node(op).target}.bias_fake_quant", rounding)
        layer = self.nodes[self.source.op_node(op)]
        bias = layer.args[2] if len(layer.args) > 2 else None
        user = self.nodes[self.source.op_node(self.norms[op][-1])] if norms else layer
        with self.graph.inserting_before(user):
            rounded = self.graph.call_module(path, (bias, tuple(norm[:4] for norm in norms)))
        user.args = (*user.args[:2], rounded, *user.args[3:])

    def branch(self, branch: TrainingBranch) -> None:
        """Let what only training computes read what is quantized, and return the outputs of the mode that the model is in."""
        seen = {name: self.nodes[value.node] for name, value in self.source.values.items()}
        for place in self.places:
            copy = next(
                (n for n in self.graph.nodes if n.op == "call_module" and n.target == place.path), None
            )
            node = seen[place.value]
            if copy is None or copy.args[0] is not node or self.source.value(place.value).is_constant:
                continue
            seen[place.value] = copy
            for user in list(node.users):
                if user.op == "call_module" and self._op_name(user) in branch.ops:
                    user.replace_input_with(node, copy)
        output = next(n for n in self.graph.nodes if n.op == "output")
        in_training = map_aggregate(branch.outputs, lambda v: seen[v.name] if isinstance(v, OfValue) else v)
        path = self._register("by_mode", ByMode())
        with self.graph.inserting_before(output):
            output.args = (self.graph.call_module(path, (output.args[0], in_training)),)

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

    def _quantizer(
        self, value: str, spec: QuantSpec, config: FakeQuantConfig, shape: tuple[int, ...], *, is_weight: bool
    ) -> Quantizer:
        if config.power_of_two or (self.target.rescale.form == "shift" and not is_weight):
            spec = replace(spec, power_of_two=True)
        kind = FAKE_QUANTS.get(config.fake_quant, where="qconfig")
        observer = make_observer(config.observer, spec, spec.scales(shape), config.options)
        device = device_of(self.source)
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


def _identifier(name: str) -> str:
    cleaned = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}"
