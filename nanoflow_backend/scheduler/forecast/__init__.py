"""This package predicts how long outputs get and how many pages they will need, by which requests are admitted."""
