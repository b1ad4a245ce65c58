"""Sparsity Table 7, MoE-2BA400M. Its code differs from the paper: --normalize_gates=false --average_shared. Norm eps:
the code's."""

from config.sparsity_length import *

n_embd, n_hidden, n_head = 768, 1536, 12  # n_hidden is an expert's width
n_expert, n_expert_active, n_expert_shared = 32, 4, 1
norm_eps = 1e-5
