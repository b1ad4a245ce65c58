"""Sparsity Table 7, Dense-400M, the partner of MoE-2BA400M. The MLP's width is the table's. The code's is
--n_hidden=2304 (mlp_hidden_size 4608, which its SwiGLU halves), which gives the 400M of the name. Norm eps: the
code's."""

from config.sparsity_length import *

n_embd, n_hidden, n_head = 1536, 3072, 12
norm_eps = 1e-5
