"""What pyproject.toml cannot say: found packages, together with two folders that lie elsewhere."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cifar_accel*"]),
        "cifar_accel.accelerate_configs",
        "cifar_accel.studies",
    ]
)
