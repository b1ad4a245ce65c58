"""Sparsity appendix C.4, 4 key/value heads (G = 4, 1.076B), T = 4096, 5.35B tokens. FineWeb-Edu with
GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_kv_head = 4
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5.35e9, 256, block_size)
