"""The order of clips in training."""

import itertools
import random
from collections.abc import Sequence

from ...errors import DCMError


class BatchOrder:
    """The clips of each batch. They depend on its number alone, so resuming needs no stored state.

    Every epoch uses every clip, in its own order. A batch has clips of one bucket; what is left of all buckets shares
    batches. Only the last of these is filled up, with clips of the largest bucket first. `len` is the number of batches in
    an epoch.

    Args:
        buckets: groups of indices of the same shape.

    Raises:
        DCMError: the batch size is below 1, or there are no clips.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int):
        if batch_size < 1:
            raise DCMError(f"batch_size is {batch_size}; expected 1 or more.")
        self._buckets = [list(bucket) for bucket in buckets if bucket]
        if not self._buckets:
            raise DCMError("There are no clips to train on. Add clips, or hold out fewer.")
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._batches = -1, []

    def __len__(self) -> int:
        return -(-sum(map(len, self._buckets)) // self._batch_size)

    def batch(self, number: int) -> list[int]:
        """The clips of a batch, counted from 0."""
        epoch, place = divmod(number, len(self))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        # a string as seed gives the same numbers on every machine
        generator = random.Random(f"epoch {self._seed} {epoch}")
        orders = [generator.sample(bucket, len(bucket)) for bucket in self._buckets]
        size = self._batch_size
        ends = [len(order) - len(order) % size for order in orders]
        batches = [
            order[start : start + size]
            for order, end in zip(orders, ends, strict=True)
            for start in range(0, end, size)
        ]
        left = [index for order, end in zip(orders, ends, strict=True) for index in order[end:]]
        largest_first = itertools.chain.from_iterable(sorted(orders, key=len, reverse=True))
        left += itertools.islice(itertools.cycle(largest_first), -len(left) % size)
        batches += (left[start : start + size] for start in range(0, len(left), size))
        generator.shuffle(batches)
        return batches
