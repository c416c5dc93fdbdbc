"""Whether the noise is as random as it claims, on three times 10^9 samples of the op that trains.

`python -m bench.noise_statistics` writes `bench/data/noise_statistics.csv`. Samples come of 16 consecutive seeds at the
same flat indices, the least random choice of seeds that there is. All but one of the statistics are sums over samples,
of a power of z, of whether z lies in a tail, or of a product of two values that have to be independent, less what the
sum should be and in units of its standard deviation: scores, standard normal where the noise is as it should be. The
other is Kolmogorov and Smirnov's, the largest distance of the distribution functions times the root of n, taken at the
edges of bins of 2^-14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness import DATA, columns_of, machine, option_parser, write_rows
from fastpeft.functional import mezo_perturb_

FILE = DATA / "noise_statistics.csv"
FIRST_SEEDS = (0, 1000, 2**40 + 5)
SEEDS = 16  # from each of these on
CHUNK = 2**15  # flat indices at once, of each seed
LARGEST_SCORE = 5.0  # one of 1.7 million normal scores is larger in size
LARGEST_DISTANCE = 2.22  # one of 10,000 is larger
LAGS = (1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 1024)
TAILS = (1, 2, 3, 4, 5)
RANGE, BINS_PER_UNIT = 9, 2**14  # no z is larger in size than 8.33
LANES = 8  # of a counter
MOMENTS = {"gaussian": {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}, "rademacher": {1: (0, 1)}}  # mean, variance


@dataclass(frozen=True)
class Statistic:
    """One statistic, or the worst of several of one kind.

    Attributes:
        noise, first_seed, statistic: of what.
        samples: behind each one.
        worst_of: how many there are.
        score: see the module.
        bound: the largest size that it may have.
    """

    noise: str
    first_seed: int
    statistic: str
    samples: int
    worst_of: int
    score: float
    bound: float = LARGEST_SCORE

    @property
    def holds(self) -> bool:
        return abs(self.score) <= self.bound


def chunks(noise: str, seed: int, length: int) -> Iterator[Tensor]:
    """z of `SEEDS` seeds from `seed` on, at the flat indices below `length`: float32 `(SEEDS, up to CHUNK)`."""
    for start in range(0, length, CHUNK):
        z = torch.zeros(SEEDS, min(CHUNK, length - start))
        for number, row in enumerate(z):
            mezo_perturb_([row], [start], [seed + number], [1.0], noise=noise)
        yield z


def statistics(noise: str, seed: int, length: int) -> list[Statistic]:
    """All statistics of `SEEDS * length` samples; `length` is a multiple of 8, at least 128."""
    n = SEEDS * length
    of = noise, seed
    sums = torch.zeros(len(MOMENTS[noise]), dtype=torch.float64)
    lagged, pairs = torch.zeros(len(LAGS), dtype=torch.float64), torch.zeros(len(LAGS))
    lanes = torch.zeros(2 * LANES, 2 * LANES, dtype=torch.float64)
    seeds = torch.zeros(SEEDS, SEEDS, dtype=torch.float64)
    counts = torch.zeros(2 * RANGE * BINS_PER_UNIT, dtype=torch.int64)
    for single in chunks(noise, seed, length):
        z = single.double()
        flat = z.flatten()
        power = torch.ones_like(flat)
        for place in range(len(sums)):
            power *= flat
            sums[place] += power.sum()
        lagged += torch.stack([flat[lag:] @ flat[:-lag] for lag in LAGS])
        pairs += torch.tensor([flat.numel() - lag for lag in LAGS])
        seeds += z @ z.T
        if noise == "gaussian":
            octets = z.view(-1, LANES)
            features = torch.cat((octets, (octets * octets - 1) / math.sqrt(2)), dim=1)
            lanes += features.T @ features
            counts += torch.bincount(((flat + RANGE) * BINS_PER_UNIT).long(), minlength=counts.numel())

    found = [
        Statistic(*of, f"mean of z^{power}", n, 1, (total - n * mean) / math.sqrt(n * variance))
        for total, (power, (mean, variance)) in zip(sums.tolist(), MOMENTS[noise].items())
    ]
    found.append(_worst(of, f"neighbours, {LAGS[0]} to {LAGS[-1]} apart", n, (lagged / pairs.sqrt()).tolist()))
    upper = torch.triu(torch.ones(SEEDS, SEEDS), diagonal=1).bool()
    found.append(_worst(of, "consecutive seeds", length, (seeds[upper] / math.sqrt(length)).tolist()))
    if noise == "gaussian":
        # a lane and its own square do not correlate, but are not independent, so their product has another variance
        different = [(i, j) for i in range(2 * LANES) for j in range(i) if (i - j) % LANES]
        scores = [lanes[i, j].item() / math.sqrt(n / LANES) for i, j in different]
        found += [_worst(of, "lanes and their squares", n // LANES, scores), *_distribution(of, n, counts)]
    return found


def _distribution(of: tuple[str, int], n: int, counts: Tensor) -> Iterator[Statistic]:
    """Of a histogram of n samples its tails, and how far it is from the normal distribution."""
    edges = torch.arange(1, counts.numel(), dtype=torch.float64) / BINS_PER_UNIT - RANGE
    below = counts.cumsum(0)[:-1].double()
    for tail in TAILS:
        share = torch.special.ndtr(torch.tensor(-tail, dtype=torch.float64)).item()
        at = BINS_PER_UNIT * (RANGE - tail) - 1, BINS_PER_UNIT * (RANGE + tail) - 1  # of -tail and tail in edges
        found = below[at[0]].item(), n - below[at[1]].item()
        scores = [(count - n * share) / math.sqrt(n * share * (1 - share)) for count in found]
        yield _worst(of, f"beyond {tail} on either side", n, scores)
    distance = (below / n - torch.special.ndtr(edges)).abs().max().item()
    yield Statistic(*of, "Kolmogorov-Smirnov", n, 1, distance * math.sqrt(n), LARGEST_DISTANCE)


def _worst(of: tuple[str, int], statistic: str, samples: int, scores: Sequence[float]) -> Statistic:
    return Statistic(*of, statistic, samples, len(scores), max(scores, key=abs))


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10**9, help="of each noise from each first seed")
    parser.add_argument("--seed", nargs="+", type=int, default=FIRST_SEEDS, help="first seeds")
    arguments = parser.parse_args()
    length = -(-arguments.samples // (SEEDS * LANES)) * LANES
    rows = []
    for each in (each for noise in MOMENTS for seed in arguments.seed for each in statistics(noise, seed, length)):
        figures = columns_of(each) | {"score": f"{each.score:.3f}"}
        rows.append({**figures, "holds": "yes" if each.holds else "no", **machine(torch.device("cpu"))})
    write_rows(FILE, rows)


if __name__ == "__main__":
    main()
