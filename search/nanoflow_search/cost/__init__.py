"""The paper's cost model says what a device can do, what an operation needs, and which batches are worth a plan."""
