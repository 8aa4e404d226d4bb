"""Run with TRITON_INTERPRET=1: fails unless `philox` gives the bits of `tl.randint4x`."""

import torch
import triton
import triton.language as tl

from fastcifar.augment.random import philox

KEY = 5 << 32 | 42


@triton.jit
def kernel(offsets, out, key, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(key, tl.load(offsets + i))
    tl.store(out + 4 * i, a)
    tl.store(out + 4 * i + 1, b)
    tl.store(out + 4 * i + 2, c)
    tl.store(out + 4 * i + 3, d)


offsets = torch.arange(64) * 977 + (torch.arange(64) % 3 << 32)
out = torch.zeros(64, 4, dtype=torch.int32)
kernel[(1,)](offsets, out, KEY, BLOCK=64)
assert torch.equal(out.long() & 0xFFFFFFFF, philox(KEY, offsets))
