"""GPAS Table 1, 350M. C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.gpas import *

n_layer, n_embd, n_hidden, n_head = 24, 1024, 2736, 16
learning_rate, min_lr = 5e-4, 5e-5
warmup_iters, max_iters = 6000, 60_000
