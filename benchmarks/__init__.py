"""What `jax_gdn` takes: `python -m benchmarks COMMAND`, from the root of a clone."""
