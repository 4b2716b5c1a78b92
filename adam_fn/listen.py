"""Hears which rules make their states: in a chain of closures there is no other way to find them."""

import contextlib
import contextvars
from collections.abc import Iterator

from adam_fn.rule import Rule

_HEARD: contextvars.ContextVar[list[Rule] | None] = contextvars.ContextVar("_HEARD", default=None)


def say(rule: Rule) -> None:
    """Called by every `init` of this package with its rule."""
    if (heard := _HEARD.get()) is not None:
        heard.append(rule)


@contextlib.contextmanager
def listening() -> Iterator[list[Rule]]:
    """A list of what is said meanwhile, by this thread."""
    heard: list[Rule] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
