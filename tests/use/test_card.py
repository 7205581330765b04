import json
import re

import pytest
import yaml

from cifar_accel.files import read_json
from cifar_accel.records.summary import read_summary
from cifar_accel.results.statistics import wilson
from cifar_accel.use.card import model_card

DIGITS = [str(digit) for digit in range(10)]


def card_of(run, **options) -> str:
    """The card of a run, with other options than it had."""
    config = read_json(run / "config.json")
    config["options"] |= options
    model = read_json(run / "model" / "config.json")
    return model_card(model, DIGITS, config, read_summary(run))


def metadata(card: str) -> dict:
    """The card's YAML, read back."""
    return yaml.safe_load(card.split("---\n")[1])


def test_a_finished_run_leaves_its_card(run):
    card = (run / "model" / "README.md").read_text()
    assert card == card_of(run)
    accuracy = read_summary(run)["accuracy"]
    low, high = wilson(round(accuracy * 100), 100)
    assert f"**{accuracy:.2%}** [{low:.2%} to {high:.2%}]" in card
    assert "100 test images, every one once" in card
    assert "seed 3407" in card
    assert "256 training images, in fp32; recipe digits, epochs 1, batch_size 32" in card
    assert "## Limits" in card
    assert max(map(len, card.split("\n## Training")[0].splitlines())) <= 110

    # As the hub reads it.
    (result,) = metadata(card)["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    assert result["metrics"][0]["value"] == pytest.approx(accuracy, abs=1e-4)
    assert metadata(card)["library_name"] == "timm"


def test_a_card_tells_no_folders(run):
    """Where things lie on the machine of the one who trained is nobody's business."""
    where = read_json(run / "config.json")["options"]["save_dir"]
    assert where not in (run / "model" / "README.md").read_text()
    card = card_of(
        run, dataset="/home/ann/photos", model="local-dir:/home/ann/net", pretrained=True
    )
    assert "/home/ann" not in card
    assert "# test_nfnet on photos" in card
    assert "Began with the weights in `net`" in card


def test_a_command_is_told_without_its_folders(run):
    """Those of a study have = in their names."""
    config = read_json(run / "config.json")
    config["command"] += ["--checkpoint=/home/ann/vit/adamw-learning_rate=0.0001"]
    config["command"] += ["--plan-of", "/home/ann=b/x", "--resume=/home/a=b/ann"]
    card = model_card(read_json(run / "model" / "config.json"), DIGITS, config, read_summary(run))
    assert "--checkpoint=.../adamw-learning_rate=0.0001" in card
    assert "--plan-of .../x --resume=.../ann" in card
    assert "/home" not in card


def test_the_hubs_data_sets_have_their_name_there(run):
    assert metadata(card_of(run, dataset="cifar100"))["datasets"] == ["uoft-cs/cifar100"]
    assert metadata(card_of(run, dataset="ann/cats"))["datasets"] == ["ann/cats"]
    assert "datasets" not in metadata(card_of(run))


def test_a_model_of_which_nothing_is_known_has_a_card_too(run):
    card = model_card(read_json(run / "model" / "config.json"), DIGITS)
    assert "Nothing is recorded of its training" in card
    assert "model-index" not in metadata(card)


def test_names_are_no_markup(run):
    names = ["```\n# a", "<b>", "|", "\x1b[31m", *"456789"]
    config = read_json(run / "model" / "config.json")
    card = model_card(config, names, read_json(run / "config.json"), read_summary(run))
    block = re.search(r"```json\n(.*?)\n```\n", card, re.DOTALL)
    assert json.loads(block[1]) == names
    hostile = card_of(run, dataset="/x/`**<script>| [a](b)", model="local-dir:/x/`<i>")
    assert "<script>" not in hostile
    assert "](b)" not in hostile
