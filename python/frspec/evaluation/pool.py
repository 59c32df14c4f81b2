"""Generators that are kept from one text to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ..errors import MemoryPlanError
from ..generator import Generator

Key = TypeVar("Key", bound=Hashable)


class GeneratorPool(Generic[Key]):
    """Generators by what tells them apart, loaded when they are needed and warmed up.

    Where memory is short only the latest one stays.
    """

    def __init__(
        self, load: Callable[[Key], Generator], warm_up: Callable[[Generator, Key], object]
    ):
        self._load = load
        self._warm_up = warm_up
        self._loaded: dict[Key, Generator] = {}

    def get(self, key: Key) -> Generator:
        """MemoryPlanError when memory does not even hold this one alone."""
        if key not in self._loaded:
            try:
                generator = self._load(key)
            except MemoryPlanError:
                if not self._loaded:
                    raise
                self._loaded.clear()
                generator = self._load(key)
            # The first passes touch memory and code for the first time: not what is measured.
            self._warm_up(generator, key)
            self._loaded[key] = generator
        return self._loaded[key]
