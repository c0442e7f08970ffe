"""The order of clips: every clip once an epoch, in batches of one size, the same from the step alone."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcm_core.distill.data.order import BatchOrder
from dcm_core.errors import DCMError

buckets = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(
    lambda counts: [[100 * place + i for i in range(count)] for place, count in enumerate(counts)]
)


@given(buckets=buckets, batch_size=st.integers(1, 5), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_epoch_has_every_clip_once_and_fills_up_one_batch_alone(buckets, batch_size, seed, epoch):
    order = BatchOrder(buckets, batch_size, seed)
    batches = [order.batch(number) for number in range(epoch * len(order), (epoch + 1) * len(order))]
    assert all(len(batch) == batch_size for batch in batches)
    seen, clips = Counter(index for batch in batches for index in batch), sum(map(len, buckets))
    assert set(seen) == {index for bucket in buckets for index in bucket}
    assert max(seen.values()) - min(seen.values()) <= 1, "what fills up is spread evenly"
    assert seen.total() - clips == -clips % batch_size, "no more is filled up than the last batch needs"
    mixed = [batch for batch in batches if len({index // 100 for index in batch}) > 1]
    left = sum(len(bucket) % batch_size for bucket in buckets)
    assert len(mixed) <= -(-left // batch_size), "only what is left of the buckets shares batches"


def test_a_small_bucket_is_drawn_as_often_as_a_large_one():
    """One clip of its own size among 15 others, in batches of 8."""
    order = BatchOrder([[0], list(range(100, 115))], 8, 0)
    seen = Counter(index for number in range(10 * len(order)) for index in order.batch(number))
    assert len(order) == 2 and set(seen.values()) == {10}


@given(
    buckets=buckets,
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 3),
    steps=st.lists(st.integers(0, 60), max_size=8),
)
def test_a_batch_depends_on_its_step_alone(buckets, batch_size, seed, steps):
    straight = BatchOrder(buckets, batch_size, seed)
    expected = [straight.batch(step) for step in range(61)]
    order = BatchOrder(buckets, batch_size, seed)
    assert [order.batch(step) for step in steps] == [expected[step] for step in steps]


@given(sizes=st.lists(st.integers(5, 12), min_size=1, max_size=3), batch_size=st.integers(1, 5))
def test_no_batch_holds_a_clip_twice_if_the_largest_bucket_is_large_enough(sizes, batch_size):
    order = BatchOrder([[100 * place + i for i in range(size)] for place, size in enumerate(sizes)], batch_size, 0)
    twice = [number for number in range(len(order)) if len(set(order.batch(number))) < batch_size]
    # the clips that fill up the last batch may be in it already
    assert len(twice) <= 1 and (not twice or sum(sizes) % batch_size)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [BatchOrder([list(range(40))], 4, seed) for seed in (0, 1)]
    epochs = {
        tuple(map(tuple, (order.batch(10 * epoch + step) for step in range(10))))
        for order in orders
        for epoch in range(3)
    }
    assert len(epochs) == 6


def test_the_order_is_the_same_on_every_machine():
    order = BatchOrder([[0, 1, 2, 3, 4], [5, 6]], 2, 7)
    assert [order.batch(number) for number in range(8)] == [
        [0, 4],
        [3, 1],
        [5, 6],
        [1, 2],
        [1, 2],
        [4, 1],
        [0, 3],
        [6, 5],
    ]


def test_where_nothing_is_mixed_the_order_is_that_of_version_0_1_0():
    """Such runs resume bit for bit."""
    single = BatchOrder([[0, 1, 2], [5, 6]], 1, 7)
    assert [single.batch(number) for number in range(10)] == [[5], [2], [6], [0], [1], [0], [6], [1], [5], [2]]
    one_bucket = BatchOrder([[0, 1, 2, 3, 4]], 2, 7)
    assert [one_bucket.batch(number) for number in range(6)] == [[0, 4], [3, 1], [1, 2], [1, 2], [0, 3], [4, 1]]


def test_batches_of_nothing_are_refused():
    with pytest.raises(DCMError, match="batch_size is 0"):
        BatchOrder([[1]], 0, 0)
    with pytest.raises(DCMError, match="no clips to train on"):
        BatchOrder([[]], 1, 0)
