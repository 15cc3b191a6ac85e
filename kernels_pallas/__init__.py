"""Attention kernels of generative recommenders; depends on jax alone."""
