"""Everything that a machine with an accelerator can say, in a few minutes: what it reaches, the
4-bit products, training steps, generation. `python -m lorax.bench gpu`.

`schedule` starts a process that measures (`worker`) what `measurements` lists, and ends it when it
hangs; `tables` relates the numbers to each other.
"""
