import json

from made_runs import make_run

from cifar_accel.results.groups import group_by_seed
from cifar_accel.results.runs import find_runs
from cifar_accel.results.sections import sections_of
from cifar_accel.results.tables import Table, fitted, markdown, section_table


def tables(folder):
    return [section_table(section) for section in sections_of(group_by_seed(find_runs(folder)))]


def column(folder, name):
    return [row[table.head.index(name)] for table in tables(folder) for row in table.rows]


def test_seeds_are_averaged(tmp_path):
    """The half-width is t(0.975, 1) = 12.706 times 14.142 / sqrt(2)."""
    make_run(tmp_path / "a", {"accuracy": 0.5, "train_loss": 1.0}, seed=1)
    make_run(tmp_path / "b", {"accuracy": 0.7, "train_loss": 2.0}, seed=2)
    assert column(tmp_path, "acc. %") == ["60.00 ± 127.06 (n = 2)"]
    assert column(tmp_path, "loss") == ["1.5000"]


def test_the_best_is_first_and_marked(tmp_path):
    """The others say how surely they are below it."""
    accuracies = {"a": (0.50, 0.51, 0.52), "b": (0.60, 0.612, 0.621), "c": (0.59, 0.62, 0.612)}
    for erased, (name, values) in enumerate(accuracies.items()):
        for seed, accuracy in enumerate(values):
            make_run(
                tmp_path / f"{name}{seed}", {"accuracy": accuracy}, seed=seed, reprob=erased / 10
            )
    assert column(tmp_path, "setting") == ["reprob 0.1", "reprob 0.2", "reprob 0.0"]
    assert column(tmp_path, "stands") == ["best", "≈ best", "below?"]
    assert column(tmp_path, "to the best")[0] == "–"
    assert column(tmp_path, "to the best")[2].startswith("-10.10 [")


def test_a_row_says_what_makes_it_differ(tmp_path):
    make_run(tmp_path / "a", smoothing=0.1)
    make_run(tmp_path / "b", smoothing=0.2, micro_batch_size=8)
    assert column(tmp_path, "setting") == ["smoothing 0.1", "smoothing 0.2"]


def test_seeds_of_other_images_precision_or_length_are_no_repetition(tmp_path):
    make_run(tmp_path / "a", seed=1, data_fingerprint="abc")
    make_run(tmp_path / "b", seed=2, data_fingerprint="def")
    make_run(tmp_path / "c", seed=3, data_fingerprint="abc", mixed_precision="bf16")
    make_run(tmp_path / "d", {"steps": 4}, seed=4, data_fingerprint="abc")
    run = make_run(tmp_path / "e", seed=5, data_fingerprint="abc")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"weights": {"checkpoint": ["123"]}}))
    names = column(tmp_path, "setting")
    assert len(names) == 5
    assert all(cell.endswith("(n = 1)") for cell in column(tmp_path, "acc. %"))
    assert any("mixed_precision bf16" in name for name in names)
    assert any("4 of 16 steps" in name for name in names)


def test_published_figures_stand_beside_their_own_models_and_data_alone(tmp_path):
    make_run(tmp_path / "a", dataset="some/cifar100", model="nfnet")
    make_run(tmp_path / "b", dataset="some/cifar100", model="vit", scheduler="constant")
    (table,) = tables(tmp_path)
    assert table.head[-1] == "course report"
    assert [row[-1] for row in table.rows] == ["1.6041, 74.23", "–"]
    # Other data, or another model of the family.
    for folder, options in (("x", {}), ("y", {"dataset": "cifar100", "model": "deit_tiny"})):
        make_run(tmp_path / folder / "a", **options)
        assert "course report" not in tables(tmp_path / folder)[0].head


def test_markdown_is_aligned_and_a_bar_is_no_column():
    table = Table("t", ["model", "n"], [["a|b", "1"], ["c", "1,000"]])
    assert markdown(table).splitlines() == [
        "| model | n     |",
        "|-------|-------|",
        "| a\\|b  | 1     |",
        "| c     | 1,000 |",
    ]


def test_a_table_fits_a_terminal():
    """Its last columns go first, then the end of its first one."""
    row = ["a setting with a long name of fifty characters, so", "74.23", "best", "1.6041"]
    table = Table("t", ["setting", "acc.", "stands", "loss"], [row])
    assert fitted(table, 200) == table
    for columns in (40, 50, 60, 80):
        lines = markdown(fitted(table, columns)).splitlines()
        assert max(map(len, lines)) <= columns
        assert "74.23" in lines[2]
    assert fitted(table, 60).rows[0][0] == "a setting …ifty characters, so"
    assert fitted(table, 40).head == ["setting", "acc."]
