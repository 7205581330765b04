"""The run on paper: how batches are cut, and what is due after each step."""

from dataclasses import replace

import pytest

from cifar_accel.errors import BadInput
from cifar_accel.options.recipes import recipe_defaults
from cifar_accel.plan import make_plan, micro_batch_sizes


def plan(samples=256, world=1, accumulation=1, **options):
    """A plan of 8 steps an epoch and 3 epochs, unless the options say otherwise."""
    options = dict(batch_size=32, epochs=3, warmup_epochs=1.0, log_every=3) | options
    args = replace(recipe_defaults("digits"), **options)
    return make_plan(args, samples, world, accumulation=accumulation)


def due(rule):
    """The steps from 0 to 24 after which `rule` holds."""
    return [step for step in range(25) if rule(step)]


def test_steps():
    made = plan()
    assert made.steps_per_epoch == 8
    assert made.total_steps == made.stop_step == 24
    assert made.warmup_steps == 8
    assert plan(max_steps=10).stop_step == 10
    assert plan(max_steps=100).stop_step == 24


def test_what_is_due_after_each_step():
    made = plan(max_steps=22, save_epochs=2)
    assert due(made.evaluation_after) == [0, 8, 16, 22, 24]
    assert due(made.row_after) == [0, 3, 6, 8, 9, 12, 15, 16, 18, 21, 22, 24]
    assert [made.weights_after(step) for step in (8, 16, 22)] == [None, "model-epoch-0002", None]
    assert plan(save_epochs=-1).weights_after(24) is None


def test_sizes_are_a_function_of_the_step():
    made = plan(image_size="16:0.4,24:0.7,32")
    assert [made.image_size(step) for step in range(24)] == [16] * 10 + [24] * 7 + [32] * 7
    # A row is of images of one size.
    assert {10, 17} < set(due(made.row_after))
    assert {10, 17}.isdisjoint(due(plan().row_after))
    assert {plan(image_size=48).image_size(step) for step in range(24)} == {48}


def test_a_size_without_a_step_is_told():
    assert plan(image_size="16:0.4,24:0.7,32").sizes_left_out() == ""
    made = plan(image_size="16:0.01,24:0.99,32")
    assert made.lines()["steps"] == "3 epochs x 8 = 24 (none at 16 px, 32 px)"


def test_what_steps_take_goes_with_their_pixels():
    made = plan(image_size="16:0.5,32", max_steps=20)
    assert [made.work(step) for step in (0, 4, 12, 13, 24)] == [0, 1, 3, 4, 15]
    assert plan(image_size=16).work(24) == 24


@pytest.mark.parametrize(
    "save_every, steps, minutes",
    [
        ("1epoch", [0, 8, 16, 22, 24], None),
        ("2epochs", [0, 16, 22], None),
        ("5steps", [0, 5, 10, 15, 20, 22], None),
        ("10m", [22], 10),
        ("none", [], None),
    ],
)
def test_checkpoints_by_epochs_steps_or_the_clock(save_every, steps, minutes):
    made = plan(max_steps=22, save_every=save_every)
    assert due(made.checkpoint_after) == steps
    assert made.save_minutes == minutes


def test_the_rate_is_that_of_the_whole_schedule_however_it_is_cut():
    whole, short = plan(), plan(max_steps=10)
    assert [short.learning_rate(s) for s in range(10)] == [
        whole.learning_rate(s) for s in range(10)
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(world=3), "cannot be divided by 3 processes; 30 or 33 can"),
        (dict(world=64), "cannot be divided by 64 processes; 64 can"),
        (dict(accumulation=3), "cannot be divided by the launcher's gradient_accumulation_steps 3"),
        (dict(accumulation=0), "must be >= 1"),
        (dict(accumulation=2, micro_batch_size=8), "are both given"),
        (dict(samples=31), "larger than the training set (31 images)"),
        (dict(mixup=0.8, batch_size=33), "33 images at once are no whole number of pairs"),
        (dict(cutmix=1.0, micro_batch_size=1), "cannot be cut so into equal parts"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(options, message):
    with pytest.raises(BadInput) as refused:
        plan(**options)
    assert message in str(refused.value)


def test_micro_batches_are_the_largest_that_fit_and_even_where_pairs_are_mixed():
    assert plan(micro_batch_size=10).order.micro_batch_size == 8
    assert plan(batch_size=48, micro_batch_size=3).order.micro_batch_size == 3
    assert plan(batch_size=48, micro_batch_size=3, mixup=0.8).order.micro_batch_size == 2
    assert micro_batch_sizes(plan(mixup=0.8).args, 12) == [12, 6, 4, 2]
    assert micro_batch_sizes(plan().args, 12) == [12, 6, 4, 3, 2, 1]


def test_words_and_facts_agree():
    made = plan(world=2, accumulation=2, max_steps=10)
    assert made.lines()["batch"] == "32 = 2 processes x 8 images x 2 accumulation steps"
    assert made.lines()["steps"] == "3 epochs x 8 = 24, stopping after 10"
    assert (
        "warm-up 1 epochs (derived) = 8 steps"
        in made.lines({"warmup_epochs": "derived"})["schedule"]
    )
    assert made.facts() == {
        "processes": 2,
        "device_batch_size": 8,
        "accumulation_steps": 2,
        "steps_per_epoch": 8,
        "total_steps": 24,
        "stop_step": 10,
    }
