"""`python -m cifar_accel.launch OPTIONS`: start a training as fits this machine; without options, the tour."""

import os
import sys
from pathlib import Path

from cifar_accel.errors import BadInput
from cifar_accel.files import home
from cifar_accel.launch.child import run_child
from cifar_accel.launch.command import command_for, dry_environment


def tour() -> int:
    """The report's study in miniature, its tables, and the command for the real thing; returns the exit code."""
    from cifar_accel.cli import report_command, study_command

    code = study_command([str(Path(__file__).parent.parent.parent / "studies" / "tour.yaml")])
    if code in (0, 1):
        print()
        code = report_command(["checkpoint/tour"]) or code
        print("\nThe real thing on CIFAR-100 (downloads the images and NFNet-F0's weights):")
        print("    ./launch.sh --model nfnet")
    return code


def main() -> int:
    """Replace this process by the training; without options, run the tour."""
    if not sys.argv[1:]:
        return tour()
    try:
        command, environment, why = command_for(sys.argv[1:])
    except BadInput as e:
        print(f"cifar_accel: {e}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(sys.argv[1:]):
        command, environment = [sys.executable, "-m", "cifar_accel", *sys.argv[1:]], {}
    elif "--dry-run" in sys.argv[1:]:
        print(why, flush=True)
        command, environment = (
            [sys.executable, "-m", "cifar_accel", *sys.argv[1:]],
            dry_environment(),
        )
    else:
        print(why, flush=True)
    if command[1:3] == ["-m", "cifar_accel"]:
        os.execvpe(command[0], command, os.environ | environment)
    from cifar_accel.console import fail
    from cifar_accel.options.parsing import parse_training

    try:  # here, because the launcher would turn a 2 into a 1
        args, _ = parse_training(sys.argv[1:])
    except BadInput as e:
        return fail(str(e))
    return run_child(command, environment, home(args.save_dir) / str(args.run_name))


if __name__ == "__main__":
    sys.exit(main())
