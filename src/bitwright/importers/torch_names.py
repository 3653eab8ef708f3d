"""Operator names from the author's module paths.

An operator that is all a module does takes the module's path; the k-th further call of that module is
`<path>._call_<k>`; every other operator is `<enclosing module path>._generated_<op>_<n>`, n counted per enclosing module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import fx, nn

#: One call of a module, innermost last: (key unique to the call, module path).
Stack = tuple[tuple[str, str], ...]


def module_stack(node: fx.Node, canonical: Mapping[str, str]) -> Stack:
    """The module calls that *node* was recorded in, outermost first, without the model itself.

    *canonical*: path -> first path of the same module, for modules registered under several names.
    """
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path and not path.startswith("_empty_nn_module_stack"):
            found.append((key, canonical.get(path, path)))
    return tuple(found)


def canonical_paths(model: nn.Module) -> dict[str, str]:
    """For every module path, the first path at which the same module is registered."""
    first: dict[int, str] = {}
    return {path: first.setdefault(id(m), path) for path, m in model.named_modules(remove_duplicate=False)}


def leaf_calls(stacks: Iterable[Stack]) -> set[str]:
    """Keys of the module calls that contain exactly one of the operators with these *stacks*."""
    counts = Counter(key for stack in stacks for key, _ in stack)
    return {key for key, count in counts.items() if count == 1}


def name_operators(stacks: Sequence[Stack], operators: Sequence[str]) -> list[str]:
    """Names in execution order. *operators*: lower-case operator names, `conv2d`."""
    leaves = leaf_calls(stacks)
    calls: Counter[str] = Counter()
    generated: Counter[str] = Counter()
    names = []
    for stack, operator in zip(stacks, operators, strict=True):
        key, path = stack[-1] if stack else ("", "")
        if key in leaves:
            k = calls[path]
            calls[path] += 1
            names.append(path if k == 0 else f"{path}._call_{k}")
            continue
        prefix = f"{path}." if path else ""
        names.append(f"{prefix}_generated_{operator}_{generated[path]}")
        generated[path] += 1
    return names
