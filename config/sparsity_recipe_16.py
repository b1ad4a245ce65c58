"""Sparsity Table 8 and Figure 1, the dense model of 16 layers that the recipe starts from, 10B tokens.
FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

max_iters = steps(10e9, 256, block_size)
