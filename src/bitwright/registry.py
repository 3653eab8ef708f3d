"""A registry: names to things of one kind; refuses duplicates, explains unknown names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from bitwright.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to registered things of one *kind* (used in messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register *item* under *name*. A second registration of a name is a programming error."""
        assert name not in self._items, f"{self.kind} {name!r} is registered twice"
        self._items[name] = item
        return item

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator form of `add`, for one or more names."""

        def decorate(item: T) -> T:
            for name in names:
                self.add(name, item)
            return item

        return decorate

    def get(self, name: str, *, where: str) -> T:
        """The thing called *name*. *raises* `UnknownName`, listing the near or all names."""
        if name not in self._items:
            raise UnknownName(where, kind=self.kind, name=name, known=self._items)
        return self._items[name]

    def find(self, name: str) -> T | None:
        """The thing called *name*, or None."""
        return self._items.get(name)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
