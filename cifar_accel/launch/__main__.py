"""Starts a training as fits this machine: `python -m cifar_accel.launch [WORDS]`.

Words are a training's options, or a command of `cifar-accel` and its options. Without any it runs
the tour.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cifar_accel.cli import guarded, main, report_command, study_command
from cifar_accel.launch.child import run_child
from cifar_accel.launch.command import check_launcher, command_for, dry_environment
from cifar_accel.options.parsing import parse_training
from cifar_accel.records.folder import folder_of
from cifar_accel.yaml_files import shipped_folder


def launch(words: list[str]) -> int:
    """Do what `words` say; returns the exit code, if this process is not replaced by another."""
    if not words:
        return tour()
    if words[0] == "train":
        return train(words[1:])
    # No option of a training stands without a dash, so another word is the name of a command.
    return train(words) if words[0].startswith("-") else main(words)


def tour() -> int:
    """The report's study in miniature, its tables, and the command for the real thing."""
    code = study_command([str(shipped_folder("studies") / "tour.yaml")])
    # 1 is a study of which some runs failed: the tables of the others are worth having.
    if code not in (0, 1):
        return code
    print()
    code = report_command(["checkpoint/tour"]) or code
    print("\nThe real thing on CIFAR-100, in about an hour (downloads the images and the weights):")
    print("    ./launch.sh --recipe finetune --model tf_efficientnet_lite0 --budget 1h")
    return code


@guarded
def train(words: Sequence[str]) -> int:
    """Start a training with the options `words`.

    A single process takes the place of this one. Several are children of a launcher that is a child
    of this process. Raises BadInput for what is known to be wrong before anything is started.
    """
    # A config that cannot be read is told in any case, before the words are looked at.
    start = command_for(list(words))
    directly = [sys.executable, "-m", "cifar_accel", *words]
    # What only prints needs one process, which for --dry-run knows how many a start would have.
    if {"-h", "--help", "--version"} & set(words):
        replace_this_process(directly, {})
    if "--dry-run" in words:
        print(start.reason, flush=True)
        replace_this_process(directly, dry_environment())

    # Neither signals nor exit codes need us where no launcher is between.
    check_launcher()
    print(start.reason, flush=True)
    if start.command == directly:
        replace_this_process(start.command, start.environment)

    # The options are looked at here, because a launcher would turn the exit code 2 into 1.
    args, _ = parse_training(words)
    return run_child(start.command, start.environment, folder_of(args))


def replace_this_process(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Run `command` in the place of this process, with `environment` added."""
    os.execvpe(command[0], command, os.environ | environment)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
