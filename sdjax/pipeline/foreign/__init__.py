"""Other tools' pictures as recipes: their text is read, and settings of a `Request` are made of it.

`read_foreign` reads a file; `parse_parameters`, `parse_comfyui` and `parse_invokeai` read the texts of AUTOMATIC1111's
web UI and its relatives, of ComfyUI, and of InvokeAI. What cannot be honoured is listed, one line each.
"""

from sdjax.pipeline.foreign.findings import Foreign
from sdjax.pipeline.foreign.parameters import parse_parameters

__all__ = ["Foreign", "parse_parameters"]
