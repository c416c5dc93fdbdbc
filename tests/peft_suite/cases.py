"""SiVA's rows in the tables of PEFT's own tests, and the tests that cannot hold for SiVA, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fastpeft import FastpeftError, SivaConfig


def _configs(task_type: str, **more: Any) -> list[Any]:
    kinds: list[dict[str, Any]] = [
        {"target_modules": None},
        {"target_modules": "all-linear", "r": 2},
        {"target_modules": "all-linear", "r": 2, "residual": "implicit"},
        {"target_modules": "all-linear", "r": 2, "trainable_token_indices": [0, 1, 3]},
    ]
    return [(SivaConfig, {"task_type": task_type, **kind, **more}) for kind in kinds]


_PAIRS = {
    "Same": ({"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    "Different": ({"target_modules": ["lin0"]}, {"target_modules": ["lin1"], "r": 2}),
    "Same Implicit": (
        {"target_modules": ["lin0"], "residual": "implicit"},
        {"target_modules": ["lin0"], "r": 8, "residual": "implicit"},
    ),
}
_NEW = {"init_weights": False}


def _pair(first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
    return [("SiVA", SivaConfig(**first, **_NEW), SivaConfig(**second, **_NEW))]


# (file, table) or (file, test, for a table written in its decorator): the rows that take the place of PEFT's own
TABLES: dict[tuple[str, str], list[Any]] = {
    ("test_custom_models", "TEST_CASES"): [
        ("Vanilla MLP 1 SiVA", "MLP", SivaConfig, {"target_modules": "lin0"}),
        ("Vanilla MLP 2 SiVA", "MLP", SivaConfig, {"target_modules": ["lin0"]}),
        ("Vanilla MLP 3 SiVA", "MLP", SivaConfig, {"target_modules": ["lin1"], "r": 1}),
        ("Vanilla MLP 4 SiVA", "MLP", SivaConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
        (
            "Vanilla MLP 5 SiVA",
            "MLP",
            SivaConfig,
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        ),
        ("Vanilla MLP 6 SiVA implicit", "MLP", SivaConfig, {"target_modules": ["lin0"], "residual": "implicit"}),
        (
            "Vanilla MLP 7 SiVA implicit",
            "MLP",
            SivaConfig,
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "residual": "implicit"},
        ),
        ("Embedding + transformers Conv1D 1 SiVA", "EmbConv1D", SivaConfig, {"target_modules": ["conv1d"], "r": 1}),
        (
            "Embedding + transformers Conv1D 2 SiVA",
            "EmbConv1D",
            SivaConfig,
            {"target_modules": ["conv1d"], "r": 1, "modules_to_save": ["emb"]},
        ),
        (
            "Embedding + transformers Conv1D 3 SiVA",
            "EmbConv1D",
            SivaConfig,
            {"target_modules": ["conv1d"], "r": 1, "trainable_token_indices": {"emb": [0, 10]}},
        ),
        ("MHA 1 SiVA", "MHA", SivaConfig, {"target_modules": ["lin0"], "r": 2}),
    ],
    ("test_custom_models", "ALL_PEFT_CONFIG_CLASSES"): [SivaConfig],
    ("test_custom_models", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"): [
        (f"SiVA {name}", "siva", SivaConfig, *({**kwargs, **_NEW} for kwargs in pair)) for name, pair in _PAIRS.items()
    ],
    ("test_custom_models", "MIXED_ADAPTER_TEST_CASES"): [
        *_pair(*_PAIRS["Same"]),
        *_pair(*_PAIRS["Same Implicit"]),
    ],
    ("test_custom_models", "test_mixed_adapter_batches_different_target_layers"): _pair(*_PAIRS["Different"]),
    ("test_custom_models", "test_mixed_adapter_batches_multiple_modules_to_save"): _pair(
        *[{"target_modules": ["lin0"], "modules_to_save": ["lin1"]}] * 2
    ),
    ("test_custom_models", "test_mixed_adapter_batches_partly_overlapping_target_layers"): _pair(
        {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0", "lin1"], "r": 2}
    ),
    ("test_custom_models", "test_multiple_adapters_mixed_modules_to_save"): [SivaConfig],
    ("test_custom_models", "test_multiple_adapters_mixed_modules_to_save_order_switched"): [SivaConfig],
    ("test_custom_models", "test_adapter_name_makes_no_difference"): [SivaConfig(target_modules=["lin0"], **_NEW)],
    ("test_decoder_models", "ALL_CONFIGS"): _configs("CAUSAL_LM"),
    ("test_encoder_decoder_models", "ALL_CONFIGS"): _configs("SEQ_2_SEQ_LM"),
    ("test_feature_extraction_models", "ALL_CONFIGS"): _configs(
        "FEATURE_EXTRACTION",
        exclude_modules=["pooler.dense"],  # the tests use the hidden states alone
    ),
    ("test_seq_classifier", "ALL_CONFIGS"): _configs("SEQ_CLS"),
    ("test_token_classification_qa", "TOKEN_CLS_CONFIGS"): _configs("TOKEN_CLS"),
    ("test_token_classification_qa", "QA_CONFIGS"): _configs("QUESTION_ANS"),
}
FILES = sorted({file for file, _ in TABLES})


@dataclass(frozen=True)
class NotForSiva:
    """Tests that cannot hold for SiVA.

    Attributes:
        tests: a pattern (of `fnmatch`) for `file::test[parameters]`, where a bracket is written `[[]`.
        reason: why.
        raises: how they fail; a test that passes, or that fails in another way, is an error.
    """

    tests: str
    reason: str
    raises: type[BaseException] = FastpeftError


EXCEPTIONS = (
    NotForSiva(
        "test_decoder_models::test_*mixed_adapter_batches[[]SivaConfig-*OPT*",
        "OPT's fc1 reads tokens of all rows as rows: SiVA finds and refuses it",
    ),
    NotForSiva(
        "test_*::test_load_model_low_cpu_mem_usage[[]*",
        "low_cpu_mem_usage makes a new adapter of nothing: SiVA's starts from the weights. Loading with it is tested "
        "by test_adapter_dtype_autocast",
    ),
    NotForSiva(
        "test_custom_models::test_loading_model_*requires_grad_set_correctly*",
        "loads an adapter onto another random model than it was made from, which SiVA finds and refuses",
    ),
    NotForSiva(
        "test_custom_models::test_mixed_adapter_batches_training_mode_raises*",
        "rows of a batch may have adapters of their own in training too",
        pytest.fail.Exception,
    ),
    *(
        NotForSiva(
            f"test_custom_models::test_mixed_adapter_batches_{case}_raises*",
            "a message has the names of arguments without backticks; its words are PEFT's",
            AssertionError,
        )
        for case in ("length_mismatch", "merged")
    ),
)
