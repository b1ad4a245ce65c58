"""What the runs of GPAS Table 1 share. Data: C4 with T5's tokenizer (32,000 pieces, which tiktoken cannot read);
offline stand-in: --dataset=stdlib --vocab_size=0, bytes. Length 256, the optimizer, the decay to 10 % and the untied
head are from its code. The gates are not clipped, but for Sandwich-LN at 1B: --gate_clip=0.01.
Its LNS rows (Table 2) have learned gains that start at 1/sqrt(l): --norm=lns --s_position=gain, and so gpas_lns."""

dataset = "c4"
vocab_size = 32000
block_size = 256
batch_size = 16  # x 32 = 512 sequences
gradient_accumulation_steps = 32
beta1, beta2 = 0.9, 0.999  # Adam
weight_decay = 0.0
grad_clip = 0.0
eval_interval = 1000
eval_iters = 2440  # of 16 x 256 tokens: 10M
log_interval = 50
