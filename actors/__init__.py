"""The Ray layer: one actor per file, each a thin shell over a pure function of `raygym`."""

if __name__ != "raygym.actors":
    # A second import path would create every class twice, and Ray would pickle one and compare with the other.
    raise ImportError("this package is raygym.actors: write `import raygym.actors`, never `import actors`")
