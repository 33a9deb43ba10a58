"""Reuse on diffusers' own models in plain Python: the naive baseline of the benches, the tests' oracle."""
