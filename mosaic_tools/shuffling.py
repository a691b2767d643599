# SPDX-License-Identifier: Apache-2.0
"""The order in which rows are read: of any number of them, and of a stream, both resumable.

Both are functions of seed, epoch and place alone, and hold a window of what they order, not all.
"""

import copy
import heapq
from collections.abc import Iterator

import numpy as np
import torch.utils.data

# Rows that stay together until they are in a window, which makes reading from a disk cheaper, and
# the blocks of a window, within which rows take any order.
BLOCK, BLOCKS = 256, 4096
WINDOW = BLOCK * BLOCKS
# Rows of a stream by which its place is remembered.
STRIDE = 1000


class BlockShuffle(torch.utils.data.Sampler):
    """Indices of all rows in another order each epoch: blocks of 256 rows in any order, and in each
    window of at most 4,096 blocks the rows in any order.

    Two rows that were neighbours end up a third of a window apart in the mean, 350,000 rows, and a
    batch of 4,096 holds rows of 2,600 blocks. It holds a window, some 60 MB, and 8 bytes for each
    block; torch's RandomSampler holds 48 bytes for each row, in each process.

    Args:
        rows: how many there are.
        seed: of the order.
        epoch: () int64, the collator's, which is read when an epoch begins.
    """

    def __init__(self, rows: int, seed: int, epoch: torch.Tensor):
        self.rows, self.seed, self.epoch = rows, seed, epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, int(self.epoch)])
        blocks = generator.permutation(-(-self.rows // BLOCK))
        for window in np.array_split(blocks, -(-len(blocks) // BLOCKS)):
            rows = window[:, None] * BLOCK + np.arange(BLOCK)
            # The last block may be short.
            yield from generator.permutation(rows[rows < self.rows]).tolist()


class EndlessStream(torch.utils.data.IterableDataset):
    """Rows of a `datasets` stream, again and again, shuffled; its place is in `state_dict`.

    Each row is put off by up to `buffer` rows, as many as its number in the epoch decides. So
    for each row that is read one is returned, once the first are there, and a stream that is put
    back in its place finds the rows it held by reading them again.

    Args:
        rows: the stream, already split by process. Loader workers share its files: it needs at
            least one for each worker.
        buffer: in rows. Of two that were neighbours the mean distance is a third of it.
        seed: of the order.
    """

    def __init__(self, rows, buffer: int, seed: int):
        self.rows, self.buffer, self.seed = rows, buffer, seed
        self.epoch, self.last = 0, (-1, -1)
        # (rows read of the epoch, the stream's own place there), from the oldest still needed.
        self.places = [(0, None)]

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield from self.one_epoch()
            self.epoch, self.last, self.places = self.epoch + 1, (-1, -1), [(0, None)]

    def one_epoch(self) -> Iterator[dict]:
        # A copy: a stream that was put in its place begins there each time, and its own epoch is
        # shared by the workers, who are not in the same one.
        rows, held = copy.deepcopy(self.rows), []
        number, place = self.places[0]
        if place:
            rows.load_state_dict(copy.deepcopy(place))
        del self.places[1:]
        for row in rows:
            if number % STRIDE == 0:
                delays = self.delays(number // STRIDE)
            due = number + int(delays[number % STRIDE]), number
            # Others were returned before the stream was put back here.
            if due > self.last:
                heapq.heappush(held, (due, row))
            number += 1
            if number % STRIDE == 0:
                self.places.append((number, rows.state_dict()))
            yield from self.returned(held, number)
        if not number:
            raise ValueError("the stream has no rows for this process: give it more files")
        yield from self.returned(held, number + self.buffer)

    def delays(self, stride: int) -> np.ndarray:
        """(STRIDE,) int64: by how many rows those of this stride of the epoch are put off."""
        return np.random.default_rng([self.seed, self.epoch, stride]).integers(
            self.buffer, size=STRIDE
        )

    def returned(self, held: list, number: int) -> Iterator[dict]:
        """Rows that are due when so many are read."""
        while held and held[0][0][0] < number:
            self.last, row = heapq.heappop(held)
            # Of what is still held none was read before that many rows.
            read = self.last[0] - self.buffer + 1
            while len(self.places) > 1 and self.places[1][0] <= read:
                del self.places[0]
            yield row | {"epoch": self.epoch}

    def order(self) -> str:
        """What decides it, in words."""
        return f"--shuffle_buffer {self.buffer} --seed {self.seed}"

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "last": self.last, "place": self.places[0]}

    def load_state_dict(self, state: dict):
        self.epoch, self.last, self.places = state["epoch"], state["last"], [state["place"]]
