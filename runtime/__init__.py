"""A bundle, answering: `load`, `Generation`, `Request`. Each is imported when first asked for."""

from importlib import import_module

_HOMES = {
    "load": "vlquant.runtime.pipeline",
    "Pipeline": "vlquant.runtime.pipeline",
    "Answer": "vlquant.runtime.answer",
    "Generation": "vlquant.runtime.generate",
    "Request": "vlquant.request",
}

__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
