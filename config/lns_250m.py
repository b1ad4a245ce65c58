"""LNS section 5.1, LLaMA 250M: the shape and schedule of GPAS's 250M, --norm=lns against --norm=pre, an embedding of
std 0.02 (its code). C4 with T5's tokenizer; offline: --dataset=stdlib --vocab_size=0."""

from config.gpas_250m import *

norm, embed_std = "lns", 0.02
