"""LNS section 5.1, LLaMA 350M: the shape and schedule of GPAS's 350M, --norm=lns against --norm=pre, an embedding of
std 0.02 (its code). C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.gpas_350m import *

norm, embed_std = "lns", 0.02
learning_rate, min_lr = 1e-3, 1e-4  # GPAS: half of it
