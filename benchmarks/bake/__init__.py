"""The parts of benchmarks/bake_off.py: a world with a known reward, the table of methods, figures, claims, the page."""
