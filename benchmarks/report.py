"""The report: its seconds, memory and size, and how soon a browser shows it.

    python -m benchmarks.report [--runs 50] [--rows 10000] [--predictions]

Makes run folders of settings with five seeds each, of made-up figures, reports them in a process of
its own, and opens the page in headless Chromium, if there is one.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np

from cifar_accel.options.options import TrainingArguments
from cifar_accel.records.predictions import of_outputs, write_predictions

SEEDS = 5
CLASSES = [f"class {c}" for c in range(100)]
IMAGES = 10_000
# Tells a server when verdict and first chart can be seen, in ms since the page was opened.
PROBE = """<script>
const verdict = performance.now();
const wait = setInterval(() => {
  if (!document.querySelector(".chart svg")) return;
  clearInterval(wait);
  const chart = performance.now();
  fetch(`http://127.0.0.1:PORT/${Math.round(verdict)}/${Math.round(chart)}`, {mode: "no-cors"});
}, 5);
</script>"""


def make_run(folder: Path, number: int, rows: int, predictions: bool) -> None:
    """A finished run; every fifth is of another setting."""
    setting, seed = divmod(number, SEEDS)
    rng = np.random.default_rng(number)
    accuracy = 0.7 + 0.01 * (setting % 10) + 0.003 * rng.normal()
    folder.mkdir(parents=True)
    facts = {"classes": 100, "mixed_precision": "no", "run_name": folder.name, "seed": seed}
    facts |= {"input_mean": [0.5] * 3, "input_std": [0.5] * 3, "reprob": setting / 1000}
    config = {"options": asdict(TrainingArguments()) | facts, "provenance": {}, "command": ["x"]}
    (folder / "config.json").write_text(json.dumps(config))
    end = {"status": "finished", "steps": rows, "total_steps": rows, "train_loss": 1.0}
    end |= {"accuracy": accuracy, "top5_accuracy": 0.9, "wall_s": 600, "images_per_s": 1000}
    (folder / "summary.json").write_text(json.dumps(end | {"evaluated_images": IMAGES}))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, rows + 1):
            row = {"step": step, "epoch": 10 * step / rows, "train/loss": 5 - 4 * step / rows}
            row |= {"train/lr": 1e-3, "train/images_per_s": 1000.0, "eval/loss": 1.0}
            row |= {"eval/accuracy": accuracy * step / rows, "train/accuracy": 0.5}
            file.write(json.dumps(row) + "\n")
    if predictions:
        logits = rng.normal(size=(IMAGES, 100)).astype(np.float16)
        labels = np.arange(IMAGES) % 100
        logits[np.arange(IMAGES), labels] += 4
        first = np.argsort(-logits, axis=1)[:, :5].astype(np.int32)
        outputs = {"first_five": first, "logits": logits}
        said = of_outputs(labels, CLASSES, outputs, "made up", np.arange(IMAGES))
        write_predictions(folder, {"test": said})


class Listener(HTTPServer):
    """Hears one request of a page."""

    timeout = 60
    heard = ""


class Handler(BaseHTTPRequestHandler):
    """Keeps the path that was asked for."""

    def do_GET(self) -> None:
        """Answer with nothing."""
        assert isinstance(self.server, Listener)
        self.server.heard = self.path
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


def opened(page: Path) -> str:
    """When a browser shows verdict and first chart of a page, in ms; or why that is not known."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return "no browser"
    with Listener(("127.0.0.1", 0), Handler) as listener, tempfile.TemporaryDirectory() as profile:
        probe = page.with_name("probe.html")
        script = PROBE.replace("PORT", str(listener.server_port))
        # Behind the text, as the page's own scripts are.
        probe.write_text(page.read_text().replace("</main>", "</main>" + script, 1))
        flags = f"--headless --no-sandbox --disable-gpu --user-data-dir={profile} --no-first-run"
        with subprocess.Popen(
            [browser, *flags.split(), probe.as_uri()], stderr=subprocess.DEVNULL
        ) as shown:
            listener.handle_request()
            shown.kill()
    return listener.heard or "nothing within a minute"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--predictions", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for number in range(chosen.runs):
            make_run(Path(root) / f"run-{number:03}", number, chosen.rows, chosen.predictions)
        began = time.perf_counter()
        command = [sys.executable, "-m", "cifar_accel.cli", "report", root]
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        page = Path(root) / "report.html"
        size = page.stat().st_size / 1e6
        print(f"{chosen.runs} runs of {chosen.rows:,} rows: {seconds:.1f} s, {peak:,.0f} MiB")
        print(f"page: {size:.2f} MB; /verdict/first chart, ms: {opened(page)}")
