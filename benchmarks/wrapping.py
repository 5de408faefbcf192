"""Ways to wrap a convolution's input around the seam: time of a forward and backward pass, interleaved.

    python -m benchmarks.wrapping [--rounds 5]

Prints each way's median time relative to the first.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor


def circular_pad(x: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.pad(x, [1, 1, 0, 0], mode="circular")


def concatenate(x: Tensor) -> Tensor:
    """What `sscloud.unet` does."""
    return torch.cat([x[..., -1:], x, x[..., :1]], dim=3)


def zero_pad(x: Tensor) -> Tensor:
    """No seam at all: the floor."""
    return F.pad(x, [1, 1, 0, 0])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of every way (default: 5)")
    rounds = parser.parse_args().rounds
    ways = [circular_pad, concatenate, zero_pad]
    times: dict[str, list[float]] = {way.__name__: [] for way in ways}
    x = torch.rand(4, 16, 256, 512).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.rand(16, 16, 3, 3, requires_grad=True)
    for round_number in range(rounds + 1):
        for way in ways:
            started = time.perf_counter()
            F.conv2d(way(x), weight, padding=(1, 0)).sum().backward()
            if round_number:  # the first round warms up
                times[way.__name__].append(time.perf_counter() - started)
    first = statistics.median(times[ways[0].__name__])
    for name, values in times.items():
        print(f"{name:14} {statistics.median(values) * 1000:7.1f} ms   {first / statistics.median(values):.2f}x")


if __name__ == "__main__":
    main()
