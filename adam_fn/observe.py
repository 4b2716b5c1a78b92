"""Which transformations a transformation calls: chains and wrappers, of any package, close over what they contain."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

from adam_fn.leaves import PyTree


class Call(NamedTuple):
    """A call of an update of this package: what defines the transformation, and the call's arguments."""

    spec: Any
    grads: PyTree
    state: Any
    params: PyTree | None


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("adam_fn_calls", default=None)


@contextlib.contextmanager
def observed() -> Iterator[list[Call]]:
    """Lists the calls that are made inside; they are made as ever."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def note(call: Call) -> None:
    """To be said at every call."""
    if (calls := _calls.get()) is not None:
        calls.append(call)
