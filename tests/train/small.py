"""The [model] table of recipes in tests: every mechanism, in seconds; a vocab_size is to follow."""

MODEL = """
[model]
preset = "nano"
hidden_size = 64
num_hidden_layers = 3
compress_ratios = [0, 4, 128, 0]
num_attention_heads = 2
o_groups = 2
head_dim = 64
q_lora_rank = 32
o_lora_rank = 32
sliding_window = 16
index_n_heads = 4
index_topk = 8
n_routed_experts = 4
moe_intermediate_size = 32
"""
