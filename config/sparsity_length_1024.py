"""Sparsity appendix C.3, T = 1024, 5B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

block_size = 1024
batch_size, gradient_accumulation_steps = 8, 32
max_iters = steps(5e9, 256, block_size)
