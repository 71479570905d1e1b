"""m wide and structured: half the attention, a larger FFN of rank 512, trained on the FLOPs of gqa_m."""
n_layer = 24                # the paper's depth at this size
n_embd = 1024               # and its width
n_head = 8                  # heads of 64
block_size = 1024           # the paper's context
vocab_size = 32000          # LLaMA's, so that a dry run needs no data
n_kv_head = 4               # fewer keys and values: a smaller cache in decoding
attn_dim = 512              # half of 1024: narrow attention, wide FFN
ffn_dim = 4864              # as gqa_m
ffn = "lowrank"             # factors make the wide FFN affordable
rank = 512                  # half of 1024

dataset = "refinedweb"      # the paper's data: filtered web text
tokenizer = "llama"         # the paper's, so that losses compare
max_tokens = 10.58e9        # more than gqa_m sees: equal training FLOPs
batch_size = 512            # 524 288 tokens a step, at every size
micro_batch_size = 32       # changes memory and speed, not the result

lr = 3e-4                   # as gqa_m
