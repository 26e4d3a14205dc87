"""From requests to pictures: the pure functions, the programs made of them, and the `Pipeline` that runs them."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`sdjax.pipeline.Pipeline`, imported when it is asked for."""
    if name == "Pipeline":
        from sdjax.pipeline.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module 'sdjax.pipeline' has no attribute {name!r}")
