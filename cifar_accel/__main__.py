"""Trains: `python -m cifar_accel ...`, `accelerate launch -m ...` and `torchrun ... -m ...`."""

import sys
from importlib.util import find_spec

if __name__ == "__main__":
    # Most often it is the system's Python that was asked.
    needed = ("torch", "timm", "accelerate", "tyro", "pydantic", "filelock", "psutil")
    missing = ", ".join(name for name in needed if not find_spec(name))
    if missing:
        remedy = "start ./launch.sh, or activate the environment: . .venv/bin/activate"
        print(f"cifar_accel: {sys.executable} has no {missing}; {remedy}", file=sys.stderr)
        sys.exit(2)
    from cifar_accel.cli import main, train_command

    words = sys.argv[1:]
    sys.exit(main(words) if words == ["--version"] else train_command(words))
