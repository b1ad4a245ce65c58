"""LNS section 5.1, over one of GPAS's models, whose shapes, batch and number of steps LNS's code has too:
`python train.py config/gpas_130m.py config/lns.py`. The embedding's standard deviation is from that code. Where it
differs from GPAS or from LNS's paper, in a learning rate and a warm-up, config/__init__.py has the flags."""

norm = "lns"
embed_std = 0.02
gate_clip = 0.0  # gpas_7b.py clips gates, and lns has none
