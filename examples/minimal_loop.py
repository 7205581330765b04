"""A whole training that fits into the head: one process, no resume, no files, no log but print.

    python -m examples.minimal_loop

It trains timm's smallest NFNet on scikit-learn's handwritten digits with the parts that
`cifar_accel/train.py` is made of, and ends with the same weights as that, bit for bit
(tests/test_examples.py). What the real loop has beside it: several processes, other devices and
precisions, checkpoints, clipping, averaged weights, seeds for dropout.
"""

import torch
from accelerate import Accelerator
from timm.loss import SoftTargetCrossEntropy

from cifar_accel.data.batches import Pipeline
from cifar_accel.data.decode import load_dataset
from cifar_accel.errors import Diverged
from cifar_accel.evaluate import evaluate
from cifar_accel.models.create import build_model, use_channels_last
from cifar_accel.models.weights import input_statistics
from cifar_accel.optim.gradients import Watch, gradient_norm
from cifar_accel.optim.optimizers import build_optimizer
from cifar_accel.options.parsing import parse_training
from cifar_accel.plan import make_plan

OPTIONS = (
    "--dataset digits --model test_nfnet --no-pretrained --recipe digits "
    "--batch-size 32 --epochs 6 --learning-rate 3e-3"
).split()


def train(words: list[str]) -> tuple[torch.nn.Module, list[float], dict[str, float]]:
    """Train as the options `words` say.

    Returns the model, the loss of each step, and the last evaluation.
    """
    # The options: those given, over the recipe's, over the defaults.
    args, _ = parse_training(words)

    # The images, decoded once and cached, and the plan: how many steps, and what each is made of.
    dataset = load_dataset(args.dataset, args.data_dir, args.input_size, print)
    plan = make_plan(args, len(dataset.train))
    for name, text in plan.lines().items():
        print(f"{name:<9} {text}")

    # The model is made from the seed. Weights and images share the layout that is fastest for it.
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    device = accelerator.device
    model = build_model(args, len(dataset.train.classes), print)
    channels_last = use_channels_last(args, model, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(memory_format=layout)
    optimizer = build_optimizer(model, args)
    # Targets are distributions: smoothed, and mixed where the options say so.
    criterion = SoftTargetCrossEntropy()
    watch = Watch(list(model.parameters()), device, scaled=False, step=0)

    # Batches are functions of the step: this could begin at any.
    mean, std = input_statistics(args, model)
    test = Pipeline(args, dataset.test, device, mean, std)
    micro_batches = Pipeline(args, dataset.train, device, mean, std).training_batches(
        plan.order, 0, plan.stop_step
    )

    model.train()
    losses = []
    figures: dict[str, float] = {}
    for step in range(plan.stop_step):
        # The rate is a function of the step too.
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)

        # One optimizer step over the global batch, in micro-batches whose gradients add up.
        micro_losses = []
        for _ in range(plan.accumulation):
            batch = next(micro_batches)
            logits = model(batch.images.contiguous(memory_format=layout))
            loss = criterion(logits, batch.targets)
            (loss / plan.accumulation).backward()
            micro_losses.append(loss.detach())
        watch.note(micro_losses, gradient_norm(model.parameters()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(micro_losses).double().mean().item())

        # After each epoch: stop if a step was not finite, and count the correct answers.
        if plan.evaluation_after(step + 1):
            is_bad, bad_step, _, bad_loss = watch.report()[0].tolist()
            if is_bad:
                raise Diverged(f"step {bad_step:.0f} is not finite: loss {bad_loss:.4g}")
            batches = test.evaluation_batches(plan.evaluation_batch_size)
            figures = evaluate(accelerator, model, batches, len(test.split), layout)
            print(f"step {step + 1:>4}  loss {losses[-1]:.4f}  acc {figures['accuracy']:.2%}")
    return model, losses, figures


if __name__ == "__main__":
    train(OPTIONS)
