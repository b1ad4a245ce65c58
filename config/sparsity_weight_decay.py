"""Sparsity appendix C.2, 5B tokens: the sweep is --weight_decay=0, 0.01, 0.1, 1 and 3. FineWeb-Edu with GPT-NeoX's
tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

gradient_accumulation_steps = 16  # 128 sequences
max_iters = steps(5e9, 128, block_size)
