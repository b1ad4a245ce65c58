"""Sparsity Table 7, Dense-1B, the partner of MoE-7BA1B, 5B tokens. FineWeb-Edu with GPT-NeoX's tokenizer; offline:
--dataset=stdlib --vocab_size=0."""

from config.sparsity import *

block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5e9, 256, block_size)
