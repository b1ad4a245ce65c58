"""Sparsity Table 7, MoE-7BA1B. The paper contradicts itself: the experts' width of 2048 in its table, and in its code,
gives 13.3B parameters, 2.0B of them active; 1024 gives 6.8B and 1.18B, which are its name and text. 1024 here. Its code
differs from the paper: --normalize_gates=false. Norm eps: the code's. Beyond one GPU's memory: torchrun
--nproc_per_node=8."""

from config.sparsity_length import *

n_hidden = 1024  # an expert's width
n_expert, n_expert_active = 64, 8
learning_rate = 4e-4
norm_eps = 1e-5
shard = True
