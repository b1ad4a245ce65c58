"""What the runs of GPAS Table 1 share. The paper states the learning rate, warm-up, steps and batch; its code the rest:
length 256, Adam with its default betas, no weight decay, no clipping, a decay to 10 %, an untied head.

Data: C4 with T5's tokenizer (32,000 pieces, which tiktoken cannot read). The code takes the first 256 tokens of each
document and pads shorter ones, without loss; Table 1 counts tokens without padding, so that the 13.1B positions of the
1B run are its 10B tokens. Here every position is text. The code's weights are bfloat16 (here: float32, with bfloat16
autocast). The gates are not clipped, but for Sandwich-LN at 1B: --gate_clip=0.01.
The LNS rows of Table 2 have learned gains that start at 1/sqrt(l): --norm=lns --s_position=gain, and so gpas_lns.
"""

dataset = "c4"
vocab_size = 32000
block_size = 256
batch_size = 16  # x 32 = 512 sequences
gradient_accumulation_steps = 32
beta1, beta2 = 0.9, 0.999
weight_decay = 0.0
grad_clip = 0.0
eval_interval = 1000
eval_iters = 2440  # of 16 x 256 tokens: 10M
log_interval = 50
