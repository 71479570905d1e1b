"""m with grouped-query attention and a larger dense FFN: the partner of wide_m."""
n_layer = 24                # the paper's depth at this size
n_embd = 1024               # and its width
n_head = 16                 # heads of 64
block_size = 1024           # the paper's context
vocab_size = 32000          # LLaMA's, so that a dry run needs no data
n_kv_head = 4               # fewer keys and values: a smaller cache in decoding
ffn_dim = 4864              # more than 4 x 1024: it takes the parameters that attention saves

dataset = "refinedweb"      # the paper's data: filtered web text
tokenizer = "llama"         # the paper's, so that losses compare
max_tokens = 6.7e9          # as m
batch_size = 512            # 524 288 tokens a step, at every size
micro_batch_size = 32       # changes memory and speed, not the result

lr = 3e-4                   # as m
