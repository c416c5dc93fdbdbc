"""k-LST and LST: a small side network reads the features of a frozen backbone, which no gradient enters.

Importing this package makes `LadderModel` known to transformers' Auto classes, and so to its pipelines.
"""

import transformers

from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.generation import LadderCache
from fastpeft.ladder.inputs import LadderInputs
from fastpeft.ladder.model import LadderModel
from fastpeft.ladder.pool import LadderPool
from fastpeft.ladder.side import SideNetwork

__all__ = ["LadderCache", "LadderConfig", "LadderInputs", "LadderModel", "LadderPool", "SideNetwork"]

transformers.AutoConfig.register(LadderConfig.model_type, LadderConfig, exist_ok=True)
for _auto in (
    transformers.AutoModel,
    transformers.AutoModelForSequenceClassification,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModelForMaskedLM,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForQuestionAnswering,
    transformers.AutoModelForImageClassification,
):
    _auto.register(LadderConfig, LadderModel, exist_ok=True)
