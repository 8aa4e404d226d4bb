"""Ops with a Triton kernel and a plain torch reference each: the kernel runs on CUDA cards, the reference anywhere."""
