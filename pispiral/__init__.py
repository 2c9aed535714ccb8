"""A laboratory for long-context position codes; `load_model` is the way in, `register_code` the way to add one."""

from importlib import import_module

__version__ = "0.1.0"

# name: the module that has it, imported when the name is first used, so that `import pispiral` does not import torch
_LAZY = {
    "load_model": "pispiral.model.load",
    "register_code": "pispiral.codes.registry",
    "CodeParams": "pispiral.codes.registry",
    "PositionCode": "pispiral.codes.registry",
    "register_task": "pispiral.tasks.registry",
    "Item": "pispiral.tasks.tokens",
    "register_rule": "pispiral.verdict.registry",
    "register_gate": "pispiral.verdict.registry",
    "register_figure": "pispiral.publish.registry",
    "register_table": "pispiral.publish.registry",
}


def __getattr__(name):
    "Import a public name when it is first used."
    if name in _LAZY: return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pispiral' has no attribute {name!r}")


def __dir__():
    "The public names."
    return [*globals(), *_LAZY]
