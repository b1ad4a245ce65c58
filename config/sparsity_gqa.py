"""Sparsity appendix C.4: key/value heads. 16 of them (G = 1, 1.176B) are also Dense-1B of Table 7. Fewer take more
tokens for as many FLOPs: --n_kv_head=4 --max_tokens=5.35e9 (1.076B), --n_kv_head=1 --max_tokens=5.6e9 (1.051B)."""

from config.sparsity_length import *

n_kv_head = 16
