"""What does an update amplify? Table 7 of LoRA (arXiv:2106.09685).

    python -m lorax.run --config=configs/lora_table7_amplification.py

||U^T W V||_F for U, V from dW, from W and from a random matrix, at r = 4 and r = 64. Published (q
of layer 48): dW's directions carry 0.32 of W's 61.95 at r = 4, and dW is 21.5 times that; at r = 64
about twice. The factor grows with the learning rate, and experiments/amplification takes table 6's
members at their best rates. This trains two ranks at one rate: 1 min 16 s on two cores.

    --config=configs/lora_table7_amplification.py:stories
    --config=configs/lora_table7_amplification.py:gpt2-medium --config.task.path=ZIP
"""

from lorax.scales import largest_rank, scale


def get_config(arg=None):
    config = scale(arg)
    config.method.targets = ("q", "v")
    config.sweep.rank = (4, largest_rank(arg))
    config.sweep.seed = (0, 1, 2)
    return config
