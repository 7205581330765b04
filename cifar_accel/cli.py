"""The command line: `python -m cifar_accel OPTIONS` trains; `cifar-accel COMMAND` does the rest.

Parsing and every check of the options come before torch is imported.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import cifar_accel
from cifar_accel.console import (
    BAD_INPUT,
    FAILED,
    STOPPED,
    complain,
    fail,
    is_main_process,
    open_stdout,
    print_result,
    say,
)
from cifar_accel.errors import BadInput, TrainingError, did_you_mean
from cifar_accel.machine.environment import mixed_precision, prepare_libraries, whole_number
from cifar_accel.machine.signals import StopRequest
from cifar_accel.options.options import (
    CompareArguments,
    EvaluateArguments,
    ExportArguments,
    PredictArguments,
    ReportArguments,
    StudyArguments,
    TrainingArguments,
)
from cifar_accel.options.parsing import normal_words, parse, parse_training
from cifar_accel.records.folder import Opened, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """The console script `cifar-accel`; returns the exit code."""
    open_stdout()
    # The console script calls it without arguments.
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: cifar-accel COMMAND [OPTIONS]\n\ncommands:")
        for name, command in COMMANDS.items():
            print(f"  {name:<10}{command.help}")
        print("\ncifar-accel COMMAND --help explains one of them; cifar-accel --version")
        return 0
    if words[0] == "--version":
        say(f"cifar_accel {cifar_accel.__version__}")
        return 0
    name, *options = words
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        return fail(f"unknown command {name}; there are {known}{did_you_mean(name, COMMANDS)}")
    return COMMANDS[name].run(options)


def guarded(work: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """A command whose bad input and failures are told in one line, each with its exit code.

    Anything else propagates: the traceback is printed and the exit code is 1. The process group is
    taken down in any case.
    """

    @functools.wraps(work)
    def command(argv: Sequence[str]) -> int:
        open_stdout()
        # Any of the commands may load them, and --dry-run times steps as a training takes them.
        prepare_libraries()
        try:
            return work(argv)
        except (BadInput, TrainingError) as error:
            # For who looks for a bug behind the one line.
            if os.environ.get("CIFAR_ACCEL_DEBUG"):
                traceback.print_exc()
            if isinstance(error, BadInput):
                return fail(str(error), BAD_INPUT)
            kind = type(error).__name__
            return fail(f"{kind}: {error}; checkpoints already written are kept", FAILED)
        except KeyboardInterrupt:
            return fail("stopped at once; checkpoints already written are kept", STOPPED)
        finally:
            # Where torch was never loaded there is no group, and this is no reason to load it.
            torch = sys.modules.get("torch")
            if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    return command


@guarded
def train_command(argv: Sequence[str]) -> int:
    """Train; exit code 0 when finished, 2 for bad input, 143 when stopped, 1 for anything else."""
    # What is wrong with the options is told before anything is loaded or written.
    args, origin = parse_training(argv)
    args, origin = with_workers(args, origin)
    if args.dry_run:
        from cifar_accel.dry_run import dry_run

        # One process looks for all.
        return dry_run(args, origin) if is_main_process() else 0

    # The main process alone opens the run folder. Where there is nothing to do, nothing is loaded.
    opened = None
    if is_main_process():
        opened = _open(args, origin)
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if opened.finished and alone:
            return 0

    # All processes enter, for the others learn in there whether the run is finished.
    try:
        summary = load_and_train(args, origin, opened)
    finally:
        # A folder in which the training did not begin goes away; any other stays as it is.
        if opened:
            opened.discard()

    # What is shown of a run is drawn by its main process.
    if opened and not opened.finished:
        from cifar_accel.results.plots import plot_run

        plot_run(opened.path, say)
    return STOPPED if summary["status"] == "preempted" else 0


def with_workers(
    args: TrainingArguments, origin: dict[str, str]
) -> tuple[TrainingArguments, dict[str, str]]:
    """The options and their origins, with a number of workers where the timm pipeline has none yet.

    The training processes of this host share its cores.
    """
    if args.pipeline != "timm" or args.workers is not None:
        return args, origin
    processes = max(1, whole_number("LOCAL_WORLD_SIZE"))
    cores = os.cpu_count() or 1
    workers = min(8, max(1, cores // processes))
    return replace(args, workers=workers), {**origin, "workers": "derived"}


def _open(args: TrainingArguments, origin: dict[str, str]) -> Opened:
    """Open the run folder; a path that the system refuses is bad input."""
    precision = mixed_precision()
    try:
        return open_run(args, precision, say, origin)
    except OSError as error:
        raise BadInput(str(error)) from error


def load_and_train(
    args: TrainingArguments, origin: dict[str, str], opened: Opened | None
) -> dict[str, Any]:
    """Load torch and the like, and train; returns what summary.json holds."""
    # From here on a signal ends the process in order, with 143.
    stop = StopRequest(args.max_time)
    if opened:
        stop.last_act = opened.discard
    say("loading torch, timm and accelerate")
    stop.loading = True
    from cifar_accel.train import train

    stop.loading = False
    return train(args, origin, opened, stop)


@guarded
def evaluate_command(argv: Sequence[str]) -> int:
    """Evaluate a trained model."""
    args = parse(EvaluateArguments, normal_words(argv), "cifar-accel evaluate")
    # It loads torch.
    from cifar_accel.use.evaluate_run import evaluate_run

    # What is no figure goes to stderr where a program reads stdout.
    evaluate_run(args, say, complain if args.json else say)
    return 0


@guarded
def predict_command(argv: Sequence[str]) -> int:
    """Say what a model takes images for; exit code 1 when one of them is no whole image."""
    args = parse(PredictArguments, argv, "cifar-accel predict")
    if not args.images:
        raise BadInput("predict: give image files, folders, or - for paths on stdin")
    if args.json and args.csv:
        raise BadInput("predict: --json and --csv contradict each other; leave one of them out")
    # Under a launcher of several processes one does it.
    if not is_main_process():
        return 0
    # It loads torch.
    from cifar_accel.use.predict import predict

    return predict(args, complain)


@guarded
def export_command(argv: Sequence[str]) -> int:
    """Write a model in another form; exit code 1 when that does not say what the model says."""
    args = parse(ExportArguments, argv, "cifar-accel export")
    if not is_main_process():
        return 0
    # It loads torch.
    from cifar_accel.use.export import export

    return export(args, say, complain)


@guarded
def study_command(argv: Sequence[str]) -> int:
    """Run a study; exit code 0 when all runs are finished, 1 when one failed, 143 when stopped."""
    # The launcher's modules are loaded for this command alone.
    from cifar_accel.launch.study import run_study

    # Options after -- go to every run.
    words = list(argv)
    for_every_run = []
    if "--" in words:
        end = words.index("--")
        words, for_every_run = words[:end], words[end + 1 :]
    args = parse(StudyArguments, words, "cifar-accel study")
    return run_study(args, for_every_run, say)


@guarded
def report_command(argv: Sequence[str]) -> int:
    """Print the tables of all runs below a folder and write report.md and report.html there."""
    # altair and jinja2 are loaded for this command alone.
    from cifar_accel.results.report import write_report

    args = parse(ReportArguments, argv, "cifar-accel report")
    say(write_report(args))
    return 0


@guarded
def compare_command(argv: Sequence[str]) -> int:
    """Print what the runs of two settings, or of all below a folder, say of their difference."""
    from cifar_accel.results.compare import compare

    args = parse(CompareArguments, argv, "cifar-accel compare")
    # What a program reads must be whole.
    tell = print_result if args.json else say
    tell(compare(args))
    return 0


class Command(NamedTuple):
    """A command of `cifar-accel`: what it does with its words, and its line of help."""

    run: Callable[[Sequence[str]], int]
    help: str


COMMANDS = {
    "train": Command(train_command, "train a model (the same as python -m cifar_accel)"),
    "evaluate": Command(
        evaluate_command, "evaluate a trained model on its test set or other images"
    ),
    "predict": Command(predict_command, "say what a trained model takes images for"),
    "export": Command(export_command, "write a trained model as ONNX, for torch, or for the hub"),
    "study": Command(study_command, "run every run of a study file that is not finished"),
    "report": Command(
        report_command, "what all runs below a folder say, and one page that can be mailed"
    ),
    "compare": Command(compare_command, "whether one setting is better than another"),
}


if __name__ == "__main__":
    sys.exit(main())
