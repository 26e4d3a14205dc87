"""From the checkpoint files that people have to a parameter tree of ours, and back.

`read` takes a .ckpt, a .safetensors or a diffusers folder; `sdjax.checkpoint.save` and the two writers of
`convert.write` store what it gives; `lazy` is the same without holding all of it in memory. On the command line,
`python -m convert SRC DST` (or `sdjax-convert`) does both.
"""

from convert.read import Converted, configuration, inspect, lazy, named_config, read
from convert.source import CheckpointError

__all__ = ["CheckpointError", "Converted", "configuration", "inspect", "lazy", "named_config", "read"]
