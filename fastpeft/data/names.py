"""Names that data, base models and options share, where importing them costs nothing."""

DEMO = "demo"  # the bundled model, and the film reviews that it is fine-tuned on
KEPT_LABELS = "given "  # in front of the name of a column of labels that predictions have taken
OUTSIDE = "O"  # the tag of words that belong to nothing
UNLABELLED = -100  # the label of tokens that no loss and no metric looks at
LOSS = "loss"  # among the names of what is measured
