"""Tiers of the KV cache below the device: host memory, then an SSD."""
