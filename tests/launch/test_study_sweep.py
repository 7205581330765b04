"""studies/sweep.yaml as an agent of wandb reads it: its own code starts the trainings, offline."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

from conftest import BIN
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args, load_sweep_config

from cifar_accel.launch.study_file import read_study
from cifar_accel.launch.study_runs import as_flags
from cifar_accel.options.parsing import parse_training
from cifar_accel.yaml_files import shipped_folder

FILE = str(shipped_folder("studies") / "sweep.yaml")

# Two agents of one sweep take the same options, as two of a random sweep may.
AGENTS = """
import json, sys
from wandb.wandb_agent import Agent

content, values = json.load(sys.stdin)
agents = {name: Agent(api=None, queue=None, sweep_id="sweep1") for name in ("run1", "run2")}
for name, agent in agents.items():
    agent._sweep_command = content["command"]
    command = {"run_id": name, "program": content["program"]}
    command["args"] = {option: {"value": value} for option, value in values.items()}
    agent._command_run(command)
sys.exit(any([agent._run_processes[name].wait() for name, agent in agents.items()]))
"""


def test_agents_of_a_sweep_train_in_folders_of_their_own(tmp_path, cache):
    content = load_sweep_config(FILE)
    chosen = {
        name: choice["values"][0] if "values" in choice else choice["value"]
        for name, choice in content["parameters"].items()
    }
    chosen |= {"limit_train": 64, "limit_test": 32, "epochs": 1, "data_dir": cache}
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "sweep1"}
    done = subprocess.run(
        [sys.executable, "-c", AGENTS],
        input=json.dumps([content, chosen]),
        capture_output=True,
        text=True,
        env=os.environ | environment,
        cwd=tmp_path,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for name in ("run1", "run2"):
        run = tmp_path / "checkpoint" / "sweep" / f"test_nfnet/adamw-cosine-s1-{name}"
        options = json.loads((run / "config.json").read_text())["options"]
        assert {option: options[option] for option in chosen} == chosen
        # In wandb it is the run that the agent was given.
        assert len(list(run.glob(f"wandb/offline-run-*-{name}"))) == 1


def test_a_sweep_and_a_study_train_the_same():
    """What an agent writes and what a study writes for one run are the same options."""
    study = read_study(FILE)
    assert len(study.runs) == 18
    more = {"warmup_epochs": None, "model_ema": True, "model": "vit", "clip_grad": 1, "aa": "none"}
    lists = {"scale": [0.5, 1.0], "model_kwargs": ["patch_size=8", "act_layer='gelu'"]}
    for run in (*study.runs, study.runs[0] | more, study.runs[0] | lists):
        values = {"args": {name: {"value": value} for name, value in run.items()}}
        by_agent = parse_training(create_sweep_command_args(values)["args"])[0]
        assert asdict(by_agent) == asdict(parse_training(list(as_flags(run)))[0])
