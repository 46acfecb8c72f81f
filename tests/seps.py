"""Normalisations, as the package takes them and as the oracle does."""

#: Text of a sep, and the same for the oracle.
SEPS = {
    "softmax_n:n=0.7": {"n": 0.7},
    "sparsemax": {"alpha": 2.0},
    "entmax15": {"alpha": 1.5},
    "1.25": {"alpha": 1.25},
}
