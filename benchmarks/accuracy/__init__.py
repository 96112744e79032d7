"""These runs compare the engine with transformers: tokens and logits, and texts of chat templates."""
