"""Sparsity Table 7, MoE-2BA400M, 5B tokens. FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib
--vocab_size=0. Its code differs from the paper: --normalize_gates=false --average_shared."""

from config.sparsity import *

n_layer, n_embd, n_hidden, n_head = 16, 768, 1536, 12  # n_hidden is an expert's width
n_expert, n_expert_active, n_expert_shared = 32, 4, 1
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5e9, 256, block_size)
