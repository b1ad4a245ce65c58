"""Sparsity Table 8 and Figure 1, the recipe's last step: 32 layers of experts, G = 2, T = 4096, weight decay 0.3; 10B
tokens. FineWeb-Edu with GPT-NeoX's tokenizer; offline: --dataset=stdlib --vocab_size=0. Beyond one GPU's memory:
torchrun --nproc_per_node=8. Its code differs from the paper: --normalize_gates=false."""

from config.sparsity_recipe_32 import *

n_layer, n_embd, n_hidden, n_head = 32, 1120, 1120, 16  # n_hidden is an expert's width
n_expert, n_expert_active = 64, 8
learning_rate, min_lr = 4e-4, 4e-5
shard = True
