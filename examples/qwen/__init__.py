"""Qwen3.5 (dense and MoE) and Qwen3-Next in JAX, on `jax_gdn`."""
