"""The papers' models and schedules. `python train.py` and one of these lines trains a row of a paper:

    config/gpas_130m.py --norm=gpas_pre                       GPAS Table 1, any placement; also gpas_71m, gpas_250m,
                                                              gpas_350m, gpas_1b. For LNS: --norm=lns --s_position=gain
    config/gpas_7b.py                                         GPAS appendix A; the baseline: --norm=pre --gate_clip=0
    config/gpas_sft.py --init_from=out-gpas_pre               GPAS section 4.1, fine-tuning

    config/gpas_130m.py config/lns.py                         LNS section 5.1; also gpas_250m; Pre-LN: --norm=pre
    config/gpas_350m.py config/lns.py --learning_rate=1e-3    its paper's rate (GPAS, and LNS's code: 5e-4)
    config/gpas_1b.py config/lns.py --warmup_iters=1000       the warm-up of LNS's code (GPAS: 10,000)
    config/gpas_1b.py config/lns.py --max_iters=762940        LNS Table 4, 1B: 100B tokens planned, stopped early
    config/gpas_7b.py config/lns.py --max_iters=190735        LNS Table 4, 7B: the same; only the length is stated
    config/lns_qwen_500m.py                                   LNS section 5.3.2; Pre-LN: --norm=pre
    config/gpas_sft.py --init_from=out-lns                    LNS section 5.2 has these data, and no numbers

    config/peri_400m.py --seed=1                              Peri-LN Table 4, five seeds, any placement
    config/peri_1500m.py                                      also peri_3200m
    config/peri_400m.py --init_variance=2                     Table 9, the initialization; also 10, 1, 0.1
    config/peri_400m.py --init=xavier                         Table 8
    config/peri_400m.py --weight_decay=0.0033                 Table 7; also 0, 0.33
    config/peri_1500m.py --qk_norm=head --qk_norm_type=layernorm                     Table 6
    config/peri_sft.py --init_from=out-peri                   appendix D.2, fine-tuning

    config/sparsity_depth.py --n_layer=12                     Sparsity Table 6: 900M; also 16 (1.2B), 24 (1.7B)
    config/sparsity_depth.py --n_layer=32 --learning_rate=8e-4                       2.3B
    config/sparsity_weight_decay.py --weight_decay=0.01       appendix C.2; also 0, 0.1, 1, 3
    config/sparsity_length.py --block_size=4096               appendix C.3; also 256, 512, 1024, 2048, 8192
    config/sparsity_gqa.py                                    appendix C.4: G = 1, and Table 7's Dense-1B
    config/sparsity_gqa.py --n_kv_head=4 --max_tokens=5.35e9                         G = 4
    config/sparsity_gqa.py --n_kv_head=1 --max_tokens=5.6e9                          G = 16
    config/sparsity_dense_400m.py                             Table 7; its other rows: sparsity_moe_2b, sparsity_moe_7b
    config/sparsity_recipe.py                                 Table 8 and Figure 1: 32 layers; with experts:
    config/sparsity_recipe_moe.py                             (16 layers: sparsity_depth.py)
    config/sparsity_blocks.py --n_layer=32                    appendix A.2; also 16

gpas.py, peri.py and sparsity.py hold what the runs of a paper share, and say which numbers are the paper's, which are
from its published code, and which are inferred. More settings change any run, and --dry_run prints its size, tokens,
FLOPs and memory; runs of one placement need an --out_dir each. The length of a run is max_iters in steps, epochs of
its data, or max_tokens in tokens, padding too; where several are given, the first of these counts. A batch is
batch_size x gradient_accumulation_steps sequences, whatever the number of processes: where it does not fit in memory,
divide the first and multiply the second by the same number. LNS's runs of OLMo have no preset: neither their shapes nor
their schedules are in the paper.

The papers' data and tokenizers are downloads; `dataset` is the name under which prepare_data.py writes them, from its
download or from local text. Offline, --dataset=stdlib --vocab_size=0 trains the same model on bytes (GPAS's and LNS's
with --rows=windows, since the beginnings of some 600 files are few): a stand-in for trying a preset and for comparing
placements, whose losses are not the paper's (bits per byte compare across tokenizers).
"""
