"""Sparsity Table 6, L = 32 (2.3B), 10B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer = 32
max_iters = steps(10e9, 256, block_size)
learning_rate, min_lr = 8e-4, 8e-5
