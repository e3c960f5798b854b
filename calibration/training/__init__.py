"""How the checkpoints of this directory are trained: text, tokenizer, models and the loop."""
