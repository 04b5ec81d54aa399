"""`python -m jax_gdn` is `jax-gdn`."""

from jax_gdn.cli import main

raise SystemExit(main())
