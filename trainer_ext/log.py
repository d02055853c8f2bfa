"""The package logger: one handler on stderr, INFO by default."""

from __future__ import annotations

import logging
from functools import lru_cache

_NAME = "trainer_ext"


@lru_cache(maxsize=1)
def _root() -> logging.Logger:
    root = logging.getLogger(_NAME)
    if root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(levelname)s|%(name)s] %(message)s"))
        root.addHandler(handler)
        # Scripts add root handlers of their own; every line would appear twice.
        root.propagate = False
    return root


def get_logger(module_name: str) -> logging.Logger:
    """Returns the logger of a module of this package, ready to be heard.

    A level or a handler that the user has put on ``logging.getLogger("trainer_ext")`` is kept.
    """
    _root()
    return logging.getLogger(module_name)
