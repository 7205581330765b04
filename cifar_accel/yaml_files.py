"""YAML files: those that come with the package, and how any of them is read."""

from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from cifar_accel.errors import BadInput

# Most characters of a YAML file, counted as often as its aliases (`*name`) repeat them.
LONGEST = 1_000_000


def shipped_folder(name: str) -> Path:
    """The folder `accelerate_configs` or `studies` that comes with the package.

    An installed wheel has it inside the package; in a checkout it lies beside the package.
    """
    package = Path(__file__).parent
    inside = package / name
    if inside.is_dir():
        return inside
    return package.parent / name


def read_yaml(file: Path) -> Any:
    """The content of a YAML file. Raises BadInput where it cannot be opened, is long or no YAML."""
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root and is_too_long(root):
            raise BadInput(f"{file}: more than {LONGEST:,} characters, its aliases written out")
        return loader.construct_document(root) if root else None
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}") from error
    # A ValueError is of text that is not UTF-8, or of a date that is none; a RecursionError of
    # thousands of open brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        one_line = " ".join(str(error).split())
        raise BadInput(f"{file}: is not YAML ({one_line})") from error


def is_too_long(root: Any) -> bool:
    """Whether what is below a YAML node is longer than LONGEST, each alias written out."""
    todo = [root]
    size = 0
    for node in todo:
        size += 1 + len(node.value)
        if size > LONGEST:
            return True
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                raise yaml.YAMLError(f"a key stands twice in a table: {', '.join(keys)}"[:200])
            todo += chain.from_iterable(node.value)
    return False
