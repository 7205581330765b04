"""Which command starts a training on this machine.

The user's own `accelerate config` file comes first, else the YAML of accelerate_configs/ that fits
the hardware. One process is started by `python -m cifar_accel` itself, with the variables of that
file, so that signals and exit codes reach the caller; several are started by a launcher. Loads
nothing heavy.
"""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, IPvAnyAddress, ValidationError

from cifar_accel.console import say
from cifar_accel.errors import BadInput
from cifar_accel.files import adapter
from cifar_accel.machine.environment import SHARDING, check_port
from cifar_accel.options.options import NotNegativeInt, PositiveInt
from cifar_accel.yaml_files import read_yaml, shipped_folder

# How long nvidia-smi may take, in seconds. With a driver that is not kept loaded it takes several.
PATIENCE = 30.0

# Sections of a config file that only accelerate launch understands.
SECTIONS = [
    f"{name}_config" for name in ("dynamo", "fsdp", "deepspeed", "megatron_lm", "ipex", "mpirun")
]

# A host's name. Its last part is no mere number, else it is an IP address that went wrong.
HostName = Annotated[str, Field(pattern=r"^([\w-]+\.)*[\w-]*[A-Za-z_-][\w-]*$")]


@dataclass(frozen=True)
class LauncherConfig:
    """What an accelerate config file says, as far as it matters here."""

    # NO, MULTI_CPU, MULTI_GPU, FSDP and others.
    distributed_type: str = "NO"
    # Processes of all machines together.
    num_processes: PositiveInt = 1
    num_machines: PositiveInt = 1
    machine_rank: NotNegativeInt = 0
    # Where the processes of several machines meet.
    main_process_ip: IPvAnyAddress | HostName | None = None
    # accelerate launch's default; 0 lets it look for a free one.
    main_process_port: Annotated[int, Field(ge=0, le=65535)] = 29500
    mixed_precision: str | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    use_cpu: bool | None = None
    # As in CUDA_VISIBLE_DEVICES. A single one may stand there without quotes.
    gpu_ids: Annotated[str, Field(coerce_numbers_to_str=True)] = "all"
    # Whether one of SECTIONS is there and not empty.
    has_sections: bool = False

    @property
    def needs_no_launcher(self) -> bool:
        """Whether `python -m cifar_accel` with a few variables does all that the file asks for."""
        if self.has_sections:
            return False
        if self.distributed_type == "MULTI_GPU":
            return self.num_processes == 1 and self.num_machines == 1
        return self.distributed_type == "NO"


class Start(NamedTuple):
    """How a training is started."""

    command: list[str]
    # Variables to add to the environment.
    environment: dict[str, str]
    # A line for the screen.
    reason: str


# ---- the config file


def config_file() -> tuple[Path, str]:
    """The accelerate config file to use, and why this one."""
    named = os.environ.get("ACCELERATE_CONFIG_FILE")
    if named:
        return Path(named), "ACCELERATE_CONFIG_FILE"
    # Where the Hugging Face libraries keep their files. Not by pathlib, which raises where a user
    # without a name has no home.
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    hub = os.path.expanduser(os.environ.get("HF_HOME", f"{cache}/huggingface"))
    own = Path(hub, "accelerate", "default_config.yaml")
    if own.is_file():
        return own, "your own accelerate config"

    gpus = count_gpus()
    plural = "" if gpus == 1 else "s"
    why = f"{gpus} GPU{plural} here, and no accelerate config of your own"
    name = ("cpu", "single_gpu", "multi_gpu")[min(gpus, 2)]
    return shipped_folder("accelerate_configs") / f"{name}.yaml", why


def count_gpus() -> int:
    """CUDA devices that a process would see, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _installed_gpus()
    named = [gpu for gpu in visible.split(",") if gpu.strip() not in ("", "-1")]
    return min(_installed_gpus(), len(named))


# Cached, because nvidia-smi may take a second.
@functools.cache
def _installed_gpus() -> int:
    if not shutil.which("nvidia-smi"):
        return 0
    quiet = subprocess.DEVNULL
    asked = subprocess.Popen(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=quiet, text=True)
    try:
        return asked.communicate(timeout=PATIENCE)[0].count("GPU ")
    except subprocess.TimeoutExpired:
        # Not waited for: behind a broken driver it may outlive even this.
        asked.kill()
        say(f"launch: nvidia-smi does not answer within {PATIENCE:g} s; going on as without a GPU")
        return 0


def read_launcher_config() -> tuple[Path, str, LauncherConfig]:
    """The accelerate config file to use, why this one, and what it says.

    Raises BadInput where it cannot be read, or where a value cannot be what its key stands for.
    """
    file, why = config_file()
    content = read_yaml(file) or {}
    if not isinstance(content, dict):
        raise BadInput(
            f"{file}: is no accelerate config (it holds no keys); make one with accelerate config"
        )

    # A key without a value counts as left out. YAML reads an unquoted NO as false.
    values = {name: value for name, value in content.items() if value is not None}
    for name, no in (("distributed_type", "NO"), ("mixed_precision", "no")):
        if values.get(name) is False:
            values[name] = no
    values["has_sections"] = any(values.get(name) for name in SECTIONS)
    try:
        # Keys that are no field of LauncherConfig are accelerate's alone, and ignored.
        config = adapter(LauncherConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        bound = first["msg"].replace("Input should be", "must be")
        raise BadInput(f"{file}: {first['loc'][0]} {first['input']}: {bound}") from error

    # Ours for several GPUs does not know how many are here.
    if file == shipped_folder("accelerate_configs") / "multi_gpu.yaml":
        config = replace(config, num_processes=count_gpus())
    return file, why, config


# ---- how a training is started


def command_for(words: list[str]) -> Start:
    """How to train with the options `words`. Raises BadInput when the config cannot be read."""
    file, why, config = read_launcher_config()
    environment = variables(file, config)
    n = str(config.num_processes)
    if config.needs_no_launcher:
        launcher = []
        how = "one process, settings of"
    # Not by accelerate launch, which starts one process on a CPU whatever the file says.
    elif config.distributed_type == "MULTI_CPU":
        if config.num_machines > 1:
            raise BadInput(
                f"{file}: MULTI_CPU on {config.num_machines} machines is not started from here; "
                "give torchrun --nnodes and --rdzv_endpoint on each of them (docs/machines.md)"
            )
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
        how = f"{n} CPU processes by torchrun, settings of"
    # Accelerate reads the file itself, and so needs no variables.
    else:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        launcher += ["--num_processes", n]
        environment = {}
        how = "accelerate launch --config_file"
    command = [sys.executable, *launcher, "-m", "cifar_accel", *words]
    return Start(command, environment, f"launch: {how} {file} ({why})")


def variables(file: Path, config: LauncherConfig) -> dict[str, str]:
    """What a config file sets for processes that accelerate launch does not start, as variables.

    Those that the caller has set already win, and are left out.
    """
    # In a file of ours `use_cpu` says what hardware was found: --device may still choose another.
    is_ours = shipped_folder("accelerate_configs") in file.parents
    wanted = {
        "ACCELERATE_MIXED_PRECISION": config.mixed_precision,
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": config.gradient_accumulation_steps,
        "ACCELERATE_USE_CPU": None if is_ours else config.use_cpu,
        "CUDA_VISIBLE_DEVICES": None if config.gpu_ids in ("all", "") else config.gpu_ids,
    }
    return {n: str(v) for n, v in wanted.items() if v is not None and n not in os.environ}


# ---- what is asked before a start


def dry_environment() -> dict[str, str]:
    """What --dry-run, which is one process, must know of those that a start would have."""
    file, _, config = read_launcher_config()
    # The type NO is one process, whatever number stands beside it.
    processes = 1 if config.distributed_type == "NO" else config.num_processes
    known = variables(file, config)
    known["CIFAR_ACCEL_PROCESSES"] = str(processes)
    known["LOCAL_WORLD_SIZE"] = str(max(1, processes // config.num_machines))
    if config.distributed_type in SHARDING:
        known[f"ACCELERATE_USE_{config.distributed_type}"] = "true"
    return known


def check_launcher() -> None:
    """Raise BadInput for what a start on this machine would stumble over.

    That is a config file that cannot be read, an address or a port in it that is none, and a port
    that is taken although other machines were told to come there.
    """
    file, _, config = read_launcher_config()
    # On one machine accelerate launch takes another port where this one is taken, and torchrun
    # any free one. Of several machines the first one opens it. Below a launcher it is open already.
    is_first_of_several = config.num_machines > 1 and config.machine_rank == 0
    if is_first_of_several and not config.needs_no_launcher and "RANK" not in os.environ:
        name = f"{file}: main_process_port"
        check_port(config.main_process_port, name, "name another one there, on every machine")
