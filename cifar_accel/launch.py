"""How to start a training on this machine: `python -m cifar_accel.launch OPTIONS` does it, and `study` asks here too.

The user's own `accelerate config` file comes first, else the YAML of accelerate_configs/ that fits the hardware. One
process is started by `python -m cifar_accel` itself with the variables of that file, so that signals and exit codes
reach the caller; several by `accelerate launch`. Imports nothing heavy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

# What one process needs from an accelerate config file: its key -> the variable that Accelerate reads.
VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "use_cpu": "ACCELERATE_USE_CPU",
}


def config_file() -> tuple[Path | None, str]:
    """The accelerate config file to use, and why."""
    if os.environ.get("ACCELERATE_CONFIG_FILE"):
        return Path(os.environ["ACCELERATE_CONFIG_FILE"]), "ACCELERATE_CONFIG_FILE"
    cache = Path(
        os.environ.get("HF_HOME", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    ).expanduser()
    own = cache / "accelerate" / "default_config.yaml"
    if own.is_file():
        return own, "your own accelerate config"
    gpus = count_gpus()
    name = {0: "cpu", 1: "single_gpu"}.get(gpus, "multi_gpu")
    shipped = Path(__file__).parent.parent / "accelerate_configs" / f"{name}.yaml"
    why = f"{gpus} GPU{'s' * (gpus != 1)} here, and no accelerate config of your own"
    return (shipped if shipped.is_file() else None), why


def count_gpus() -> int:
    """CUDA devices that a process would see, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    return (
        listed if visible is None else min(listed, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    )


def command_for(words: list[str]) -> tuple[list[str], dict[str, str], str]:
    """The command that trains with options `words`, the variables to add to its environment, and a line that says why.

    Raises ValueError when the config file cannot be read.
    """
    file, why = config_file()
    module = [sys.executable, "-m", "cifar_accel", *words]
    if file is None:
        return module, {}, f"launch: one process ({why})"
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as e:
        raise ValueError(f"{file}: cannot be read as an accelerate config ({' '.join(str(e).split())})") from e
    kind, processes = str(config.get("distributed_type", "NO")), int(config.get("num_processes") or 1)
    if kind == "NO" or (kind == "MULTI_GPU" and processes == 1 and int(config.get("num_machines") or 1) == 1):
        environment = {variable: str(config[key]) for key, variable in VARIABLES.items() if config.get(key) is not None}
        # Of a file, a variable that the caller set wins, as with `accelerate launch` options over its file.
        environment = {k: v for k, v in environment.items() if k not in os.environ}
        return module, environment, f"launch: one process, settings of {file} ({why})"
    if kind == "MULTI_CPU":
        rest = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        return (
            [*rest, "-m", "cifar_accel", *words],
            {},
            f"launch: {processes} CPU processes by torchrun, {file} ({why})",
        )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    if file.parent.name == "accelerate_configs" and file.stem == "multi_gpu":
        launcher += ["--num_processes", str(count_gpus())]
    return [*launcher, "-m", "cifar_accel", *words], {}, f"launch: accelerate launch --config_file {file} ({why})"


def tour() -> int:
    """The report's study in miniature, its tables, and the command for the real thing; returns the exit code."""
    from cifar_accel.cli import report_command, study_command

    code = study_command([str(Path(__file__).parent.parent / "studies" / "tour.yaml")])
    if code in (0, 1):
        print()
        code = report_command(["checkpoint/tour"]) or code
        print("\nThe real thing, on CIFAR-100 (downloads the data and NFNet-F0's ImageNet weights):")
        print("    ./launch.sh --model nfnet")
    return code


def main() -> int:
    """Replace this process by the training; without options, run the tour."""
    if not sys.argv[1:]:
        return tour()
    try:
        command, environment, why = command_for(sys.argv[1:])
    except ValueError as e:
        print(f"cifar_accel: {e}", file=sys.stderr)
        return 2
    if not {"-h", "--help"} & set(sys.argv[1:]):
        print(why, flush=True)
    os.execvpe(command[0], command, os.environ | environment)


if __name__ == "__main__":
    sys.exit(main())
