"""What is checked before the processes of a run meet."""

import os
import socket

import pytest
import torch

from cifar_accel.cli import train_command
from cifar_accel.errors import BadInput, PeerLost
from cifar_accel.machine import processes
from cifar_accel.machine.environment import NUMBERS, SHARDING, is_set
from cifar_accel.machine.processes import check_device, join_processes, peers_expected

# What a launcher of two processes on one host sets for the first of them.
FIRST_OF_TWO = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched(monkeypatch):
    """Set variables as a launcher does, with changes."""

    def set_variables(**changes):
        for name, value in (FIRST_OF_TWO | changes).items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("value", ["", "abc", "1.5"])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_variable_that_is_no_number_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=f"^{name}={value}: a launcher puts a whole number"):
        join_processes("cpu")


def test_the_number_of_workers_is_not_guessed_from_words(in_process, monkeypatch, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "abc")
    code, _, err = in_process(train_command, *words("--pipeline", "timm"))
    assert code == 2 and err.startswith("cifar_accel: LOCAL_WORLD_SIZE=abc: ")


def test_a_taken_port_is_named(launched):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        launched(MASTER_PORT=str(port))
        with pytest.raises(BadInput, match=f"^MASTER_PORT {port}: Address already in use"):
            join_processes("cpu")


def test_a_port_that_is_none_is_named(launched):
    launched(MASTER_PORT="99999")
    with pytest.raises(BadInput, match="^MASTER_PORT 99999: "):
        join_processes("cpu")


def test_a_first_host_that_nobody_knows_is_named(launched):
    launched(RANK="1", MASTER_ADDR="no-such-host.invalid")
    with pytest.raises(BadInput, match=r"^MASTER_ADDR no-such-host\.invalid: "):
        join_processes("cpu")


def test_several_hosts_are_reached_by_the_interface_that_leads_there(launched, monkeypatch):
    # What the function sets is taken back after the test.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    launched(RANK="1")
    processes.find_first_host(several=False)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    processes.find_first_host(several=True)
    loopback = os.environ["GLOO_SOCKET_IFNAME"]
    assert loopback in [name for _, name in socket.if_nameindex()]

    # The caller's own choice stays.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    processes.find_first_host(several=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"


def test_a_dead_host_is_told_within_two_minutes():
    """The tests of it wait for less."""
    assert processes.SHORT_WAIT * processes.DEVICES_WAIT < 120


@pytest.mark.parametrize("yes", ["yes", "on", "TRUE", "1", "t", "y"])
@pytest.mark.parametrize("plugin", SHARDING)
def test_plugins_are_refused_however_yes_is_said(monkeypatch, plugin, yes):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", yes)
    with pytest.raises(BadInput, match=plugin):
        check_device("cpu", "no")


def test_yes_and_no_are_accelerates():
    from accelerate.utils import str_to_bool

    for word in "y yes t true on 1 n no f false off 0 Yes OFF".split():
        os.environ["CIFAR_ACCEL_TEST"] = word
        assert is_set("CIFAR_ACCEL_TEST") == bool(str_to_bool(word))
    del os.environ["CIFAR_ACCEL_TEST"]


@pytest.mark.parametrize("named", ["cuda", "cuda:1", "meta", "abc", ""])
def test_accelerates_own_device_must_be_the_runs(monkeypatch, named):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", named)
    with pytest.raises(BadInput, match=f"^ACCELERATE_TORCH_DEVICE={named}: this run is on cpu"):
        check_device("cpu", "no")
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    check_device("cpu", "no")


def test_what_torch_says_of_a_lost_process_is_told_in_a_line():
    def told(error):
        # Votes are within a step.
        with pytest.raises(RuntimeError) as caught, peers_expected(), peers_expected():
            raise error
        return caught.value

    text = (
        "[/src/third_party/gloo/gloo/transport/tcp/pair.cc:5] Read error [127.0.0.1]:45958: "
        "Connection reset by peer. This is typically caused by something."
    )
    reason = "(Read error [127.0.0.1]:45958: Connection reset by peer)"
    lost = told(RuntimeError(text))
    assert isinstance(lost, PeerLost)
    assert str(lost).startswith(f"another process of this run is gone {reason}; ")
    assert isinstance(told(torch.distributed.DistNetworkError("x")), PeerLost)
    # A fault of the code stays one.
    fault = RuntimeError("The size of tensor a (3) must match")
    assert told(fault) is fault
