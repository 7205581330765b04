"""YAML files: those that come with the package, and how any of them is read."""

from pathlib import Path
from typing import Any

import yaml

from cifar_accel.errors import BadInput


def shipped_folder(name: str) -> Path:
    """The folder `accelerate_configs` or `studies` that comes with the package.

    An installed wheel has it inside the package; in a checkout it lies beside the package.
    """
    package = Path(__file__).parent.parent
    inside = package / name
    if inside.is_dir():
        return inside
    return package.parent / name


def read_yaml(file: Path, complaint: str) -> Any:
    """The content of a YAML file.

    Raises BadInput where the file cannot be opened, and with `complaint` where it is no YAML.
    """
    try:
        return yaml.safe_load(file.read_text())
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}") from error
    # A ValueError is of text that is not UTF-8, or of a date that is none; a RecursionError of
    # thousands of open brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        one_line = " ".join(str(error).split())
        raise BadInput(f"{file}: {complaint} ({one_line})") from error
