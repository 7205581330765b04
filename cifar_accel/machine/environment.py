"""What a launcher tells each process of a run, in variables. Loads no torch."""

import os
import socket

from cifar_accel.errors import BadInput

# What every launcher of several processes sets.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
# What torch and Accelerate read as numbers.
NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", ACCUMULATION)
# Plugins that cut one model over several devices. Accelerate sets ACCELERATE_USE_<PLUGIN>.
SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def prepare_libraries() -> None:
    """Set what torch and OpenMP read while they are loaded, unless the user has set it."""
    # What a Mac's GPU lacks is computed on its processor; torch says so once for each operation.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    # GNU's OpenMP lets threads spin 300,000 rounds for each other, which on a busy processor makes
    # a small model several times slower (benchmarks/LOG.md); on an idle one this is as good.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def is_set(variable: str) -> bool:
    """Whether an environment variable says yes, in any of the ways that Accelerate takes."""
    return os.environ.get(variable, "").lower() in ("y", "yes", "t", "true", "on", "1")


def mixed_precision() -> str:
    """The launcher's precision: no (fp32), bf16 or fp16."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def whole_number(variable: str, default: int = 1) -> int:
    """The whole number in an environment variable. Raises BadInput where there is none in it."""
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise BadInput(
            f"{variable}={text}: a launcher puts a whole number there; unset it, or set one"
        ) from None


def check_port(port: int, named_by: str, remedy: str) -> None:
    """Raise BadInput where this process cannot open `port`, for the others to come to."""
    with socket.socket() as listener:
        # As torch opens it: a connection that has just ended is no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{named_by} {port}: {reason}; {remedy}") from error
