"""Sparsity Table 7, Dense-400M, the partner of MoE-2BA400M, 5B tokens. FineWeb-Edu with GPT-NeoX's tokenizer; offline:
--dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer, n_embd, n_hidden, n_head = 16, 1536, 3072, 12
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5e9, 256, block_size)
