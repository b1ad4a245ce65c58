"""Sparsity Table 8 and Figure 1: 32 layers of about the size of sparsity_depth.py's 16, with what made them effective:
T = 4096, weight decay 0.3 and G = 2. The steps to it:

    --n_kv_head=16 --weight_decay=0.1 --block_size=1024    more depth alone
    --n_kv_head=16 --weight_decay=0.1                      T = 4096; also --block_size=8192
    --n_kv_head=16                                         weight decay 0.3; also --weight_decay=0.6, 1.0

--batch_size and --gradient_accumulation_steps for a length: see sparsity_length.py.
"""

from config.sparsity import *

n_layer, n_embd, n_hidden, n_head = 32, 1536, 6144, 16
n_kv_head = 8
weight_decay = 0.3
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_tokens = 10_000_000_000
