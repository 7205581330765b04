"""The command line: `python -m cifar_accel OPTIONS` trains; `cifar-accel COMMAND` does the rest.

Parsing and every check of the options come before torch is imported.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cifar_accel.console import fail, say, speak_somewhere
from cifar_accel.errors import BadInput, TrainingError, did_you_mean
from cifar_accel.machine.signals import StopRequest
from cifar_accel.options.options import (
    EvaluateArguments,
    ReportArguments,
    StudyArguments,
    TrainingArguments,
)
from cifar_accel.options.parsing import parse, parse_training
from cifar_accel.records.folder import Opened, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `cifar-accel`; returns the exit code."""
    commands: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
        "train": (train_command, "train a model (the same as python -m cifar_accel)"),
        "evaluate": (evaluate_command, "evaluate a run folder on its test set"),
        "study": (study_command, "run every run of a study file that is not finished"),
        "report": (report_command, "tables, plots and a page of all runs below a folder"),
    }
    speak_somewhere()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands:
        return commands[argv[0]][0](argv[1:])
    if argv and argv[0] not in ("-h", "--help"):
        return fail(
            f"unknown command {argv[0]}; there are {', '.join(commands)}{did_you_mean(argv[0], commands)}"
        )
    print("usage: cifar-accel COMMAND [OPTIONS]\n\ncommands:")
    for name, (_, text) in commands.items():
        print(f"  {name:<10}{text}")
    print("\ncifar-accel COMMAND --help explains one of them.")
    return 0


def train_command(argv: Sequence[str]) -> int:
    """Train; exit code 0 when finished, 2 for bad input, 143 when stopped by a signal, 1 for anything else."""
    speak_somewhere()
    try:
        args, origin = parse_training(argv)
        if args.pipeline == "timm" and args.workers is None:
            local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            args = replace(args, workers=min(8, max(1, (os.cpu_count() or 1) // local)))
            origin["workers"] = "derived"
        opened = None
        if args.dry_run:
            return guarded(lambda: dry_run_command(args, origin))
        if os.environ.get("RANK", "0") == "0":
            opened = open_run(args, os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), say)
            if opened.finished and os.environ.get("WORLD_SIZE", "1") == "1":
                return 0
    except (
        BadInput,
        OSError,
    ) as e:  # a name too long for a file, or a folder where a file should be
        return fail(str(e))

    def work() -> dict[str, Any]:
        try:
            summary = load_and_train(args, origin, opened)
        finally:
            if opened:
                opened.discard()
        if opened and not opened.finished:
            from cifar_accel.results.charts import plot_run

            plot_run(opened.path, say)
        return summary

    return guarded(work)


def load_and_train(
    args: TrainingArguments, origin: dict[str, str], opened: Opened | None
) -> dict[str, Any]:
    """Set what the libraries read while they are loaded, load them, and train; returns what summary.json holds."""
    stop = StopRequest(args.max_time)  # from here on a signal ends it in order, with 143
    say("loading torch, timm and accelerate")
    # What a Mac's GPU lacks is computed on its processor; torch says so once for each operation.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # GNU's OpenMP lets threads spin 300,000 rounds for each other, which on a busy processor makes a small model
    # several times slower (benchmarks/LOG.md); on an idle one this is as good.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from cifar_accel.train import train

    return train(args, origin, say, opened, stop)


def dry_run_command(args: TrainingArguments, origin: dict[str, str]) -> dict[str, Any]:
    """Print the plan on the main process; returns an exit code."""
    if os.environ.get("RANK", "0") != "0":
        return {}
    from cifar_accel.dry_run import dry_run

    return {"code": dry_run(args, origin, say)}


def guarded(work: Callable[[], dict[str, Any]]) -> int:
    """Run `work`, turn its end into an exit code, and take the process group down whatever happens."""
    try:
        summary = work()
        return 143 if summary.get("status") == "preempted" else int(summary.get("code", 0))
    except BadInput as e:
        if os.environ.get("CIFAR_ACCEL_DEBUG"):  # for who looks for a bug behind the one line
            traceback.print_exc()
        return fail(str(e))
    except KeyboardInterrupt:
        return fail("stopped at once; checkpoints already written are kept", 143)
    except Exception as e:
        if not isinstance(e, TrainingError) or os.environ.get("CIFAR_ACCEL_DEBUG"):
            traceback.print_exc()
        return fail(f"{type(e).__name__}: {e}; checkpoints already written are kept", 1)
    finally:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def evaluate_command(argv: Sequence[str]) -> int:
    """Evaluate a run folder."""
    args = parse(EvaluateArguments, argv, "cifar-accel evaluate")

    def work() -> dict[str, Any]:
        from cifar_accel.use.evaluate_run import evaluate_run

        return evaluate_run(args, say)

    return guarded(work)


def study_command(argv: Sequence[str]) -> int:
    """Run a study; exit code 0 when every run is finished, 1 when one failed, 143 when stopped by a signal."""
    from cifar_accel.launch.study import run_study

    extra = list(argv)[list(argv).index("--") + 1 :] if "--" in argv else []
    own = list(argv)[: list(argv).index("--")] if "--" in argv else list(argv)
    args = parse(StudyArguments, own, "cifar-accel study")
    try:
        return run_study(args, extra, say)
    except BadInput as e:
        return fail(str(e))


def report_command(argv: Sequence[str]) -> int:
    """Print the tables of all runs below a folder and write report.md and report.html there."""
    from cifar_accel.results.page import write_report

    args = parse(ReportArguments, argv, "cifar-accel report")
    try:
        print(write_report(args))
    except BadInput as e:
        return fail(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
