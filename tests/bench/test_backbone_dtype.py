"""The measurement of a backbone of fewer bits, on few rows."""

from __future__ import annotations

from bench.backbone_dtype import Texts, measure


def test_fewer_bits_take_less_and_change_the_features_a_little() -> None:
    texts = Texts(rows=32, dev_rows=16)
    exact, int8 = measure(None, texts), measure("int8", texts)
    assert (exact["train_rows"], exact["dev_rows"]) == ("32", "16")
    assert float(exact["feature_error"]) == 0 < float(int8["feature_error"]) < 0.1
    assert 0.3 < float(int8["weights_mb"]) / float(exact["weights_mb"]) < 0.8
