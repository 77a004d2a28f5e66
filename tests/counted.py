"""An array that counts its reads."""

import itertools
from collections import Counter

import numpy as np


class Counted:
    """An array that counts how often each pixel is read, and what the largest read was."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.counts, self.largest, self.reads = np.zeros(array.shape, int), 0, 0

    def __getitem__(self, index):
        self.counts[index] += 1
        self.reads += 1
        self.largest = max(self.largest, self.array[index].size)
        return self.array[index]


class Chunked(Counted):
    """An array that says how it is chunked, and counts how often each chunk is decoded."""

    def __init__(self, array, chunks):
        super().__init__(array)
        self.chunks, self.decoded = chunks, Counter()
        lengths = chunks or array.shape
        self.owners = [
            np.repeat(np.arange(len(along)), along) if isinstance(along, tuple) else np.arange(size) // along
            for along, size in zip(lengths, array.shape, strict=True)
        ]

    def __getitem__(self, index):
        touched = [sorted(set(owner[part].tolist())) for owner, part in zip(self.owners, index, strict=True)]
        self.decoded.update(itertools.product(*touched))
        return super().__getitem__(index)
