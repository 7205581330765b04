"""The device pipeline against timm's transforms on Pillow, pixel by pixel, on photographs and on edge cases."""

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
TIMM_NAMES = dict(
    zip(policy.NAMES, auto_augment._RAND_TRANSFORMS, strict=True)
)  # the same order, so that draws can be compared too


@pytest.fixture(scope="module")
def images():
    """uint8 [n, 32, 32, 3]: smooth structure, noise, two levels, flat images, single pixels and saturated colours."""
    rng = np.random.default_rng(0)
    small = torch.from_numpy(rng.integers(0, 256, (40, 3, 6, 6), np.uint8)).float()
    smooth = (
        torch.nn.functional.interpolate(small, (32, 32), mode="bicubic")
        .mul(0.7)
        .add(20)
        .clamp(0, 255)
        .byte()
    )
    edges = [np.full((32, 32, 3), level, np.uint8) for level in (0, 1, 127, 128, 254, 255)]
    edges += [np.zeros((32, 32, 3), np.uint8) for _ in range(3)]
    edges[-1][0, 0] = 255
    edges[-2][5:, 7:] = 10, 20, 255
    edges[-3][:] = 255, 0, 0
    noise = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
    return np.concatenate(
        [smooth.permute(0, 2, 3, 1).numpy(), np.stack(edges), noise, (noise > 127) * np.uint8(255)]
    )


@pytest.fixture(autouse=True)
def zero_bits(monkeypatch):
    """Pillow 13 refuses the 0 bits that timm's posterize may ask for."""
    for name in ("Posterize", "PosterizeIncreasing"):
        monkeypatch.setitem(auto_augment.NAME_TO_OP, name, _posterize)


def batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def transformed(images: np.ndarray, change) -> np.ndarray:
    """`change` of each image by Pillow, as [n, 3, H, W]."""
    return np.stack([np.asarray(change(Image.fromarray(i))) for i in images]).transpose(0, 3, 1, 2)


def by_timm(images, name, magnitude, sign, increasing, interpolation, monkeypatch):
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda v: v * sign)
    timm_name = TIMM_NAMES[name]
    if increasing and timm_name + "Increasing" in auto_augment.NAME_TO_OP:
        timm_name += "Increasing"
    hparams = dict(img_mean=FILL, interpolation=RESAMPLING[interpolation], magnitude_max=30)
    return transformed(images, auto_augment.AugmentOp(timm_name, 1.0, magnitude, hparams))


def by_us(images, name, magnitude, sign, increasing, interpolation):
    n = len(images)
    values = draws.argument(name, np.full(n, magnitude / 10), np.full(n, sign), increasing)
    arguments = np.zeros((n, 1, 6))
    arguments[:, 0, 0] = values
    if name in pixels.MOVES:
        arguments[:, 0] = draws.affine(name, values, (32, 32))
    program = draws.Program(np.full((n, 1), policy.NAMES.index(name)), arguments)
    return pixels.run_program(batch(images).float(), program, FILL, interpolation).numpy()


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("magnitude", [0, 0.4, 3, 7.77, 10, 13])
@pytest.mark.parametrize("name", policy.NAMES)
def test_operation_equals_pillow(images, name, magnitude, increasing, monkeypatch):
    for sign in (1.0, -1.0):
        for interpolation in RESAMPLING if name in pixels.MOVES else ("bilinear",):
            theirs = by_timm(images, name, magnitude, sign, increasing, interpolation, monkeypatch)
            assert np.array_equal(
                by_us(images, name, magnitude, sign, increasing, interpolation), theirs
            )


@pytest.mark.parametrize("name", policy.NAMES)
def test_operation_equals_pillow_on_photographs(cifar, cache, name, monkeypatch):
    photographs = load_dataset(cifar, cache, 32).test.images[:300].transpose(0, 2, 3, 1)
    for magnitude, sign in ((10, 1.0), (5.5, -1.0)):
        theirs = by_timm(photographs, name, magnitude, sign, False, "bilinear", monkeypatch)
        assert np.array_equal(by_us(photographs, name, magnitude, sign, False, "bilinear"), theirs)


def test_operations_are_not_the_identity(images):
    """So that the tests above compare something: each changes most images at magnitude 6."""
    for name in policy.NAMES:
        changed = by_us(images[:40], name, 6, 1.0, False, "bilinear") != images[:40].transpose(
            0, 3, 1, 2
        )
        assert changed.any((1, 2, 3)).mean() > 0.8, name


@pytest.mark.parametrize("size", [32, 48, 64, 96])
@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_resized_crop_and_flips_equal_pillow(images, interpolation, size):
    args = replace(
        recipe_defaults("report"), aa="none", image_size=size, interpolation=interpolation
    )
    n = len(images)
    draws = augment.draw(args, np.zeros(n, np.int64), np.arange(n), (32, 32))
    out = augment.augment(batch(images), draws, size, interpolation).numpy()
    assert draws.hflip.any() and draws.vflip.any() and draws.box[:, 2:].min() < 16
    for i, image in enumerate(images):
        y, x, h, w = (int(v) for v in draws.box[i])
        pil = functional.resized_crop(
            Image.fromarray(image), y, x, h, w, (size, size), RESAMPLING[interpolation]
        )
        theirs = np.asarray(pil).transpose(2, 0, 1)
        theirs = theirs[:, :, ::-1] if draws.hflip[i] else theirs
        assert np.array_equal(out[i], theirs[:, ::-1] if draws.vflip[i] else theirs)


@pytest.mark.parametrize("interpolation", RESAMPLING)
def test_shrinking_is_antialiased_as_pillows(images, interpolation):
    """Exact where Pillow goes across first, as it always did until it chose by the image's shape."""
    for size in (24, 17, 8):
        out = pixels.resize(batch(images), (size, size), interpolation).numpy()
        theirs = transformed(
            images, lambda im, s=size: im.resize((s, s), RESAMPLING[interpolation])
        )
        assert np.array_equal(out, theirs)


def test_colour_jitter_equals_torchvisions(images):
    args = replace(recipe_defaults("plain"), crop_padding=0, hflip=0.0, color_jitter=0.4)
    n = len(images)
    draws = augment.draw(args, np.zeros(n, np.int64), np.arange(n), (32, 32))
    factors = draws.program.arguments[:, :, 0]
    assert 0.6 <= factors.min() < 0.65 and 1.35 < factors.max() <= 1.4
    assert len(np.unique(draws.program.operations, axis=0)) == 6, (
        "every order of the three is drawn"
    )
    out = augment.augment(batch(images), draws, 32, "bilinear").numpy()
    adjust = {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "color": functional.adjust_saturation,
    }
    for i, image in enumerate(images):
        pil = Image.fromarray(image)
        for code, factor in zip(draws.program.operations[i], factors[i], strict=True):
            pil = adjust[policy.NAMES[code]](pil, factor)
        assert np.array_equal(out[i], np.asarray(pil).transpose(2, 0, 1))


def by_pillow(image: np.ndarray, codes, rows) -> np.ndarray:
    """One image through the layers that were drawn for it, rounded after each, as timm applies them."""
    pil = Image.fromarray(image)
    for code, row in zip(codes, rows, strict=True):
        name = policy.NAMES[code] if code != draws.NOTHING else None
        if name in pixels.MOVES:
            pil = pil.transform(
                pil.size, Image.Transform.AFFINE, tuple(row), RESAMPLING["bilinear"], fillcolor=FILL
            )
        elif name:
            value = (
                row[0] if name in ("color", "contrast", "brightness", "sharpness") else int(row[0])
            )
            values = () if name in ("autocontrast", "equalize", "invert") else (value,)
            pil = auto_augment.NAME_TO_OP[TIMM_NAMES[name]](pil, *values)
    return np.asarray(pil).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "text", ["rand-m9-n3-mstd0.5-p0.8", "rand-m15-n2", "rand-n4-tweights-p0.9"]
)
def test_whole_policy_equals_pillow_and_the_batch_changes_nothing(images, text):
    n = 300
    many = np.concatenate([images] * 6)[:n]
    drawn = draws.draw_policy(
        policy.read_policy(text), 1, np.zeros(n, np.int64), np.arange(n), (32, 32)
    )
    out = pixels.run_program(batch(many).float(), drawn, FILL, "bilinear").numpy()
    for i in range(n):
        assert np.array_equal(out[i], by_pillow(many[i], drawn.operations[i], drawn.arguments[i]))
    for part in (slice(0, 1), slice(7, 30)):
        some = draws.Program(drawn.operations[part], drawn.arguments[part])
        assert np.array_equal(
            pixels.run_program(batch(many[part]).float(), some, FILL, "bilinear").numpy(), out[part]
        )


# ---- the draws


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Standard deviations by which the statistic lies above its mean (Wilson and Hilferty 1931)."""
    keep = expected > 0
    statistic, df = (((observed - expected) ** 2)[keep] / expected[keep]).sum(), keep.sum() - 1
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


POLICIES = [
    "rand-m15-n2",
    "rand-m9-n3-mstd0.5-inc1",
    "rand-m7-mstd101",
    "rand-m12-mmax20-p0.7",
    "rand-n4-tweights",
]


def recorded(text: str, times: int, monkeypatch) -> list[list[tuple[str, float | None]]]:
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
    for _ in range(times):
        done.append([])
        transform(None)
    return done


def drawn(text: str, times: int) -> list[list[tuple[str, float | None]]]:
    """The same, of ours; arguments read back from the matrices."""
    program = draws.draw_policy(
        policy.read_policy(text), 5, np.zeros(times, np.int64), np.arange(times), (1, 1)
    )

    def read(code, arguments):
        name = policy.NAMES[code]
        if name in ("autocontrast", "equalize", "invert"):
            return TIMM_NAMES[name], None
        if name == "rotate":
            return TIMM_NAMES[name], math.degrees(math.atan2(-arguments[1], arguments[0]))
        place = {"shear_x": 1, "shear_y": 3, "translate_x": 2, "translate_y": 5}.get(name, 0)
        return TIMM_NAMES[name], arguments[place]

    return [
        [read(code, a) for code, a in zip(codes, rows, strict=True) if code != draws.NOTHING]
        for codes, rows in zip(program.operations, program.arguments, strict=True)
    ]


@pytest.mark.parametrize("text", POLICIES)
def test_draws_are_distributed_as_timms(text, monkeypatch):
    """Operations, how many of them, pairs in sequence, and each operation's arguments; a 4-sigma test."""
    n = 6000
    theirs, ours = recorded(text, n, monkeypatch), drawn(text, n)

    def compare(key, kind):
        values = sorted({v for run in (theirs, ours) for row in run for v in key(row)}, key=str)
        counts = [
            np.array([sum(key(row).count(v) for row in run) for v in values], float)
            for run in (theirs, ours)
        ]
        counts = [np.append(c, n * 10 - c.sum()) for c in counts]
        both = (counts[0] + counts[1]) / 2
        statistic = chi_square((counts[1] - counts[0]) / 2 + both, both)
        assert statistic < 4, f"{kind} of {text}: {statistic:.1f} standard deviations apart"

    compare(lambda row: [len(row)], "the number of operations")
    compare(lambda row: [name for name, _ in row], "the operations")
    compare(lambda row: [row[0][0] + row[1][0]] if len(row) > 1 else [], "the pairs")
    for name in TIMM_NAMES.values():
        a, b = (
            np.sort([v for row in run for n_, v in row if n_ == name and v is not None])
            for run in (theirs, ours)
        )
        if len(a) < 100:
            continue
        grid = np.round(np.concatenate([a, b]), 9)
        distance = np.abs(
            np.searchsorted(np.round(a, 9), grid, "right") / len(a)
            - np.searchsorted(np.round(b, 9), grid, "right") / len(b)
        ).max()
        assert distance < 2.2 * math.sqrt(1 / len(a) + 1 / len(b)), (
            f"Kolmogorov-Smirnov of {name}: {distance}"
        )


@pytest.mark.parametrize(
    "text", [*POLICIES, "rand", "rand-m3", "rand-inc0", "rand-p1-n1", "rand-mmax5-mstd0.25"]
)
def test_policies_are_read_as_timm_reads_them(text):
    ours = policy.read_policy(text)
    theirs = auto_augment.rand_augment_transform(text, {"img_mean": FILL})
    operation = theirs.ops[0]
    assert (ours.magnitude, ours.layers, ours.prob) == (
        operation.magnitude,
        theirs.num_layers,
        operation.prob,
    )
    assert ours.std == operation.magnitude_std and ours.ceiling == (operation.magnitude_max or 10)
    assert ours.increasing == any(o.name == "ColorIncreasing" for o in theirs.ops)
    if ours.choice:
        weight = dict(
            zip(
                [o.name.removesuffix("Increasing") for o in theirs.ops],
                theirs.choice_weights,
                strict=True,
            )
        )
        expected = [weight[TIMM_NAMES[n]] for n in policy.NAMES]
        assert np.allclose(draws.WEIGHTS / draws.WEIGHTS.sum(), expected)


def test_mixing_boxes_are_timms(monkeypatch):
    """CutMix's square for the same share and centre."""
    from timm.data.mixup import cutmix_bbox_and_lam

    from cifar_accel.data.order import Mix

    for lam, cy, cx in [(0.3, 5, 30), (0.9, 0, 0), (0.5, 16, 16), (0.01, 31, 2)]:
        centre = iter([cy, cx])
        monkeypatch.setattr(np.random, "randint", lambda *a, size=None, c=centre: next(c))
        (y0, y1, x0, x1), kept = cutmix_bbox_and_lam((1, 3, 32, 32), lam)
        own, other = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
        mixed, share = augment.mix(
            torch.cat([own, other]), torch.tensor([1]), Mix(lam, (cy / 32, cx / 32))
        )
        expected = torch.zeros(1, 3, 32, 32)
        expected[:, :, y0:y1, x0:x1] = 1
        assert torch.equal(mixed, expected) and share == pytest.approx(kept)
