"""Trains: `python -m cifar_accel ...`, `accelerate launch -m ...` and `torchrun ... -m ...`."""

import sys

from cifar_accel.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
