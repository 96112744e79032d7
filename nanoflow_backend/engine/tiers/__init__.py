"""This package moves KV pages between the device and the tiers below it, on every rank."""
