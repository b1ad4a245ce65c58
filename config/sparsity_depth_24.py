"""Sparsity Table 6, L = 24 (1.7B), 10B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer = 24
max_iters = steps(10e9, 256, block_size)
