"""Check of whether a tensor's address may be read."""

from torch import Tensor


def has_memory(tensor: Tensor) -> bool:
    """Return False for tensors that stand for others, such as DTensor and FakeTensor.

    Their address means nothing, and a loop that reads it would end the process.
    """
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
