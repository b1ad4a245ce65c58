"""What Peri-LN's runs share: the paper's section 4 and Tables 2 and 3.

Data: 30B tokens of DCLM with cl100k_base (prepare_data.py has that tokenizer, once downloaded). The learning rates are
2e-3 for Pre-LN and Peri-LN, lower for Post-LN (Figure 12).
Inferred, since most settings "follow those of the DCLM experiments": AdamW (Table 2 says Adam, with a weight decay),
beta2 0.95, clipping at 1, a decay to 1 % and a z-loss of 1e-4 on the head are those of DCLM's 411m_1x. (Its QK-norm is
an ablation in Peri-LN, so it is off here: Table 6 is --qk_norm=head --qk_norm_type=layernorm.) Another learning rate
needs its own --min_lr. Inferred from the sizes in Table 4: an MLP of 4 n_embd, which gives 403M, 1.61B and 3.36B. Not
stated: whether Tables 8 and 9 draw the embedding otherwise too; here it keeps embed_std.
"""

dataset = "dclm"
norm = "peri"
vocab_size = 100352  # cl100k_base's 100,277, rounded up to a multiple of 128
block_size = 8192
rope_theta = 500_000.0  # Llama 3's
batch_size, gradient_accumulation_steps = 1, 256
max_iters, warmup_iters = 14_400, 1440
learning_rate, min_lr = 2e-3, 2e-5
beta1, beta2, weight_decay, grad_clip = 0.9, 0.95, 0.033, 1.0
head_z_weight = 1e-4
init_std = embed_std = 0.02
eval_interval = 480
eval_iters = 50
recompute = True
