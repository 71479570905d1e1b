"""l wide and structured: half the attention, a larger FFN of rank 768, trained on the FLOPs of gqa_l."""
n_layer = 24                # the paper's depth at this size
n_embd = 1536               # and its width
n_head = 12                 # heads of 64
block_size = 1024           # the paper's context
vocab_size = 32000          # LLaMA's, so that a dry run needs no data
n_kv_head = 4               # fewer keys and values: a smaller cache in decoding
attn_dim = 768              # half of 1536: narrow attention, wide FFN
ffn_dim = 7424              # as gqa_l
ffn = "lowrank"             # factors make the wide FFN affordable
rank = 768                  # half of 1536

dataset = "refinedweb"      # the paper's data: filtered web text
tokenizer = "llama"         # the paper's, so that losses compare
max_tokens = 23.36e9        # more than gqa_l sees: equal training FLOPs
batch_size = 512            # 524 288 tokens a step, at every size
micro_batch_size = 16       # changes memory and speed, not the result

lr = 2.5e-4                 # as gqa_l
