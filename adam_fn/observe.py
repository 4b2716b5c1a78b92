"""Which transformations a transformation contains: chains and wrappers, of any package, close over them."""

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


_seen: contextvars.ContextVar[list[object] | None] = contextvars.ContextVar("adam_fn_seen", default=None)


@contextlib.contextmanager
def observed() -> Iterator[list[object]]:
    """Lists what is noted inside, by this thread: of every `init` its `Spec`, of every `update` its `Call`."""
    seen: list[object] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def note(what: object) -> None:
    """To be said at every call."""
    if (seen := _seen.get()) is not None:
        seen.append(what)
