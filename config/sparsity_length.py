"""Sparsity appendix C.3: the length, in batches of 256 sequences whatever it is. What fits in memory differs:

    --block_size=256     --batch_size=16 --gradient_accumulation_steps=16     (also 512)
    --block_size=1024    --batch_size=8 --gradient_accumulation_steps=32
    --block_size=2048    --batch_size=4 --gradient_accumulation_steps=64
    --block_size=4096
    --block_size=8192    --batch_size=1 --gradient_accumulation_steps=256
"""

from config.sparsity import *

block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_tokens = 5_000_000_000
