"""Sparsity Table 6, L = 12 (900M), 10B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer = 12
max_iters = steps(10e9, 256, block_size)
