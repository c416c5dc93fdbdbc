"""Whole inputs from which fuzzing sets out: bytes of every kind that the readers in `targets` take."""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

from fastpeft.mezo import step_seed
from fastpeft.mezo.journal_format import MAGIC
from fastpeft.ops.noise import NAMES

HEADER: dict[str, Any] = {
    "seed": 7,
    "noise": "gaussian",
    "drawn_by": NAMES["gaussian"],
    "estimator": "spsa",
    "num_estimates": 1,
    "restore": "in_place",
    "rounding": "nearest",
    "first_step": 0,
    "dropped": 0,
    "weights": "0" * 16,
    "groups": [
        {
            "eps": 1e-3,
            "weight_decay": 0.0,
            "parameters": [{"name": "w", "shape": [2], "dtype": "torch.float32", "offset": 0}],
        }
    ],
}


def journal(header: Any = HEADER, records: int = 2) -> bytes:
    """A journal under right checksums, whatever its header is."""
    text = json.dumps(header).encode()
    made = MAGIC + struct.pack("<I", len(text)) + text + struct.pack("<I", zlib.crc32(text))
    for step in range(records):
        packed = struct.pack("<IBxHQ2d", step, 0, 2, step_seed(7, step), 0.5, 1e-6)
        made += packed + struct.pack("<I", zlib.crc32(packed))
    return made


METRICS = {"fastpeft_version": "0", "labels": ["a", "b"], "problem_type": "regression", "pairs": False, "max_length": 9}

SEEDS: dict[str, list[bytes]] = {
    "table.csv": [b'text,label\n"a ""b""",yes\nc,no\n', b"sentence1,sentence2,label\na,b,0\nc,d,1\n"],
    "table.tsv": [b"text\tlabel\na\tyes\nb\tno\n", b'text\tlabel\n"a\tb"\t1.5\n"b"\t2\n', b"x\t0\t*\ta\ny\t1\t\tb\n"],
    "table.jsonl": [
        b'{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
        b'{"tokens": ["a"], "ner_tags": ["O"]}\n{"tokens": ["b"], "ner_tags": [1]}\n',
        b'{"text": "a", "label": 0, "label_text": "x"}\n{"text": "b", "label": 1}\n',
        b'{"text": "\\u00e9", "label": 1e3, "label_text": "x"}\n{"text": "", "label": -1, "label_text": "y"}\n',
    ],
    "lines": [b"a\r\nb\x85c\n"],
    "configuration": [b'{"output": "o", "method": "siva", "epochs": 2.5, "settings": {"d": 3}}'],
    "run": [json.dumps(METRICS).encode(), b'{"fastpeft_version": "0", "init_from": ".", "init_from_weights": "0"}'],
    "prompt": [b'{"template": "{text} <mask>", "label_words": {"0": "a", "1": "b"}, "head": "label_words"}'],
    "journal": [journal(), journal(records=0), journal() + bytes(90)],
    "index": [
        b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "../x"}}',
        b'{"weight_map": [{"a": "/"}]}',
    ],
    "value": [b'{"a": [1, 2.5e3, true, null, "\\u00e9"]}'],
    "template": [b"{a}? <mask>, {b}", b"sst2", b"none"],
    "label words": [b"terrible,great", b"0=bad,1=good", b"negative=bad,positive=good"],
    "fingerprint": [
        b"float60 2 0123456789abcdee AA=",
        b"float16 2 0123456789abcdee AA==",
        b"float32 2 0123456789abcdee AAAAAAAAAAA=",
        b"bfloat16  0123456789abcdef AAAA",
    ],
}
