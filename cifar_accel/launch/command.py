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

from cifar_accel.errors import BadInput

# What one process needs from an accelerate config file: its key -> the variable that is read.
VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "use_cpu": "ACCELERATE_USE_CPU",
}


# Keys that only Accelerate's own launcher understands.
SECTIONS = (
    "dynamo_config",
    "fsdp_config",
    "deepspeed_config",
    "megatron_lm_config",
    "ipex_config",
    "mpirun_config",
)


SHIPPED = Path(__file__).parent.parent.parent / "accelerate_configs"


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
    shipped = SHIPPED / f"{name}.yaml"
    why = f"{gpus} GPU{'s' * (gpus != 1)} here, and no accelerate config of your own"
    return (shipped if shipped.is_file() else None), why


def count_gpus() -> int:
    """CUDA devices that a process would see, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count(
        "GPU "
    )
    return (
        listed
        if visible is None
        else min(listed, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    )


def command_for(words: list[str]) -> tuple[list[str], dict[str, str], str]:
    """The command that trains with options `words`, the variables to add to its environment, and a line that says why.

    Raises BadInput when the config file cannot be read.
    """
    file, why = config_file()
    module = [sys.executable, "-m", "cifar_accel", *words]
    if file is None:
        return module, {}, f"launch: one process ({why})"
    config = read_launcher_config(file)
    kind, processes = (
        str(config.get("distributed_type", "NO")),
        int(config.get("num_processes") or 1),
    )
    environment = variables(file, config)
    alone = kind == "NO" or (
        kind == "MULTI_GPU" and processes == 1 and int(config.get("num_machines") or 1) == 1
    )
    if alone and not any(config.get(key) for key in SECTIONS):
        return module, environment, f"launch: one process, settings of {file} ({why})"
    if kind == "MULTI_CPU":
        rest = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        why = f"launch: {processes} CPU processes by torchrun, settings of {file} ({why})"
        return [*rest, "-m", "cifar_accel", *words], environment, why
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    if file == SHIPPED / "multi_gpu.yaml":
        launcher += ["--num_processes", str(count_gpus())]
    return (
        [*launcher, "-m", "cifar_accel", *words],
        {},
        f"launch: accelerate launch --config_file {file} ({why})",
    )


def read_launcher_config(file: Path) -> dict[str, Any]:
    """The keys of an accelerate config file. Raises BadInput when it cannot be read or holds none."""
    try:
        config = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError, RecursionError) as e:
        raise BadInput(
            f"{file}: cannot be read as an accelerate config ({' '.join(str(e).split())})"
        ) from e
    if not isinstance(config, dict):
        raise BadInput(
            f"{file}: is no accelerate config (it holds no keys); make one with accelerate config"
        )
    if config.get("distributed_type") is False:  # an unquoted NO
        config["distributed_type"] = "NO"
    for key in ("num_processes", "num_machines", "gradient_accumulation_steps"):
        value = config.get(key)
        if value is not None and not (isinstance(value, int) and value > 0):
            raise BadInput(f"{file}: {key} {value}: must be a whole number of 1 or more")
    return config


def variables(file: Path, config: dict[str, Any]) -> dict[str, str]:
    """What the processes read of an accelerate config; what the caller has set already wins and is left out."""
    found = {
        variable: str(config[key])
        for key, variable in VARIABLES.items()
        if config.get(key) is not None
    }
    if (
        SHIPPED in file.parents
    ):  # nobody said so: --device may choose a device that was not looked for
        found.pop("ACCELERATE_USE_CPU", None)
    if str(config.get("gpu_ids") or "all") != "all":
        found["CUDA_VISIBLE_DEVICES"] = str(config["gpu_ids"])
    return {k: v for k, v in found.items() if k not in os.environ}


def dry_environment() -> dict[str, str]:
    """What one process that only looks needs to know of the processes that a launcher would start."""
    file, _ = config_file()
    if file is None:
        return {}
    config = read_launcher_config(file)
    several = str(config.get("distributed_type", "NO")) != "NO"
    processes = (
        count_gpus()
        if file == SHIPPED / "multi_gpu.yaml"
        else int(config.get("num_processes") or 1)
    )
    kind, machines = str(config.get("distributed_type")), int(config.get("num_machines") or 1)
    known = variables(file, config) | {"CIFAR_ACCEL_PROCESSES": str(processes if several else 1)}
    if several:
        known["LOCAL_WORLD_SIZE"] = str(max(1, processes // machines))
    return known | (
        {f"ACCELERATE_USE_{kind}": "true"} if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") else {}
    )
