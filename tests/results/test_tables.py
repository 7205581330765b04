import json

from made_runs import make_run

from cifar_accel.results.runs import find_runs
from cifar_accel.results.tables import Table, default_table, markdown, settings_table


def test_seeds_are_averaged(tmp_path):
    make_run(tmp_path / "a", {"accuracy": 0.5, "train_loss": 1.0}, seed=1)
    make_run(tmp_path / "b", {"accuracy": 0.7, "train_loss": 2.0}, seed=2)
    rows = default_table(find_runs(tmp_path)).rows
    figures = ["1.5000 ± 0.7071 (n=2)", "60.00 ± 14.14 (n=2)", "1.6041, 74.23"]
    assert rows == [["NFNet-F0", "digits", *figures]]


def test_a_row_says_what_makes_it_differ(tmp_path):
    make_run(tmp_path / "a", smoothing=0.1)
    make_run(tmp_path / "b", smoothing=0.2, micro_batch_size=8)
    rows = default_table(find_runs(tmp_path)).rows
    assert [row[0] for row in rows] == ["NFNet-F0 (smoothing 0.1)", "NFNet-F0 (smoothing 0.2)"]


def test_seeds_of_other_images_precision_or_length_are_no_repetition(tmp_path):
    make_run(tmp_path / "a", seed=1, data_fingerprint="abc")
    make_run(tmp_path / "b", seed=2, data_fingerprint="def")
    make_run(tmp_path / "c", seed=3, data_fingerprint="abc", mixed_precision="bf16")
    make_run(tmp_path / "d", {"steps": 4}, seed=4, data_fingerprint="abc")
    run = make_run(tmp_path / "e", seed=5, data_fingerprint="abc")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"weights": {"checkpoint": ["123"]}}))
    rows = settings_table(find_runs(tmp_path)).rows
    assert len(rows) == 5
    assert not any("n=" in cell for row in rows for cell in row)
    assert "mixed_precision bf16" in rows[2][0]


def test_a_row_says_what_it_leaves_out(tmp_path):
    make_run(tmp_path / "a", {"steps": 1500, "total_steps": 16_000}, limit_train=2000)
    rows = settings_table(find_runs(tmp_path)).rows
    assert rows[0][0] == "NFNet-F0 (limit_train 2,000, 1,500 of 16,000 steps)"


def test_other_settings_have_rows_and_published_figures_of_their_own(tmp_path):
    make_run(tmp_path / "a", {"train_loss": None}, model="local-dir:some/deit_tiny/")
    make_run(tmp_path / "b", model="vit", scheduler="constant")
    make_run(tmp_path / "c", optimizer="sgdm", dataset="some/where")
    runs = find_runs(tmp_path)
    assert [row[0] for row in default_table(runs).rows] == ["deit_tiny"]
    assert settings_table(runs).rows == [
        ["deit_tiny", "digits", "adamw, cosine", "–", "50.00", "1.7612, 73.17"],
        ["ViT-B/8", "digits", "adamw, constant", "2.0000", "50.00", "–"],
        ["NFNet-F0", "where", "sgdm, cosine", "2.0000", "50.00", "2.4778, 58.47"],
    ]


def test_markdown_is_aligned_and_a_bar_is_no_column():
    table = Table("t", ["model", "n"], [["a|b", "1"], ["c", "1,000"]])
    assert markdown(table).splitlines() == [
        "| model | n     |",
        "|-------|-------|",
        "| a\\|b  | 1     |",
        "| c     | 1,000 |",
    ]
