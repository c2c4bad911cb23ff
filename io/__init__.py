"""Data: from a DataFrame to staged Parquet, to a plan, to batches.

Importing this package lets Petastorm load on current pyarrow and NumPy; see `sparkdl.io.petastorm_loader`.
"""

from sparkdl.io.petastorm_loader import install

install()
