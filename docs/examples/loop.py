"""Train LoRA with optax alone: a loop of ten lines, without `lorax.run`.

python docs/examples/loop.py
"""

import jax
import jax.numpy as jnp
import optax

import lorax

base = lorax.load("gpt2-nano")
method = lorax.method("lora", rank=8, targets=("q", "v"))
trainable, constants = method.init(jax.random.key(0), base.params)
text = "name = The Red Fox ; food = Thai => The Red Fox serves Thai food."
tokens = jnp.array([base.tokenizer.encode(text).ids])  # (batch, length)


def loss(trainable):
    logits = lorax.apply(base.module, method.bind(trainable, constants, base.params), tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


gradient = jax.jit(jax.value_and_grad(loss))
optimizer = optax.adam(1e-2)
state = optimizer.init(trainable)
for _ in range(30):
    value, gradients = gradient(trainable)
    updates, state = optimizer.update(gradients, state)
    trainable = optax.apply_updates(trainable, updates)

print(f"loss {value:.3f} nats per token")
