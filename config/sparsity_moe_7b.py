"""Sparsity Table 7, MoE-7BA1B, 5B tokens. Its expert width of 2048 gives 13.3B parameters, 2.0B of them active; 1024
gives 6.8B and 1.18B, which is the name: 1024 here. FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib
--vocab_size=0. Beyond one GPU's memory: torchrun --nproc_per_node=8. Its code differs from
the paper: --normalize_gates=false."""

from config.sparsity import *

n_hidden = 1024  # an expert's width
n_expert, n_expert_active = 64, 8
learning_rate, min_lr = 4e-4, 4e-5
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(5e9, 256, block_size)
shard = True
