"""A laboratory for long-context position codes; `load_model` is the way in."""

__version__ = "0.1.0"


def __getattr__(name):
    "Import `load_model` when it is first used, so that importing pispiral does not import torch."
    if name == "load_model":
        from pispiral.model.load import load_model
        return load_model
    raise AttributeError(f"module 'pispiral' has no attribute {name!r}")
