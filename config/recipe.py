"""The recommended recipe, on top of a size:  python train.py config/s.py config/recipe.py

No stock architecture has all of its parts.
"""
norm = "rmsnorm"
act = "relu2"                # two matrices, where SwiGLU has three
bias = False
tie_embeddings = False       # embeddings and head want rates that differ 40-fold
qk_norm = 1.2                # bounds the attention scores at large rates; above 1, so that attention can be sharp
rope_theta = 100_000
embed_norm = True            # the size of an embedding then does not matter, only its direction
smear = True                 # bigrams from the first layer on; 0.01 nats at 60M tokens
embed_skip = True            # 16 numbers in 8 layers; without them 0.03 nats behind at half of a run of 60M tokens
value_embeddings = True      # n_layer / 2 further tables and hardly a FLOP; without them 0.09 nats behind at a third
logit_softcap = 15           # keeps the head from growing sure too early; without it 0.018 nats behind at 60M tokens
init = "zero"                # attention and FFN add nothing at first, whatever the depth

optimizer = "muon"           # not measured apart from the parts above (docs/experiments.md)
lr = "auto"                  # and all other rates: muon_rates in config/__init__.py
weight_decay = "auto"
grad_clip = 0                # the size of an orthogonalised step does not depend on the gradient's
schedule = "linear"
decay_ratio = 0.65           # the first third at full rate, then a linear fall
min_lr_ratio = 0             # to 0
warmup_ratio = 0
warmup_steps = 40            # Muon needs none; AdamW's second moments do
