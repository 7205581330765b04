import re
from pathlib import Path

import pytest

from cifar_accel.cli import main
from cifar_accel.launch.study_file import read_study
from cifar_accel.launch.study_runs import plan_runs
from cifar_accel.yaml_files import shipped_folder


def test_the_shipped_studies():
    report = read_study(str(shipped_folder("studies") / "report.yaml"))
    assert report.name == "report"
    names = ("run_name", "model", "optimizer", "scheduler")
    assert [tuple(options[name] for name in names) for options in report.runs] == [
        ("convnet/adamw", "nfnet", "adamw", "cosine"),
        ("convnet/sgdm", "nfnet", "sgdm", "cosine"),
        ("convnet/linear_decay", "nfnet", "adamw", "linear_decay"),
        ("vit/adamw", "vit", "adamw", "cosine"),
    ]
    sweep = shipped_folder("studies") / "sweep.yaml"
    assert len(plan_runs(str(sweep), read_study(str(sweep)), [])) == 18
    tour = read_study(str(shipped_folder("studies") / "tour.yaml"))
    assert len(tour.runs) == 4


def test_a_sweep_file_is_a_grid(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("""
program: cifar_accel
method: grid
parameters: {seed: {values: [1, 2]}, optimizer: {values: [adamw, sgdm]}, model_ema: {value: true}}
""")
    runs = read_study(str(file)).runs
    points = [(options["seed"], options["optimizer"]) for options in runs]
    assert points == [(1, "adamw"), (1, "sgdm"), (2, "adamw"), (2, "sgdm")]
    assert runs[0] == {"group": "sweep", "seed": 1, "optimizer": "adamw", "model_ema": True}


# Three options of a thousand values each.
A_BILLION_RUNS = "parameters:" + "".join(
    f"\n  {name}: {{values: {list(range(1, 1001))}}}" for name in ("seed", "epochs", "batch_size")
)

# Each line repeats the one above it ten times.
A_BILLION_WORDS = "a0: &a0 [x]" + "".join(
    f"\na{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)
)
A_BILLION_MERGES = "a0: &a0 {x: y}" + "".join(
    f"\na{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)
)


def test_aliases_and_merges_are_read(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("parameters: {seed: &s {values: [1, 2]}, epochs: *s}")
    assert len(read_study(str(file)).runs) == 4
    file.write_text("runs: [&a {seed: 1, model: vit}, {<<: *a, seed: 2}]")
    models = [(options["model"], options["seed"]) for options in read_study(str(file)).runs]
    assert models == [("vit", 1), ("vit", 2)]


UNSERVED = """
method: random
run_cap: 3
early_terminate: {type: hyperband}
parameters:
  learning_rate: {distribution: uniform, min: 0.1, max: 0.2}
  momentum: {parameters: {a: {value: 1}}}
  optimizer: {distribution: categorical, values: [adamw]}
"""
NAMED = (
    "method random, early_terminate, run_cap, distribution of learning_rate, min of learning_rate, "
    "max of learning_rate, parameters of momentum: needs wandb's agent"
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: [", "is not YAML"),
        ("name: 2001-99-99", "is not YAML"),
        ("name: x", "needs `parameters`"),
        ("runs: [{modell: vit}]", "there is no option modell; did you mean model"),
        ("runs: 3", "`runs` a list of tables"),
        ("parameters: [a]", "`parameters` must be a table"),
        ("parameters: {seed: {values: 3}}", "a list `values`"),
        ("parameters: {seed: 3}", "needs `value` or a list `values`"),
        ("", "needs `parameters`"),
        ("method: bayes\nparameters: {seed: {value: 3}}", "method bayes: needs wandb's agent"),
        (UNSERVED, NAMED),
        ("parameter: {seed: {value: 1}}\nruns: [{seed: 1}]", "no key parameter; did you mean"),
        ("parameters: {modell: {value: vit}}", "there is no option modell; did you mean model"),
        ("seeds: 2\nruns: [{seed: 1}]", "`seeds` and an option seed"),
        ("seeds: 2\nparameters: {seed: {value: 1}}", "`seeds` and an option seed"),
        ("seeds: 0\nruns: [{epochs: 1}]", "seeds 0: must be a number from 1 to 10,000"),
        ("seeds: true\nruns: [{epochs: 1}]", "seeds True: must be a number"),
        ("seeds: 9999999999999\nruns: [{epochs: 1}]", "must be a number from 1 to 10,000"),
        ("seeds: 6000\nruns: [{epochs: 1}, {epochs: 2}]", "more than 10,000 runs"),
        ("baseline: sgd\nruns: [{run_name: a/adamw}]", "no run has that in its name, as a/adamw"),
        (
            "baseline: adamw\nruns: [{epochs: 1}, {epochs: 2}]",
            "2 settings have that in their names",
        ),
        ("baseline: [a]\nruns: [{run_name: a}]", "must be a part of a run's name"),
        ("runs: [{seed: 1, run_name: a}, {seed: 1, run_name: a}]", "two runs are the same"),
        ("runs: [{epochs: 0}]", "--epochs 0"),
        ("runs: [{dry_run: true}]", "--dry-run looks at one run"),
        ("parameters: {seed: {values: []}}", "a list `values` that is not empty"),
        (A_BILLION_RUNS, "more than 10,000 runs"),
        (A_BILLION_WORDS, "more than 1,000,000 characters, its aliases written out"),
        (A_BILLION_MERGES, "more than 1,000,000 characters, its aliases written out"),
        ("runs: [{seed: 1}]\nruns: [{seed: 2}]", "a key stands twice in a table"),
        ("runs: &a [*a]", "more than 1,000,000 characters, its aliases written out"),
    ],
)
def test_a_bad_study_starts_nothing(in_process, tmp_path, text, message):
    (tmp_path / "study.yaml").write_text(text)
    code, _, err = in_process(main, "study", tmp_path / "study.yaml")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def make_latin_1(file: Path):
    file.write_bytes("name: Gr\u00f6\u00dfe\nruns: [{seed: 1}]".encode("latin-1"))


@pytest.mark.parametrize(
    "make, message",
    [
        (Path.mkdir, "Is a directory"),
        (lambda file: None, "No such file"),
        (make_latin_1, "'utf-8' codec can't decode byte 0xf6"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(in_process, tmp_path, make, message):
    file = tmp_path / "study.yaml"
    make(file)
    code, out, err = in_process(main, "study", file)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{file}: " in err and message in err


def test_seeds_are_the_last_option_of_the_grid(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("seeds: 2\nruns: [{model: vit}, {model: nfnet}]\nbaseline: vit")
    study = read_study(str(file))
    points = [(options["model"], options["seed"]) for options in study.runs]
    assert points == [("vit", 1), ("vit", 2), ("nfnet", 1), ("nfnet", 2)]
    assert study.baseline == "vit"
    # It stands for the parameter, to the word.
    written_out = tmp_path / "study-2.yaml"
    written_out.write_text(
        "name: study\nruns: [{model: vit}, {model: nfnet}]\nparameters: {seed: {values: [1, 2]}}"
    )
    assert read_study(str(written_out)).runs == study.runs


def test_the_studies_of_the_page_are_studies(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    counts = []
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        file = tmp_path / "study.yaml"
        file.write_text(block)
        counts.append(len(plan_runs(str(file), read_study(str(file)), [])))
    assert counts == [6, 2, 30]
