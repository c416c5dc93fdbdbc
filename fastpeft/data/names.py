"""Names that options offer, where their importing costs nothing."""

FEATURE_DTYPES = ("bfloat16", "float32", "int8")  # what cached features of a backbone are rounded to, the default first
