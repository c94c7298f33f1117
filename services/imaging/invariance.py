"""Making a UNet give a row the same bits whatever batch it is in.

A request must give the same bits alone and in a batch with others. Measured on a CPU (torch 2.14, oneDNN and MKL,
float32): of a UNet's operations only two depend on the number of rows. A pointwise convolution picks another
order of addition; as a product over channels-last pixels it does not. And a linear layer on vectors (time and
class embeddings) is a matrix-vector product below four rows; padded to four it is not. With both replaced, and
the rows padded to a power of two from 2, all batch sizes agree bit for bit, and so do all positions.

That is a fact about one machine's libraries, so it is checked when the service warms up (`rows_agree`); where
it fails, on another CPU or on a GPU, the denoiser falls back to one size of batch, or to one image at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# Under so many rows MKL multiplies a matrix by vectors, with other roundings.
MIN_VECTOR_ROWS = 4

# A convolution of one sample takes another algorithm than one of two.
MIN_ROWS = 2


class RowwiseLinear(nn.Linear):
    """A linear layer whose result for a vector does not depend on how many vectors there are."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply at least `MIN_VECTOR_ROWS` rows."""
        if input.ndim != 2 or len(input) >= MIN_VECTOR_ROWS:
            return functional.linear(input, self.weight, self.bias)
        padded = functional.pad(input, (0, 0, 0, MIN_VECTOR_ROWS - len(input)))
        return functional.linear(padded, self.weight, self.bias)[: len(input)]


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution as a product over channels-last pixels."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply every pixel's channels by the same matrix."""
        pixels = functional.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias)
        return pixels.permute(0, 3, 1, 2)


def make_rowwise(model: nn.Module) -> nn.Module:
    """Replace, in place, the layers whose result depends on the batch; parameters stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowwiseLinear
        elif (
            type(module) is nn.Conv2d and module.kernel_size == module.stride == (1, 1) and module.groups == 1
        ):
            module.__class__ = PointwiseConv2d
    return model.to(memory_format=torch.channels_last)


def bucket(rows: int) -> int:
    """Return the number of rows that `rows` are padded to: a power of two, at least `MIN_ROWS`."""
    return max(MIN_ROWS, 1 << (rows - 1).bit_length())


def rows_agree(run: Callable[[Sequence[int]], Float[Tensor, "rows ..."]], largest: int) -> bool:
    """Tell whether every batch size up to `largest` rows gives every row the same bits, wherever it stands.

    Parameters
    ----------
    run : callable
        From the numbers of the rows that are wanted, 0 to `largest` - 1, to their results.
    largest : int
        A power of two.
    """
    reference = run(range(largest))
    size = largest // 2
    while size >= MIN_ROWS:
        # From the middle, so that position is tested together with size.
        chosen = [(i + size // 2) % largest for i in range(size)]
        if not torch.equal(run(chosen), reference[chosen]):
            return False
        size //= 2
    backwards = list(reversed(range(largest)))
    return torch.equal(run(backwards), reference[backwards])
