"""Sparsity appendix C.1 (Table 6): depth, --n_layer=12, 16, 24, or 32 with --learning_rate=8e-4. The one of 16 layers
is also where the recipe of Table 8 and Figure 1 starts."""

from config.sparsity import *

max_tokens = 10_000_000_000
