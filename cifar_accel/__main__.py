"""`accelerate launch -m cifar_accel ...`, `torchrun ... -m cifar_accel ...` and `python -m cifar_accel ...` train."""

import sys

from cifar_accel.cli import train_command

if __name__ == "__main__":
    sys.exit(train_command(sys.argv[1:]))
