"""LNS section 5.3.2, Qwen2.5-0.5B on 6B tokens. The shape is that of the released model (its config.json), the
tokenizer Qwen's (--tokenizer=PATH/tokenizer.json of the release). Data, batch and schedule are not stated: here they
are those of LNS's 1B, but for the rows, which are windows: so that the 6B tokens are text."""

from config.gpas import *
from config.lns import *

n_layer, n_embd, n_hidden, n_head, n_kv_head = 24, 896, 4864, 14, 2
vocab_size, tie_embeddings, qkv_bias, rope_theta = 151_936, True, True, 1e6
learning_rate, warmup_iters = 5e-4, 1000
rows, max_tokens = "windows", 6_000_000_000
