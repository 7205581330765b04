"""The device pipeline against timm's transforms on Pillow, pixel by pixel, without tolerance.

On smooth images, edge cases and photographs. The distribution of what is drawn is compared too.
"""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional

from cifar_accel.data import augment, draws, pixels
from cifar_accel.data.decode import load_dataset
from cifar_accel.data.timm_loader import _posterize
from cifar_accel.options import policy
from cifar_accel.options.recipes import recipe_defaults

FILL = (124, 116, 104)
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Both have the same order, so that draws can be compared too.
TIMM_NAMES = dict(zip(policy.NAMES, auto_augment._RAND_TRANSFORMS, strict=True))
FACTORS = ("color", "contrast", "brightness", "sharpness")
WITHOUT_ARGUMENT = ("autocontrast", "equalize", "invert")


@pytest.fixture(scope="module")
def images():
    """uint8 [n, 32, 32, 3]: smooth structure, flat and nearly flat images, noise, two levels."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (40, 3, 6, 6), np.uint8)).float()
    smooth = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic")
    smooth = smooth.mul(0.7).add(20).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 1, 127, 128, 254, 255)]
    red = np.zeros((32, 32, 3), np.uint8)
    red[:] = 255, 0, 0
    two_colours = np.zeros((32, 32, 3), np.uint8)
    two_colours[5:, 7:] = 10, 20, 255
    one_pixel = np.zeros((32, 32, 3), np.uint8)
    one_pixel[0, 0] = 255
    edge_cases = np.stack([*flat, red, two_colours, one_pixel])
    noise = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    two_levels = (noise > 127) * np.uint8(255)
    return np.concatenate([smooth, edge_cases, noise, two_levels])


@pytest.fixture(autouse=True)
def zero_bits(monkeypatch):
    """Pillow 13 refuses the 0 bits that timm's posterize may ask for."""
    for name in ("Posterize", "PosterizeIncreasing"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, _posterize)


def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def transformed(images: np.ndarray, change) -> np.ndarray:
    """`change` of each image by Pillow, as [n, 3, H, W]."""
    changed = [np.asarray(change(Image.fromarray(image))) for image in images]
    return np.stack(changed).transpose(0, 3, 1, 2)


def by_timm(images, name, magnitude, sign, increasing, interpolation, monkeypatch):
    """One operation of timm's, its random sign replaced by `sign`."""
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: value * sign)
    timm_name = TIMM_NAMES[name]
    if increasing and timm_name + "Increasing" in auto_augment.NAME_TO_OP:
        timm_name += "Increasing"
    hparams = dict(img_mean=FILL, interpolation=RESAMPLING[interpolation], magnitude_max=30)
    return transformed(images, auto_augment.AugmentOp(timm_name, 1.0, magnitude, hparams))


def by_us(images, name, magnitude, sign, increasing, interpolation):
    """The same operation of ours."""
    n = len(images)
    values = draws.argument(name, np.full(n, magnitude / 10), np.full(n, sign), increasing)
    arguments = np.zeros((n, 1, 6))
    arguments[:, 0, 0] = values
    if name in draws.MOVES:
        arguments[:, 0] = draws.affine_matrices(name, values, (32, 32))
    program = draws.Program(np.full((n, 1), policy.NAMES.index(name)), arguments)
    return pixels.run_program(batch(images).float(), program, FILL, interpolation).numpy()


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", [0, 0.4, 3, 7.77, 10, 13])
@pytest.mark.parametrize("name", policy.NAMES)
def test_operation_equals_pillow(images, name, magnitude, increasing, monkeypatch):
    interpolations = RESAMPLING if name in draws.MOVES else ("bilinear",)
    for sign in (1.0, -1.0):
        for interpolation in interpolations:
            setting = (name, magnitude, sign, increasing, interpolation)
            theirs = by_timm(images, *setting, monkeypatch)
            assert np.array_equal(by_us(images, *setting), theirs), setting


@pytest.mark.parametrize("name", policy.NAMES)
def test_operation_equals_pillow_on_photographs(cifar, cache, name, monkeypatch):
    photographs = load_dataset(cifar, cache, 32).test.images[:300].transpose(0, 2, 3, 1)
    for magnitude, sign in ((10, 1.0), (5.5, -1.0)):
        setting = (name, magnitude, sign, False, "bilinear")
        theirs = by_timm(photographs, *setting, monkeypatch)
        assert np.array_equal(by_us(photographs, *setting), theirs)


@pytest.mark.parametrize("name", policy.NAMES)
def test_operations_are_not_the_identity(images, name):
    """So that the tests above compare something: each changes most images at magnitude 6."""
    before = images[:40].transpose(0, 3, 1, 2)
    after = by_us(images[:40], name, 6, 1.0, False, "bilinear")
    assert (after != before).any((1, 2, 3)).mean() > 0.8


def test_every_operation_either_changes_colours_or_moves_pixels():
    assert sorted([*pixels.OPERATIONS, *draws.MOVES]) == sorted(policy.NAMES)


@pytest.mark.parametrize("size", [32, 48, 64, 96])
@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_resized_crop_and_flips_equal_pillow(images, interpolation, size):
    report = recipe_defaults("report")
    args = replace(report, image_size=size, interpolation=interpolation)
    n = len(images)
    drawn = augment.draw(args, None, np.zeros(n, np.int64), np.arange(n), (32, 32), size)
    assert drawn.hflip.any()
    assert drawn.vflip.any()
    assert drawn.box[:, 2:].min() < 16
    out = augment.augment(batch(images), drawn, size, interpolation).numpy()
    for i, image in enumerate(images):
        y, x, h, w = (int(v) for v in drawn.box[i])
        place = (y, x, h, w, (size, size), RESAMPLING[interpolation])
        cropped = functional.resized_crop(Image.fromarray(image), *place)
        theirs = np.asarray(cropped).transpose(2, 0, 1)
        if drawn.hflip[i]:
            theirs = theirs[:, :, ::-1]
        if drawn.vflip[i]:
            theirs = theirs[:, ::-1]
        assert np.array_equal(out[i], theirs)


@pytest.mark.parametrize("size", [24, 17, 8])
@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_shrinking_is_antialiased_as_pillows(images, interpolation, size):
    """Exact where Pillow goes across first, as it did until it chose by the image's shape."""
    out = pixels.resize(batch(images), (size, size), interpolation).numpy()
    resampling = RESAMPLING[interpolation]
    theirs = transformed(images, lambda image: image.resize((size, size), resampling))
    assert np.array_equal(out, theirs)


def test_colour_jitter_equals_torchvisions(images):
    args = replace(recipe_defaults("plain"), crop_padding=0, hflip=0.0, color_jitter=0.4)
    n = len(images)
    drawn = augment.draw(args, None, np.zeros(n, np.int64), np.arange(n), (32, 32), 32)
    # Factors reach from 0.6 to 1.4, and every order of the three is drawn.
    factors = drawn.program.arguments[:, :, 0]
    assert 0.6 <= factors.min() < 0.65
    assert 1.35 < factors.max() <= 1.4
    assert len(np.unique(drawn.program.operations, axis=0)) == 6
    adjust = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "color": functional.adjust_saturation,
    }
    out = augment.augment(batch(images), drawn, 32, "bilinear").numpy()
    for i, image in enumerate(images):
        pil = Image.fromarray(image)
        for code, factor in zip(drawn.program.operations[i], factors[i], strict=True):
            pil = adjust[policy.NAMES[code]](pil, factor)
        assert np.array_equal(out[i], np.asarray(pil).transpose(2, 0, 1))


def one_layer_by_pillow(image: Image.Image, code: int, row: np.ndarray) -> Image.Image:
    """One operation with an argument that was drawn for it, as timm applies it."""
    if code == draws.NOTHING:
        return image
    name = policy.NAMES[code]
    if name in draws.MOVES:
        how = (Image.Transform.AFFINE, tuple(row), RESAMPLING["bilinear"])
        return image.transform(image.size, *how, fillcolor=FILL)
    operation = auto_augment.NAME_TO_OP[TIMM_NAMES[name]]
    if name in WITHOUT_ARGUMENT:
        return operation(image)
    if name in FACTORS:
        return operation(image, row[0])
    return operation(image, int(row[0]))


@pytest.mark.parametrize(
    "text", ["rand-m9-n3-mstd0.5-p0.8", "rand-m15-n2", "rand-n4-tweights-p0.9"]
)
def test_whole_policy_equals_pillow_and_the_batch_changes_nothing(images, text):
    n = 300
    many = np.concatenate([images] * 6)[:n]
    read = policy.read_policy(text)
    program = draws.draw_policy(read, 1, np.zeros(n, np.int64), np.arange(n), (32, 32))
    out = pixels.run_program(batch(many).float(), program, FILL, "bilinear").numpy()
    for i in range(n):
        pil = Image.fromarray(many[i])
        for code, row in zip(program.operations[i], program.arguments[i], strict=True):
            pil = one_layer_by_pillow(pil, code, row)
        assert np.array_equal(out[i], np.asarray(pil).transpose(2, 0, 1))
    for part in (slice(0, 1), slice(7, 30)):
        some = draws.Program(program.operations[part], program.arguments[part])
        alone = pixels.run_program(batch(many[part]).float(), some, FILL, "bilinear").numpy()
        assert np.array_equal(alone, out[part])


# ---- the draws


POLICIES = [
    "rand-m15-n2",
    "rand-m9-n3-mstd0.5-inc1",
    "rand-m7-mstd101",
    "rand-m12-mmax20-p0.7",
    "rand-n4-tweights",
]
# Images for which timm and we draw.
DRAWN = 6000


def recorded(text: str, monkeypatch) -> list[list[tuple[str, float | None]]]:
    """What timm's own transform of policy `text` does: per image, (operation, first argument)."""
    done: list[list[tuple[str, float | None]]] = []
    hparams = dict(img_mean=FILL, interpolation=RESAMPLING["bilinear"])
    transform = auto_augment.rand_augment_transform(text, hparams)
    for operation in transform.ops:

        def note(image, *values, name=operation.name, **unused):
            done[-1].append((name.removesuffix("Increasing"), values[0] if values else None))
            return image

        operation.aug_fn = note
    random.seed(0)
    np.random.seed(0)
    for _ in range(DRAWN):
        done.append([])
        transform(None)
    return done


def drawn(text: str) -> list[list[tuple[str, float | None]]]:
    """The same, of ours; arguments read back from the matrices."""
    read = policy.read_policy(text)
    samples = np.arange(DRAWN)
    program = draws.draw_policy(read, 5, np.zeros(DRAWN, np.int64), samples, (1, 1))
    done = []
    for codes, rows in zip(program.operations, program.arguments, strict=True):
        layers = zip(codes, rows, strict=True)
        done.append([read_back(code, row) for code, row in layers if code != draws.NOTHING])
    return done


def read_back(code: int, row: np.ndarray) -> tuple[str, float | None]:
    """timm's name and argument of a layer."""
    name = policy.NAMES[code]
    if name in WITHOUT_ARGUMENT:
        return TIMM_NAMES[name], None
    if name == "rotate":
        return TIMM_NAMES[name], math.degrees(math.atan2(-row[1], row[0]))
    place = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}.get(name, 0)
    return TIMM_NAMES[name], row[place]


def standard_deviations_apart(theirs: list, ours: list) -> float:
    """How far two samples of names lie apart, by a chi-square test (Wilson and Hilferty 1931)."""
    names = sorted({*theirs, *ours})
    observed = np.array([ours.count(name) for name in names], float)
    expected = (observed + [theirs.count(name) for name in names]) / 2
    # Both samples vary about their mean, so this is twice the chi-square of one of them.
    statistic = 2 * ((observed - expected) ** 2 / expected).sum()
    df = len(names) - 1
    if df == 0:
        return 0.0
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def distance(a: list[float], b: list[float]) -> float:
    """The largest difference of two distribution functions (Kolmogorov and Smirnov)."""
    a = np.sort(np.round(a, 9))
    b = np.sort(np.round(b, 9))
    grid = np.concatenate([a, b])
    below_a = np.searchsorted(a, grid, "right") / len(a)
    below_b = np.searchsorted(b, grid, "right") / len(b)
    return np.abs(below_a - below_b).max()


@pytest.mark.parametrize("text", POLICIES)
def test_operations_are_distributed_as_timms(text, monkeypatch):
    """How many there are, which, and which follows which."""

    def counted(done):
        numbers = [str(len(layers)) for layers in done]
        names = [name for layers in done for name, _ in layers]
        pairs = [layers[0][0] + layers[1][0] for layers in done if len(layers) > 1]
        return numbers, names, pairs

    theirs = counted(recorded(text, monkeypatch))
    ours = counted(drawn(text))
    for their_counts, our_counts in zip(theirs, ours, strict=True):
        assert standard_deviations_apart(their_counts, our_counts) < 4


@pytest.mark.parametrize("text", POLICIES)
def test_arguments_are_distributed_as_timms(text, monkeypatch):
    def arguments(done):
        found: dict[str, list[float]] = {name: [] for name in TIMM_NAMES.values()}
        for name, value in (layer for layers in done for layer in layers):
            if value is not None:
                found[name].append(value)
        return found

    theirs = arguments(recorded(text, monkeypatch))
    ours = arguments(drawn(text))
    compared = 0
    for name in TIMM_NAMES.values():
        a, b = theirs[name], ours[name]
        if len(a) < 100:
            continue
        assert distance(a, b) < 2.2 * math.sqrt(1 / len(a) + 1 / len(b)), name
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize(
    "text", [*POLICIES, "rand", "rand-m3", "rand-inc0", "rand-p1-n1", "rand-mmax5-mstd0.25"]
)
def test_policies_are_read_as_timm_reads_them(text):
    ours = policy.read_policy(text)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": FILL})
    operation = theirs.ops[0]
    assert ours.magnitude == operation.magnitude
    assert ours.layers == theirs.num_layers
    assert ours.prob == operation.prob
    assert ours.std == operation.magnitude_std
    assert ours.ceiling == (operation.magnitude_max or 10)
    assert ours.increasing == any(o.name == "ColorIncreasing" for o in theirs.ops)


def test_weights_are_timms():
    theirs = auto_augment.rand_augment_transform("rand-tweights", {"img_mean": FILL})
    names = [operation.name.removesuffix("Increasing") for operation in theirs.ops]
    weights = dict(zip(names, theirs.choice_weights, strict=True))
    expected = [weights[TIMM_NAMES[name]] for name in policy.NAMES]
    assert np.allclose(draws.WEIGHTS / draws.WEIGHTS.sum(), expected)
