"""What the recipe finetune makes of models: sizes, regularisation, clipping."""

from dataclasses import fields, replace

import pytest

from cifar_accel.errors import BadInput
from cifar_accel.models.finetune import fit_to_model
from cifar_accel.options.recipes import DERIVED_LATE, recipe_defaults
from cifar_accel.options.resolve import with_derived


def fit(model, given=(), **options):
    """Options and origins of the recipe for `model`; those that are `given` come from flags."""
    args = replace(recipe_defaults("finetune"), model=model, **options)
    origin = {field.name: "recipe" for field in fields(args)}
    return fit_to_model(args, origin | dict.fromkeys([*given, *options], "flag"))


def test_a_small_model_for_a_short_run():
    args, origin = fit("test_vit")
    assert args.image_size == 128
    assert origin["image_size"] == "derived"
    # timm's word for this model.
    assert args.interpolation == "bicubic"
    assert args.cutmix == args.mixup == args.clip_grad == 0
    assert args.model_kwargs == ()


@pytest.mark.parametrize("model, side", [("test_vit3", 128), ("crossvit_9_240", 240)])
def test_the_nearest_size_that_the_model_takes(model, side):
    assert fit(model)[0].image_size == side
    assert fit("test_vit", image_size=224)[0].image_size == 224


def test_no_size_is_one_line():
    with pytest.raises(BadInput, match="--model test_vit"):
        fit("test_vit", model_kwargs=("depth=many",))


def test_a_long_run_is_regularised():
    args, origin = fit("test_vit", epochs=26)
    assert (args.cutmix, args.mixup_prob) == (1.0, 0.5)
    assert args.model_kwargs == ("drop_path_rate=0.1",)
    assert origin["model_kwargs"] == "derived"
    # What a flag says stays.
    args, origin = fit("test_vit", epochs=26, cutmix=0.0, model_kwargs=("depth=2",))
    assert args.cutmix == 0
    assert args.model_kwargs == ("depth=2",)


def test_a_large_model_is_regularised():
    args, _ = fit("resnet18")
    assert args.cutmix == 1
    assert args.model_kwargs == ("drop_path_rate=0.1",)
    # It has no stochastic depth.
    assert fit("vgg11", image_size=32)[0].model_kwargs == ()


def test_nfnets_are_clipped_adaptively():
    args, _ = fit("test_nfnet")
    assert (args.clip_grad, args.clip_mode) == (0.01, "agc")
    # Who gives one of the two means the other one's default, unless that would clip nothing.
    args, _ = fit("test_nfnet", clip_grad=1.0)
    assert (args.clip_grad, args.clip_mode) == (1.0, "norm")
    args, _ = fit("test_nfnet", clip_mode="agc")
    assert (args.clip_grad, args.clip_mode) == (0.01, "agc")


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("test_nfnet", {"clip_mode": "value"}, "--clip-mode has no effect on this model"),
        ("test_vit", {"clip_mode": "agc"}, "--clip-mode has no effect on this model"),
        ("test_vit", {"mixup_prob": 0.5}, "--mixup-prob has no effect on this model"),
    ],
)
def test_a_flag_without_effect_on_the_model_is_refused(model, options, message):
    with pytest.raises(BadInput, match=message):
        fit(model, **options)


def test_layers_decay_where_there_is_no_batch_norm():
    decays = {
        model: fit(model)[0].layer_decay for model in ("test_vit", "test_resnet", "test_nfnet")
    }
    assert decays == {"test_vit": 0.8, "test_resnet": 1.0, "test_nfnet": 0.9}


def test_models_with_batch_norm_learn_at_twice_the_rate():
    """Of adamw; the rates of other optimizers are derived before, and stay."""
    assert fit("test_vit")[0].learning_rate == 1e-3
    args, origin = fit("test_resnet")
    assert (args.learning_rate, origin["learning_rate"]) == (2e-3, "derived")
    assert fit("test_resnet", learning_rate=0.01)[0].learning_rate == 0.01
    assert fit("test_resnet", optimizer="lamb")[0].learning_rate == 1e-3
    args = replace(recipe_defaults("finetune"), model="test_resnet", learning_rate=0.04)
    origin = {field.name: "recipe" for field in fields(args)} | {"learning_rate": "derived"}
    assert fit_to_model(args, origin)[0].learning_rate == 0.04


def test_what_is_derived_late_is_known_to_the_run_folder():
    found = set()
    for model, options in (("test_nfnet", {"epochs": 26}), ("test_vit", {}), ("test_resnet", {})):
        _, origin = fit(model, **options)
        found |= {name for name, of in origin.items() if of == "derived"}
    # These follow from --budget and from the images.
    others = {"epochs", "warmup_epochs", "stored_size", "crop_padding", "model_ema_decay"}
    assert found | others == DERIVED_LATE


def test_flags_win():
    args = recipe_defaults("finetune")
    origin = {field.name: "recipe" for field in fields(args)} | {"epochs": "flag"}
    new, where = with_derived(args, origin, {"epochs": 3, "cutmix": 1.0})
    assert (new.epochs, new.cutmix) == (args.epochs, 1.0)
    assert (where["epochs"], where["cutmix"]) == ("flag", "derived")
