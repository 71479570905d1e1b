"""What turns the recipe into a model that Hugging Face's gemma3_text expresses; it comes after recipe.py:

    python train.py config/s.py config/recipe.py config/gemma3.py --ffn_dim=2048

ffn_dim: 8/3 of the width, so that SwiGLU's three matrices have the parameters of two of 4 x the width. Of the recipe it
keeps logit_softcap, which qwen3 lacks. As in qwen3 the norm of the embeddings goes into their table, qk_norm into the
weights of the q and k norms.
"""
act = "swiglu"               # Gemma 3 is gated with gelu; transformers reads silu too, llama.cpp does not
smear = False                # it has neither this nor the next two
embed_skip = False
value_embeddings = False
post_norm = 0.3              # the start of its norms' weights; from 0 a block's matrices had no gradient at first
