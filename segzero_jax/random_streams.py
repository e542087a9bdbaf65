"""The streams of random numbers that a seed stands for; no two draw the same."""

import jax

# Numbers are folded into the key of the seed. A new stream takes a new number: the others must not change.
TRAINING, EVALUATION, EVALUATE_COMMAND, LORA_START = range(4)


def stream_key(seed: int, stream: int) -> jax.Array:
    """The key that a stream begins with."""
    return jax.random.fold_in(jax.random.key(seed), stream)
