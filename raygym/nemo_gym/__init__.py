"""NeMo Gym's servers as environments, unmodified: in a Python of their own, spoken to over HTTP."""
