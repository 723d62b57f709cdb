"""The best balanced assignment, found by trying all there are, and by scipy's solver."""

from itertools import product

import numpy as np
from scipy.optimize import linear_sum_assignment


def best_of_all(scores):
    """Try every assignment whose loads differ by one at most."""
    m, e = scores.shape
    allowed = [a for a in product(range(e), repeat=m) if np.ptp(np.bincount(a, minlength=e)) <= 1]
    return max(allowed, key=lambda assigned: sum(scores[t, x] for t, x in enumerate(assigned)))


def by_scipy(scores):
    """Seats as columns; where tokens do not divide, each expert has one seat more, which a row of zeros may fill."""
    m, e = scores.shape
    each, more = divmod(m, e)
    seats = np.repeat(np.arange(e), each)
    if more:
        seats = np.concatenate([seats, np.arange(e)])
        nobody = np.concatenate([np.full((e - more, each * e), -1e9), np.zeros((e - more, e))], axis=1)
        table = np.concatenate([scores[:, seats], nobody])
    else:
        table = scores[:, seats]
    return seats[linear_sum_assignment(table, maximize=True)[1][:m]]
