"""Optimizer state in 8 bits: a code book, and the largest magnitude of each block (bitsandbytes' blockwise format)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256


def dequantize(codes: Tensor, absmax: Tensor, book: Tensor) -> Tensor:
    """The numbers [k] float32 that codes [k] uint8 stand for.

    Args:
        codes: positions in the book.
        absmax: [ceil(k / 256)] unit of each block.
        book: [256] ascending, in [-1, 1].
    """
    units = absmax.repeat_interleave(BLOCK)[: codes.numel()].to(codes.device)
    return book.to(codes.device)[codes.int()] * units


def quantize(numbers: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [k] uint8 and units [ceil(k / 256)] of the numbers [k]: each becomes the nearest of the book.

    With a book that has no negative numbers (that of second moments) a positive number never becomes zero, which an
    optimizer would divide by.
    """
    book = book.to(numbers.device)
    k = numbers.numel()
    blocks = torch.nn.functional.pad(numbers.float(), (0, -k % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)[:k].contiguous()
    codes = torch.bucketize(scaled, (book[1:] + book[:-1]) / 2)
    if bool(book[0] >= 0):
        smallest = int((book <= 0).sum())
        codes = torch.where((numbers > 0) & (codes < smallest), smallest, codes)
    return codes.to(torch.uint8), absmax
