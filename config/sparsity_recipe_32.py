"""Sparsity Table 8 and Figure 1, 32 layers of about the same size with the recipe that made them effective: T = 4096,
weight decay 0.3, G = 2; 10B tokens. Its steps: T = 1024 (the naive model, --weight_decay=0.1 --n_kv_head=16), 4096,
8192; then weight decay 0.3, 0.6, 1.0; then G = 2; then MoE (sparsity_recipe_moe.py). Another T takes its max_iters
with it: tokens / (256 T). FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.sparsity import *

n_layer, n_embd, n_hidden, n_head = 32, 1536, 6144, 16
n_kv_head = 8
weight_decay = 0.3
block_size = 4096
batch_size, gradient_accumulation_steps = 2, 128
max_iters = steps(10e9, 256, block_size)
