import itertools

import numpy as np
import pytest

from cifar_accel.data.order import (
    Order,
    evaluation_places,
    micro_batches,
    permutation,
    random_bits,
    stratified_subset,
    uniform,
)

GOLDEN_ORDER = [26904, 45197, 999, 761, 14726, 23878]
GOLDEN_BITS = 1112339080716505948


def same_size(step):
    """The side of the images at any step."""
    return 32


def test_the_order_never_changes_between_versions():
    """Checkpoints of a released version go on with the same samples: these values are for ever."""
    assert permutation(3407, 0, 50_000)[:6].tolist() == GOLDEN_ORDER
    assert int(random_bits(1, "hflip", 2, 3)[0]) == GOLDEN_BITS


def test_permutations():
    first = permutation(1, 0, 1000).tolist()
    assert sorted(first) == list(range(1000))
    assert permutation(1, 1, 1000).tolist() != first
    assert permutation(2, 0, 1000).tolist() != first


def test_uniform_numbers_are_uniform_and_independent():
    epochs = np.arange(200)[:, None]
    samples = np.arange(500)
    u = uniform(7, "hflip", epochs, samples)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.size) ** 0.5
    # Chi-square over 64 bins, 5 sigma.
    expected = u.size / 64
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    # Neither another purpose nor a neighbour says anything about it.
    v = uniform(7, "vflip", epochs, samples)
    for other in (v, np.roll(u, 1, 0), np.roll(u, 1, 1)):
        correlation = np.corrcoef(u.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / u.size**0.5


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24, 48])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_each_global_batch_is_cut_exactly_once(world, accumulation):
    orders = [Order(5, 1000, 192, world, rank, accumulation) for rank in range(world)]
    taken = [order.positions(micro) for micro in range(accumulation) for order in orders]
    assert np.concatenate(taken).tolist() == list(range(192))


@pytest.mark.parametrize("batch, world, accumulation", [(12, 2, 1), (12, 3, 2), (24, 4, 3)])
def test_neighbours_stay_together_however_the_batch_is_cut(batch, world, accumulation):
    """They are mixed with each other: 0 with 1, 2 with 3 and so on."""

    def pairs(world, accumulation):
        found = set()
        for rank in range(world):
            order = Order(3, 50, batch, world, rank, accumulation)
            for micro_batch in micro_batches(order, 1, 4, same_size):
                for pair in micro_batch.samples.reshape(-1, 2).tolist():
                    found.add((micro_batch.step, *pair))
        return found

    assert len(pairs(1, 1)) == 3 * batch // 2
    assert pairs(world, accumulation) == pairs(1, 1)


def test_the_last_incomplete_batch_is_dropped_and_every_epoch_reshuffled():
    planned = list(micro_batches(Order(3, 103, 10), 0, 20, same_size))
    first = {int(sample) for m in planned if m.epoch == 0 for sample in m.samples}
    second = {int(sample) for m in planned if m.epoch == 1 for sample in m.samples}
    assert len(first) == 100
    assert len(second) == 100
    assert first != second


def test_a_plan_from_the_middle_is_the_rest_of_the_plan():
    order = Order(3, 103, 10, 2, 1, 1)
    whole = list(micro_batches(order, 0, 25, same_size))
    rest = list(micro_batches(order, 13, 25, same_size))
    for a, b in zip(whole[13:], rest, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert a.samples.tolist() == b.samples.tolist()


def test_the_samples_of_a_step_are_those_of_its_micro_batches():
    order = Order(3, 103, 10, accumulation=5)
    parts = [micro_batch.samples for micro_batch in micro_batches(order, 13, 14, same_size)]
    assert order.samples_of(13).tolist() == np.concatenate(parts).tolist()


def test_mixing_follows_its_probability_and_distribution():
    order = Order(11, 1000, 10)
    drawn = [order.mixing_of_step(step, 0.8, 0.0, 0.7) for step in range(4000)]
    lam = np.array([mixing.lam for mixing in drawn if mixing.lam < 1])
    assert abs(len(lam) / 4000 - 0.7) < 4 * (0.21 / 4000) ** 0.5
    assert abs(lam.mean() - 0.5) < 4 * lam.std() / len(lam) ** 0.5
    variance_of_beta = 1 / (4 * (2 * 0.8 + 1))
    assert abs(lam.var() - variance_of_beta) < 0.01


def test_a_step_is_mixed_in_one_of_the_ways_that_are_on():
    order = Order(11, 1000, 10)

    def share_of_cutmix(mixup, cutmix):
        drawn = [order.mixing_of_step(step, mixup, cutmix, 1.0) for step in range(2000)]
        return sum(mixing.centre is not None for mixing in drawn) / 2000

    assert share_of_cutmix(0.8, 1.0) == pytest.approx(0.5, abs=0.05)
    assert share_of_cutmix(0.8, 0.0) == 0
    assert share_of_cutmix(0.0, 1.0) == 1
    assert order.mixing_of_step(3, 0.0, 0.0, 1.0).lam == 1.0


def test_stratified_subsets():
    labels = np.array([0] * 70 + [1] * 20 + [2] * 10)
    index = stratified_subset(labels, 50, seed=1).tolist()
    assert np.bincount(labels[index]).tolist() == [35, 10, 5]
    assert sorted(set(index)) == index
    assert len(stratified_subset(labels, 7, seed=1)) == 7
    assert stratified_subset(labels, 50, seed=2).tolist() != index


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 64])
def test_every_place_is_evaluated_once_in_equal_batches(world):
    for n, batch_size in itertools.product([1, 2, 5, 48, 100, 359, 1000], [1, 3, 5, 64, 256]):
        ranks = [evaluation_places(n, batch_size, world, rank) for rank in range(world)]
        assert len({places.shape for places in ranks}) == 1
        every = np.concatenate(ranks).ravel().tolist()
        assert [place for place in every if place < n] == list(range(n))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 8, 64])
def test_evaluation_batches_are_no_more_and_no_larger_than_needed(world):
    for n, batch_size in itertools.product([1, 2, 5, 48, 100, 359, 1000], [1, 3, 5, 64, 256]):
        batches, size = evaluation_places(n, batch_size, world, 0).shape
        assert size <= batch_size
        assert (batches - 1) * batch_size * world < n
        assert batches * (size - 1) * world < n
