"""The tasks of `python -m pcl_fast.evaluate`, a file each. A new file is found by itself."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from pcl_fast.evaluation.tasks.base import Context, Options, Outcome, Row, Task

__all__ = ["Context", "Options", "Outcome", "Row", "Task"]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
