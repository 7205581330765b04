import numpy as np
import pytest

from cifar_accel.data.order import Order, permutation, plan, random_bits, stratified_subset, uniform


def test_the_order_never_changes_between_versions():
    """Checkpoints of a released version go on with the same samples: these values are for ever."""
    assert permutation(3407, 0, 50_000)[:6].tolist() == GOLDEN_ORDER
    assert int(random_bits(1, "hflip", 2, 3)[0]) == GOLDEN_BITS


GOLDEN_ORDER = [26904, 45197, 999, 761, 14726, 23878]
GOLDEN_BITS = 1112339080716505948


def test_permutations():
    a, b = permutation(1, 0, 1000), permutation(1, 1, 1000)
    assert sorted(a) == list(range(1000)) and a.tolist() != b.tolist()
    assert permutation(2, 0, 1000).tolist() != a.tolist()


def test_uniform_numbers_are_uniform_and_independent():
    u = uniform(7, "hflip", np.arange(200)[:, None], np.arange(500))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.size) ** 0.5
    counts = np.histogram(u, 64, (0, 1))[0]
    assert ((counts - u.size / 64) ** 2 / (u.size / 64)).sum() < 63 + 5 * (
        2 * 63
    ) ** 0.5  # chi-square, 5 sigma
    v = uniform(7, "vflip", np.arange(200)[:, None], np.arange(500))
    for other in (v, np.roll(u, 1, 0), np.roll(u, 1, 1)):
        assert abs(np.corrcoef(u.ravel(), other.ravel())[0, 1]) < 5 / u.size**0.5


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24, 48])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_each_global_batch_is_cut_exactly_once(world, accumulation):
    orders = [Order(5, 1000, 192, world, rank, accumulation) for rank in range(world)]
    taken = np.concatenate([o.positions(m) for m in range(accumulation) for o in orders])
    assert taken.tolist() == list(range(192))


@pytest.mark.parametrize(
    "batch, world, accumulation",
    [(12, 1, 1), (12, 2, 1), (12, 2, 2), (12, 4, 3), (9, 3, 1), (5, 1, 1)],
)
def test_partners_are_the_same_however_the_batch_is_cut(batch, world, accumulation):
    def pairs(world, accumulation):
        found = {}
        for rank in range(world):
            for rows in plan(Order(3, 50, batch, world, rank, accumulation), 2, 4, mixing=True):
                own = rows.samples[: len(rows.partners)]
                found |= {
                    (rows.step, int(a)): int(b)
                    for a, b in zip(own, rows.samples[rows.partners], strict=True)
                }
        return found

    assert pairs(world, accumulation) == pairs(1, 1)
    assert len(pairs(1, 1)) == 2 * batch
    assert all(
        pairs(1, 1)[step, b] == a for (step, a), b in pairs(1, 1).items()
    )  # partners mix with each other


def test_the_last_incomplete_batch_is_dropped_and_every_epoch_reshuffled():
    rows = list(plan(Order(3, 103, 10), 0, 20, mixing=False))
    first, second = (np.concatenate([r.samples for r in rows if r.epoch == e]) for e in (0, 1))
    assert len(set(first)) == len(set(second)) == 100
    assert set(first) != set(second)


def test_a_plan_from_the_middle_is_the_rest_of_the_plan():
    order = Order(3, 103, 10, 2, 1, 1)
    whole, rest = (list(plan(order, start, 25, mixing=True)) for start in (0, 13))
    for a, b in zip(whole[13:], rest, strict=True):
        assert (a.step, a.epoch, a.samples.tolist()) == (b.step, b.epoch, b.samples.tolist())


def test_mixing_follows_its_probability_and_distribution():
    order = Order(11, 1000, 10)
    drawn = [order.mix(step, 0.8, 0.0, 0.7) for step in range(4000)]
    lam = np.array([m.lam for m in drawn if m.lam < 1])
    assert abs(len(lam) / 4000 - 0.7) < 4 * (0.21 / 4000) ** 0.5
    assert abs(lam.mean() - 0.5) < 4 * lam.std() / len(lam) ** 0.5
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # the variance of Beta(a, a)
    both = [order.mix(step, 0.8, 1.0, 1.0) for step in range(2000)]
    assert abs(sum(m.centre is not None for m in both) / 2000 - 0.5) < 0.05
    assert order.mix(3, 0.0, 0.0, 1.0).lam == 1.0


def test_stratified_subsets():
    labels = np.array([0] * 70 + [1] * 20 + [2] * 10)
    index = stratified_subset(labels, 50, seed=1)
    assert np.bincount(labels[index]).tolist() == [35, 10, 5]
    assert len(set(index)) == 50 and sorted(index) == index.tolist()
    assert np.bincount(labels[stratified_subset(labels, 7, seed=1)]).sum() == 7
    assert stratified_subset(labels, 50, 2).tolist() != index.tolist()
