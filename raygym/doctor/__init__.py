"""`raygym doctor`: whether this machine can run raygym, and what to do where it cannot.

It is for machines where something is missing or broken, so nothing here imports a package that is not Python's own,
unless inside a check, whose failure is then told like everything else.
"""
