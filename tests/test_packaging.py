"""What `pip install` of the checkout brings, in a folder elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("cifar_accel", "accelerate_configs", "studies")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A wheel that was built from a copy of the project and unpacked."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    # By the backend itself: pip would fetch one from the network.
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    site = tmp_path_factory.mktemp("site")
    (wheel,) = copy.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def files_below(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob(pattern)}


def test_a_wheel_has_every_module(installed):
    package = ROOT / "cifar_accel"
    assert files_below(installed / "cifar_accel", "*.py") == files_below(package, "*.py")
    assert (installed / "cifar_accel" / "py.typed").exists()
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        "cifar_accel"
    }


@pytest.mark.parametrize("folder", ["accelerate_configs", "studies"])
def test_a_wheel_has_the_yaml_files(installed, folder):
    shipped = files_below(installed / "cifar_accel" / folder, "*.yaml")
    assert shipped == files_below(ROOT / folder, "*.yaml")
    assert shipped


def test_an_installed_package_finds_them(installed, tmp_path):
    """On a machine with two GPUs, says its nvidia-smi."""
    code = """
from cifar_accel.launch.command import command_for
from cifar_accel.yaml_files import shipped_folder
print(shipped_folder("studies") / "tour.yaml")
print(*command_for([]).command[4:])
"""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: one'\necho 'GPU 1: two'\n")
    program.chmod(0o755)
    # In the place of the checkout, which the tests run from.
    env = os.environ | {"PYTHONPATH": str(installed), "HF_HOME": str(tmp_path)}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        str(installed / "cifar_accel" / "studies" / "tour.yaml"),
        f"{installed}/cifar_accel/accelerate_configs/multi_gpu.yaml --num_processes 2 "
        "-m cifar_accel",
    ]
