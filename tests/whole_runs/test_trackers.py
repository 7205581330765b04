"""Trackers that refuse, die or fall silent cost their figures alone."""

import contextlib
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
from conftest import rows, steps, summary, wait_for

KEY = "0123456789" * 4


class Refuses(BaseHTTPRequestHandler):
    """A server that knows no key."""

    def do_POST(self):
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"error": "user is not logged in"}')

    do_GET = do_POST

    def log_message(self, *args):
        """Say nothing on stderr."""


def train_online(trainer, server: str):
    """Train with a wandb server that is of no use; the finished process."""
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_BASE_URL": server}
    began = time.monotonic()
    done = trainer(env=environment)
    assert time.monotonic() - began < 90
    assert len(rows(done.run)) == 13
    assert summary(done.run)["status"] == "finished"
    return done


def test_wandb_with_a_wrong_key(trainer):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = train_online(trainer, f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert "wandb: offline" in done.stdout
    assert list((done.run / "wandb").glob("offline-run-*"))

    # The key is nowhere.
    assert KEY not in done.stdout
    assert KEY not in done.stderr
    files = [file for file in done.run.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


def test_wandb_without_a_network(trainer):
    done = train_online(trainer, "http://127.0.0.1:9")
    assert "wandb: offline, no run on the server (Failed" in done.stdout


@pytest.mark.parametrize("hangs_up", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_wandb_whose_server_says_nothing(trainer, hangs_up):
    """It takes the connection and never answers, or ends it at once."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def take_connections():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    if hangs_up:
                        connection.close()
                    connections.append(connection)

        threading.Thread(target=take_connections, daemon=True).start()
        done = train_online(trainer, f"http://127.0.0.1:{server.getsockname()[1]}")
    assert connections
    assert "wandb: offline, no run on the server" in done.stdout
    assert list((done.run / "wandb").glob("offline-run-*"))


def train_and_disturb_wandb(trainer, tmp_path, epochs, disturb):
    """Train; once the first row is there, `disturb` wandb's own process."""
    run = tmp_path / "ck" / "a"
    with open(tmp_path / "log", "w") as log:
        command = trainer.command("--epochs", str(epochs), "--run-name", "a")
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        wait_for((run / "metrics.jsonl").exists)
        children = psutil.Process(process.pid).children(recursive=True)
        service = [child for child in children if "wandb" in child.name()]
        assert service, "wandb has a process of its own"
        for child in service:
            disturb(child)
        assert process.wait(120) == 0

    # Nothing is missing, and nothing is there twice.
    assert summary(run)["status"] == "finished"
    last_step = 8 * epochs
    every_third = range(3, last_step, 3)
    every_epoch = range(8, last_step + 1, 8)
    assert steps(run) == sorted({*every_third, *every_epoch})

    # And nobody is left behind.
    for child in service:
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_wandb_killed_in_mid_run(trainer, tmp_path):
    train_and_disturb_wandb(trainer, tmp_path, 30, psutil.Process.kill)


@pytest.mark.faults
def test_wandb_that_no_longer_answers(trainer, tmp_path):
    """Its service is stopped, not killed: it takes no row and no goodbye."""
    train_and_disturb_wandb(trainer, tmp_path, 6, psutil.Process.suspend)
    assert "wandb does not answer and is given up" in (tmp_path / "log").read_text()
