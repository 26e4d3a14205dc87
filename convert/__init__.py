"""From the checkpoint files that people have to a parameter tree of ours, and back.

`read` takes a .ckpt, a .safetensors or a diffusers folder; `sdjax.storage.checkpoint.save` and the two writers of
`convert.write` store what it gives; `lazy` is the same without holding all of it in memory, `inspect` and
`configuration` look at names and shapes alone. On the command line, `python -m convert SRC DST` (or `sdjax-convert`)
does both.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.files.source import CheckpointError
    from convert.read import Converted, configuration, inspect, lazy, named_config, read

__all__ = ["CheckpointError", "Converted", "configuration", "inspect", "lazy", "named_config", "read"]


class _Package(ModuleType):
    """This package: its public names are imported when they are first asked for, since a command must be there to take
    Ctrl-C before anything slow is imported.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'convert' has no attribute {name!r}")
        return getattr(importlib.import_module("convert.read"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        """`convert.read` is the function, also when Python sets it to the module of that name."""
        super().__setattr__(name, value.read if name == "read" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
