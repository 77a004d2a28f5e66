"""An array that counts its reads."""

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
