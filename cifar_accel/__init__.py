"""cifar_accel: an exact, fast image-classification trainer on Hugging Face Accelerate and timm.

For notebooks, beside the command line:

    model = cifar_accel.load("RUN")     # a run folder, its model/, or a local-dir model of timm
    model.predict(["cat.png"])          # [[Prediction(label="cat", probability=0.93), ...]]
    cifar_accel.predict("RUN", ["cat.png"])                  # the same in one call
    for run in cifar_accel.read_runs("checkpoint"):          # each with options, summary and rows
        print(run.path, run.options["optimizer"], run.summary.get("accuracy"))

A user's fault is raised as `cifar_accel.BadInput`. Types are in __init__.pyi.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each name lies. They are loaded when they are asked for: torch takes seconds, and a command
# line is to answer at once.
_API = {
    "BadInput": "errors",
    "load": "use.classifier",
    "predict": "use.classifier",
    "Classifier": "use.classifier",
    "Prediction": "use.classifier",
    "read_runs": "results.runs",
    "RunFiles": "results.runs",
}
__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    """The names of `_API` (PEP 562)."""
    if name not in _API:
        raise AttributeError(f"module 'cifar_accel' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cifar_accel.{_API[name]}"), name)


def __dir__() -> list[str]:
    """For the completion of a notebook."""
    return sorted({*globals(), *__all__})
