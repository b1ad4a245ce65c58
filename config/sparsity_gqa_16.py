"""Sparsity appendix C.4, 16 key/value heads (G = 1, 1.176B), T = 4096, 5B tokens. FineWeb-Edu with
GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_kv_head = 16
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5e9, 256, block_size)
