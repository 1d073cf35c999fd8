"""Items that a thread prepares while earlier ones are used."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# Steps that are prepared while one is used: some take longer, such as the first of a window.
_AHEAD = 4
T = TypeVar("T")


@dataclass
class Prefetched(Generic[T]):
    """Iterates over items that a thread prepares a few ahead.

    Args:
        items: prepared in the thread.
        waited: seconds spent waiting for the thread so far.
    """

    items: Iterable[T]
    waited: float = field(default=0.0, init=False)

    def __iter__(self) -> Iterator[T]:
        items = iter(self.items)
        thread = ThreadPoolExecutor(1)
        try:
            coming = deque(thread.submit(next, items, None) for _ in range(_AHEAD))
            while True:
                began = time.perf_counter()
                item = coming.popleft().result()
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                coming.append(thread.submit(next, items, None))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
