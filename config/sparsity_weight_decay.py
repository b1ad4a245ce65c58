"""Sparsity appendix C.2: --weight_decay=0, 0.01, 0.1, 1 or 3, in batches of 128."""

from config.sparsity import *

gradient_accumulation_steps = 16
max_tokens = 5_000_000_000
