"""JAX/Flax code for the whole ChatGPT recipe: tokenizer, pretraining, tuning, sampling, chat."""

__version__ = "0.1.0"
