"""Sparsity appendix A.2: the variance of the attention's and the MLP's outputs, --n_layer=16 and 32; "1500+ steps" at a
learning rate that is printed as 1 x 10^3. The MLP's width is the paper's; its code halves it: --n_hidden=2304. Norm
eps: the code's."""

from config.sparsity_length import *

n_embd, n_hidden, n_head = 1536, 4608, 12
norm_eps = 1e-5
max_iters, max_tokens = 1500, None
