"""The command line: `python -m cifar_accel OPTIONS` trains; `cifar-accel COMMAND` does the rest.

Parsing and every check of the options come before torch is imported.
"""

import contextlib
import io
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import tyro

from cifar_accel.config import (
    EvaluateArguments,
    ReportArguments,
    StudyArguments,
    TrainingArguments,
    did_you_mean,
    recipe_defaults,
    resolve,
)
from cifar_accel.run_folder import Opened, open_run
from cifar_accel.stopping import StopRequest, TrainingError


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
        return fail(f"unknown command {argv[0]}; there are {', '.join(commands)}{did_you_mean(argv[0], commands)}")
    print("usage: cifar-accel COMMAND [OPTIONS]\n\ncommands:")
    for name, (_, text) in commands.items():
        print(f"  {name:<10}{text}")
    print("\ncifar-accel COMMAND --help explains one of them.")
    return 0


def speak_somewhere() -> None:
    """Give a process that was started without stdout or stderr (`>&-`) one that leads nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open


def say(line: str) -> None:
    """Print a line on the main process, above the progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # a full disk behind stdout costs the line, not the run
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(line)
                sys.stdout.flush()
            else:
                print(line, flush=True)


def fail(message: str, code: int = 2) -> int:
    """Print one line on stderr and return the exit code.

    Other ranks wait a moment first: when the main process has the same complaint, its launcher ends them meanwhile.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    print(
        f"cifar_accel: {'' if rank == '0' else f'[rank {rank}] '}{' '.join(message.split())}",
        file=sys.stderr,
        flush=True,
    )
    return code


def parse(kind: Any, argv: Sequence[str], prog: str, default: Any = None) -> Any:
    """tyro, with its boxed complaint folded into one line. Exits with 2, or 0 after --help."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=list(argv), prog=prog, **({} if default is None else {"default": default}))
    except SystemExit as e:
        if e.code:
            text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", captured.getvalue())
            lines = [line.strip(" │\t") for line in text.splitlines() if not re.match(r"\s*[╭╰]", line)]
            lines = [line for line in lines if line and not set(line) <= {"─"}]
            cut = next(
                (i for i, line in enumerate(lines) if line.startswith(("Argument helptext", "For full helptext"))), None
            )
            raise SystemExit(fail(f"{' '.join(lines[:cut])} ({_hint(argv, prog)})")) from None
        raise


# What other trainers call an option of ours.
SYNONYMS = {
    "--lr": "--learning-rate",
    "--wd": "--weight-decay",
    "--bs": "--batch-size",
    "--opt": "--optimizer",
    "--sched": "--scheduler",
    "--data": "--dataset",
    "--output": "--save-dir",
}
PRECISION = ("--mixed-precision", "--amp", "--fp16", "--bf16", "--precision")


def _hint(argv: Sequence[str], prog: str) -> str:
    """What to do about options that do not exist here."""
    for name in (word.partition("=")[0].replace("_", "-") for word in argv):
        if name in SYNONYMS:
            return f"here {name} is {SYNONYMS[name]}"
        if name in PRECISION:
            return "precision is the launcher's: accelerate launch --mixed_precision, or ACCELERATE_MIXED_PRECISION"
    return f"{prog} --help lists all options"


def _off(kind: Any) -> str | None:
    """How an option of type `kind` is turned off, which timm's users and ours write as none."""
    return "None" if "None" in str(kind) else "0" if kind in (int, float) else None


def parse_training(argv: Sequence[str]) -> tuple[TrainingArguments, dict[str, str]]:
    """Options of a training and where each value comes from. Raises ValueError, or SystemExit for a usage error."""
    types = {f.name: f.type for f in fields(TrainingArguments)}
    words: list[str] = []
    given: set[str] = set()
    for word in argv:
        name, equals, value = word.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if name.startswith("--"):
            given.add(field.removeprefix("no_") if field not in types else field)
            if types.get(field) is bool and equals:  # sweeps write --pretrained=False
                if value.lower() not in ("true", "false"):
                    raise ValueError(f"{name}={value}: must be true or false")
                word = name if value.lower() == "true" else f"--no-{name.removeprefix('--')}"
            elif value.lower() == "none" and (off := _off(types.get(field))):
                word = f"{name}={off}"
        elif word == "none" and words and (off := _off(types.get(words[-1].removeprefix("--").replace("-", "_")))):
            word = off
        words.append(word)
    recipes = re.findall(r"^--recipe[=\n](.+)$", "\n".join(words), re.MULTILINE)  # the last one counts, as for any flag
    defaults = recipe_defaults(recipes[-1] if recipes else TrainingArguments.recipe)
    return resolve(parse(TrainingArguments, words, "python -m cifar_accel", defaults), given & types.keys())


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
    except (ValueError, OSError) as e:  # a name too long for a file, or a folder where a file should be
        return fail(str(e))

    def work() -> dict[str, Any]:
        try:
            summary = load_and_train(args, origin, opened)
        finally:
            if opened:
                opened.discard()
        if opened and not opened.finished:
            from cifar_accel.report import plot_run

            plot_run(opened.path, say)
        return summary

    return guarded(work)


def load_and_train(args: TrainingArguments, origin: dict[str, str], opened: Opened | None) -> dict[str, Any]:
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
    except ValueError as e:
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
        from cifar_accel.evaluate import evaluate_run

        return evaluate_run(args, say)

    return guarded(work)


def study_command(argv: Sequence[str]) -> int:
    """Run a study; exit code 0 when every run is finished, 1 when one failed, 143 when stopped by a signal."""
    from cifar_accel.study import run_study

    extra = list(argv)[list(argv).index("--") + 1 :] if "--" in argv else []
    own = list(argv)[: list(argv).index("--")] if "--" in argv else list(argv)
    args = parse(StudyArguments, own, "cifar-accel study")
    try:
        return run_study(args, extra, say)
    except ValueError as e:
        return fail(str(e))


def report_command(argv: Sequence[str]) -> int:
    """Print the tables of all runs below a folder and write report.md and report.html there."""
    from cifar_accel.report import write_report

    args = parse(ReportArguments, argv, "cifar-accel report")
    try:
        print(write_report(args))
    except ValueError as e:
        return fail(str(e))
    return 0


if __name__ == "__main__":
    sys.exit(main())
