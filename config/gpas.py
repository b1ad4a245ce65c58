"""What the runs of GPAS Table 1 share. The paper states Adam, the learning rate, warm-up, steps and batch; its code the
rest: length 256, Adam's default betas, no weight decay, no clipping, a decay to 10 %, an untied head.

Data: C4 with T5's tokenizer (32,000 pieces, which tiktoken cannot read). As in the code, and in LNS's, a row is one
document, cut after 256 tokens or padded without loss. Table 1 counts no padding: the 13.1B positions of the 1B run are
its 10B tokens. Weights and Adam's moments are bfloat16, gates too: the scripts say --dtype bfloat16, the code casts the
model, and section 5.1 explains by it that gates stop moving. Float32 gates: --float32_gates; float32 weights with
autocast: --dtype=bfloat16. The gates are not clipped, but for Sandwich-LN at 1B: --gate_clip=0.01.
The LNS rows of Table 2 have learned gains that start at 1/sqrt(l): --norm=lns --s_position=gain, and so gpas_lns.
"""

dataset = "c4"
rows = "documents"
vocab_size = 32000
block_size = 256
batch_size = 16  # x 32 = 512 sequences
gradient_accumulation_steps = 32
dtype = "bfloat16_pure"
beta1, beta2 = 0.9, 0.999
weight_decay = 0.0  # without it AdamW is Adam
grad_clip = 0.0
eval_interval = 1000
eval_iters = 3200  # of 16 x 256 positions, of which 76 % are text: the 10M tokens of Table 1
log_interval = 50
