"""Sparsity Table 6, L = 16 (1.2B), 10B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer = 16
max_iters = steps(10e9, 256, block_size)
