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
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, IPvAnyAddress, ValidationError

from cifar_accel.console import say
from cifar_accel.errors import BadInput
from cifar_accel.files import adapter
from cifar_accel.launch.yaml_files import read_yaml, shipped_folder
from cifar_accel.machine.environment import SHARDING, check_port
from cifar_accel.options.options import NotNegativeInt, PositiveInt

# The port at which accelerate launch lets processes meet where its config names none.
DEFAULT_PORT = 29500

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
    # 0 lets accelerate launch look for a free one.
    main_process_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    mixed_precision: str | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    use_cpu: bool | None = None
    # As in CUDA_VISIBLE_DEVICES. A single one may stand there without quotes.
    gpu_ids: Annotated[str, Field(coerce_numbers_to_str=True)] = "all"
    # Those of SECTIONS that are there and not empty.
    sections: tuple[str, ...] = ()

    @property
    def needs_no_launcher(self) -> bool:
        """Whether `python -m cifar_accel` with a few variables does all that the file asks for."""
        if self.sections:
            return False
        if self.distributed_type == "MULTI_GPU":
            return self.num_processes == 1 and self.num_machines == 1
        return self.distributed_type == "NO"


FIELDS = [field.name for field in fields(LauncherConfig)]


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
    own = _hub_home() / "accelerate" / "default_config.yaml"
    if own.is_file():
        return own, "your own accelerate config"

    gpus = count_gpus()
    plural = "" if gpus == 1 else "s"
    why = f"{gpus} GPU{plural} here, and no accelerate config of your own"
    name = ("cpu", "single_gpu", "multi_gpu")[min(gpus, 2)]
    return shipped_folder("accelerate_configs") / f"{name}.yaml", why


def _hub_home() -> Path:
    """The folder in which the Hugging Face libraries, Accelerate among them, keep their files."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    # Not by pathlib, which raises where a user without a name has no home.
    return Path(os.path.expanduser(os.environ.get("HF_HOME", f"{caches}/huggingface")))


def _shipped_multi_gpu() -> Path:
    """The file whose number of processes is that of the GPUs here, whatever it says itself."""
    return shipped_folder("accelerate_configs") / "multi_gpu.yaml"


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


def read_launcher_config(file: Path) -> LauncherConfig:
    """What an accelerate config file says.

    Raises BadInput where it cannot be read, or where a value cannot be what its key stands for.
    """
    content = read_yaml(file, "cannot be read as an accelerate config") or {}
    if not isinstance(content, dict):
        raise BadInput(
            f"{file}: is no accelerate config (it holds no keys); make one with accelerate config"
        )

    # A key without a value counts as left out. YAML reads an unquoted NO as false.
    values = {name: value for name, value in content.items() if value is not None}
    for name, no in (("distributed_type", "NO"), ("mixed_precision", "no")):
        if values.get(name) is False:
            values[name] = no
    values["sections"] = tuple(name for name in SECTIONS if values.get(name))

    # Keys that are no field of LauncherConfig are accelerate's alone.
    known = {name: values[name] for name in FIELDS if name in values}
    try:
        return adapter(LauncherConfig).validate_python(known)
    except ValidationError as error:
        first = error.errors()[0]
        bound = first["msg"].replace("Input should be", "must be")
        raise BadInput(f"{file}: {first['loc'][0]} {first['input']}: {bound}") from error


# ---- how a training is started


def command_for(words: list[str]) -> Start:
    """How to train with the options `words`. Raises BadInput when the config cannot be read."""
    file, why = config_file()
    config = read_launcher_config(file)
    training = ["-m", "cifar_accel", *words]

    if config.needs_no_launcher:
        reason = f"launch: one process, settings of {file} ({why})"
        return Start([sys.executable, *training], variables(file, config), reason)

    # Not by accelerate launch, which starts one process on a CPU whatever the file says.
    if config.distributed_type == "MULTI_CPU":
        n = config.num_processes
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
        reason = f"launch: {n} CPU processes by torchrun, settings of {file} ({why})"
        return Start([sys.executable, *torchrun, *training], variables(file, config), reason)

    # Accelerate reads the file itself, and so needs no variables.
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    if file == _shipped_multi_gpu():
        accelerate += ["--num_processes", str(count_gpus())]
    reason = f"launch: accelerate launch --config_file {file} ({why})"
    return Start([sys.executable, *accelerate, *training], {}, reason)


def variables(file: Path, config: LauncherConfig) -> dict[str, str]:
    """What a config file sets for processes that accelerate launch does not start, as variables.

    Those that the caller has set already win, and are left out.
    """
    found: dict[str, str] = {}
    if config.mixed_precision is not None:
        found["ACCELERATE_MIXED_PRECISION"] = config.mixed_precision
    if config.gradient_accumulation_steps is not None:
        steps = str(config.gradient_accumulation_steps)
        found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = steps
    # In a file of ours it only says what hardware was found: --device may still choose another.
    is_users = shipped_folder("accelerate_configs") not in file.parents
    if config.use_cpu is not None and is_users:
        found["ACCELERATE_USE_CPU"] = str(config.use_cpu)
    if config.gpu_ids not in ("all", ""):
        found["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    return {name: value for name, value in found.items() if name not in os.environ}


# ---- what --dry-run asks


def dry_environment() -> dict[str, str]:
    """What --dry-run, which is one process, must know of those that a start would have."""
    file, _ = config_file()
    config = read_launcher_config(file)
    known = variables(file, config)
    if config.distributed_type == "NO":
        known["CIFAR_ACCEL_PROCESSES"] = "1"
        return known

    processes = config.num_processes
    if file == _shipped_multi_gpu():
        processes = count_gpus()
    known["CIFAR_ACCEL_PROCESSES"] = str(processes)
    known["LOCAL_WORLD_SIZE"] = str(max(1, processes // config.num_machines))
    if config.distributed_type in SHARDING:
        known[f"ACCELERATE_USE_{config.distributed_type}"] = "true"
    return known


def launcher_line() -> tuple[str, bool]:
    """What --dry-run says about the launcher, and whether that deserves a look.

    Raises BadInput when the config cannot be read.
    """
    file, why = config_file()
    config = read_launcher_config(file)
    if config.distributed_type == "MULTI_CPU":
        n = config.num_processes
        line = (
            f"{file} says MULTI_CPU and {n} processes, but accelerate launch starts ONE with it; "
            f"./launch.sh starts {n}, and so does torchrun --standalone --nproc_per_node {n} "
            "-m cifar_accel"
        )
        return line, True
    return f"./launch.sh would take {file} ({why})", False


def check_launcher() -> None:
    """Raise BadInput for what a start on this machine would stumble over.

    That is a config file that cannot be read, an address or a port in it that is none, and a port
    that is taken although other machines were told to come there.
    """
    file, _ = config_file()
    config = read_launcher_config(file)
    # On one machine accelerate launch takes another port where this one is taken, and torchrun
    # any free one. Of several machines the first one opens it. Below a launcher it is open already.
    opens_a_known_port = config.num_machines > 1 and config.machine_rank == 0
    if config.needs_no_launcher or not opens_a_known_port or "RANK" in os.environ:
        return
    port = DEFAULT_PORT if config.main_process_port is None else config.main_process_port
    check_port(port, f"{file}: main_process_port", "name another one there, on every machine")
