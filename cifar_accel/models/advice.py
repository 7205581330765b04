"""What hurts a training from weights, and which flag mends it: one line each."""

from typing import Any

from cifar_accel.options.options import TrainingArguments, flag

# An input smaller than this share of the side that the weights were trained at is told, unless it
# has as many pixels as is advised.
LEAST_SHARE = 1 / 3
ADVISED = 128


def advice(args: TrainingArguments, origin: dict[str, str], model: Any) -> list[str]:
    """Lines on what is known to cost accuracy here; `origin` is that of the options.

    The evidence is in docs/accuracy.md.
    """
    lines = []
    if args.recipe == "report":
        lines.append("--recipe report is the course report's, a baseline; finetune goes past it")
    if not args.pretrained and not args.checkpoint:
        return lines
    for line in (_small_input(args, model), _other_statistics(args, origin, model), _muon(args)):
        if line:
            lines.append(line)
    if args.vflip and origin["vflip"] != "flag":
        lines.append(f"--vflip {args.vflip:g} turns photographs upside down; --vflip 0 does not")
    return lines


def _small_input(args: TrainingArguments, model: Any) -> str:
    """An input far below the size that the weights were trained at."""
    trained_at = model.pretrained_cfg["input_size"][-1]
    # --budget knows what it chose.
    if args.budget or args.input_size >= min(ADVISED, LEAST_SHARE * trained_at):
        return ""
    tokens = ""
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    if patches:
        tokens = f", {patches} tokens an image"
    return (
        f"--image-size {args.input_size} is under a third of the {trained_at} px that the weights "
        f"were trained at{tokens}: it costs many points; --image-size {ADVISED} mends it"
    )


def _other_statistics(args: TrainingArguments, origin: dict[str, str], model: Any) -> str:
    """A recipe's mean and deviation in place of the model's own."""
    own = {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}
    others = [
        name
        for name, value in own.items()
        if origin[name] != "flag" and getattr(args, name) not in (None, value)
    ]
    if not others:
        return ""
    flags = " ".join(f"{flag(name)} none" for name in others)
    return f"the recipe's {' and '.join(others)} are not those of the weights; {flags} takes these"


def _muon(args: TrainingArguments) -> str:
    """An optimizer that spoils weights which Adam has trained (arXiv 2605.10468)."""
    if "muon" not in args.optimizer:
        return ""
    return f"{args.optimizer} degrades weights that were trained by Adam; adamw does not"
