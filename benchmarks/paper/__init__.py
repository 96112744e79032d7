"""The search on the tables that NanoFlow's authors published, and annealing, which only that search uses."""
