"""GPAS Table 1, 130M. C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 12, 768, 2048, 12
learning_rate, min_lr = 1e-3, 1e-4
warmup_iters, max_iters = 2000, 20_000
