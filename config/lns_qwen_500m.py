"""LNS section 5.3.2, Qwen2.5-0.5B on 6B tokens: --norm=lns against --norm=pre. The shape is that of the released model
(its config.json). Neither data, batch nor schedule are stated: those of LNS's 1B here, with Qwen's tokenizer
(--tokenizer=PATH/tokenizer.json of the release); offline: --dataset=stdlib --vocab_size=0."""

from config.lns_1b import *

n_layer, n_embd, n_hidden, n_head, n_kv_head = 24, 896, 4864, 14, 2
vocab_size, tie_embeddings, qkv_bias, rope_theta = 151_936, True, True, 1e6
max_iters = 6_000_000_000 // (512 * block_size)
