"""This package holds the model as data: operations, the values between them, and the split into nano-batches."""
