"""The papers' models and schedules: `python train.py config/gpas_130m.py --norm=gpas_pre`.

    gpas_*      GPAS Table 1 and appendix: 71M to 7B          gpas_sft    its fine-tuning
    lns_*       LNS sections 5.1 and 5.3.2: 130M to 1B, Qwen  peri_sft    Peri-LN's fine-tuning
    peri_*      Peri-LN Tables 2-4: 400M, 1.5B, 3.2B
    sparsity_*  Sparsity Tables 6-8: depth, weight decay, length, GQA, MoE, and the recipe for 32 layers

A file is some lines over the one that its paper shares (gpas.py, peri.py, sparsity.py); --name=value changes any of
them, and --dry_run prints what the run would take. A batch is batch_size x gradient_accumulation_steps sequences
whatever the number of processes; what does not fit in memory takes a smaller batch_size and more micro-steps.
LNS's runs of OLMo have no preset: neither their shapes nor their schedules are in the paper.

The papers' data and tokenizers are downloads. Each preset names them, and `dataset` is the name under which
prepare_data.py would write them from local text. Offline, --dataset=stdlib --vocab_size=0 trains the same model on
bytes: a stand-in for trying a preset and for comparing placements, whose losses are not the paper's (bits per byte
compare across tokenizers).
"""
