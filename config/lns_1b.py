"""LNS section 5.1, LLaMA 1B: the shape and schedule of GPAS's 1B, --norm=lns against --norm=pre, an embedding of
std 0.02 (its code). C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.gpas_1b import *

norm, embed_std = "lns", 0.02
