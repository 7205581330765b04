import subprocess
import sys

import numpy as np
import torch

from cifar_accel.instruments import peak_flops, peak_memory_mib


def test_peak_memory_is_the_processs_own():
    """Not what its parent held when it was started, which getrusage counts too."""
    held = np.ones(2**27, np.uint8)  # 128 MiB
    ours = peak_memory_mib(torch.device("cpu"))
    code = "import torch; from cifar_accel.instruments import peak_memory_mib as p; print(p(torch.device('cpu')))"
    small = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert held.all() and small < ours - 100
    more = np.ones(2**27, np.uint8)
    assert more.all() and peak_memory_mib(torch.device("cpu")) > ours + 100


def test_no_peak_is_claimed_where_none_is_known():
    assert peak_flops(torch.device("cpu"), "bf16") is None
