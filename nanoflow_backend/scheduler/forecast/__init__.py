"""How long outputs get, and how many pages they will need: what admission is decided by."""
