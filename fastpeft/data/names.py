"""Names that data, base models and configurations share; importing them costs nothing."""

from pathlib import Path

DEMO = "demo"  # the bundled model, and the film reviews that it is fine-tuned on
DEMO_FOLDER = Path(__file__).parents[1] / DEMO
