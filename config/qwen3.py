"""What turns the recipe into a model that Hugging Face's qwen3 expresses; it comes after recipe.py:

    python train.py config/s.py config/recipe.py config/qwen3.py --ffn_dim=2048

ffn_dim: 8/3 of the width, so that SwiGLU's three matrices have the parameters of two of 4 x the width. In qwen3 the
norm of the embeddings goes into their table, qk_norm into the weights of the q and k norms.
"""
act = "swiglu"               # qwen3's FFN is gated
smear = False                # it has neither this nor the next three
embed_skip = False
value_embeddings = False
logit_softcap = 0
