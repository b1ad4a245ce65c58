"""What Peri-LN's runs share (Tables 2 and 3). Data: 30B tokens of DCLM with cl100k_base (prepare_data.py has it, once
downloaded); offline stand-in: --dataset=stdlib --vocab_size=0, bytes. The MLP's width is not stated: 4 n_embd gives the
stated sizes. Five seeds: --seed. The rates: 2e-3 for Pre-LN and Peri-LN, lower for Post-LN. Not stated: where the decay
ends (10 % here), betas and clipping (Megatron-LM's defaults here), and whether the initialization sweep of section 6.2
(--init_variance=10, 2, 1, 0.1) draws the embedding too (embed_std says so here). Its QK-norm row has LayerNorm on
queries and keys only; --qk_norm=head takes the model's norm_type."""

dataset = "dclm"
norm = "peri"
vocab_size = 100352  # cl100k_base's 100,277, rounded up to a multiple of 128
block_size = 8192
rope_theta = 500_000.0  # Llama 3's
batch_size, gradient_accumulation_steps = 1, 256
max_iters, warmup_iters = 14_400, 1440
learning_rate, min_lr = 2e-3, 2e-4
beta1, beta2, weight_decay, grad_clip = 0.9, 0.999, 0.033, 1.0
init_std = embed_std = 0.02
eval_interval = 480
eval_iters = 50
recompute = True
