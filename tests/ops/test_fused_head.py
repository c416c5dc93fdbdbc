"""`fuse_head`: language models of every architecture compute the same loss without their logits."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ladder, tiny, trainable
from causal_models import CAUSAL, causal_model
from mezo_trainer import config as mezo_config
from mezo_trainer import logged
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from trainers import quiet
from transformers import Trainer

import fastpeft
from fastpeft import fuse_head, unfuse_head
from fastpeft.data.problems import MASKED_WORDS, NEXT_WORDS
from fastpeft.ops.fused_head import FusedLinear, LazyLogits, fuse_any_head, making_no_logits
from fastpeft.training.memory import MemoryTracker, simulate_training_step

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(7) < 3, -100)

# what these do to their logits needs all of them
READ = {
    **dict.fromkeys(("beam", "gemma2", "gemma3n_text", "inkling2_text", "nanochat"), "tanh"),
    **dict.fromkeys(("recurrent_gemma", "vaultgemma"), "tanh"),
    "prophetnet": "__getitem__",
}
# that do not run by themselves with the sizes of these tests
NOT_RUN = ("longcat_flash", "reformer", "rwkv", "xlstm", "zamba2")
ALWAYS = ("llama", "gpt2", "gemma2")
MASKED = {
    **dict.fromkeys(("Bert", "Roberta", "ModernBert", "DistilBert", "MPNet", "Electra", "DebertaV2"), "ForMaskedLM"),
    "Bloom": "ForCausalLM",
}


def frozen(model: Any) -> Any:
    """The LM head, and with it tied embeddings."""
    model.get_output_embeddings().requires_grad_(False)
    return model.eval()


def step(model: Any, **arguments: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Loss and gradients, and the logits of the output."""
    model.zero_grad()
    torch.manual_seed(0)
    output = model(**{"input_ids": IDS, "labels": LABELS, **arguments})
    output.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return output.loss.detach(), gradients, output.logits


def is_unmade(logits: Any) -> bool:
    return type(logits) is LazyLogits and logits.made is None


def assert_same_step(model: Any, reads: str = "", **arguments: Any) -> None:
    loss, gradients, logits = step(model, **arguments)
    other, others, unmade = step(fuse_head(model), **arguments)
    assert is_unmade(unmade) is not bool(reads)
    torch.testing.assert_close(other.to(loss.dtype), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others, gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unmade, logits, rtol=1e-5, atol=1e-5)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in ("llama", "gpt2", "gemma2") else pytest.mark.slow)
        for kind in sorted(CAUSAL)
    ],
)
def test_every_causal_architecture_has_the_same_step(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    if kind in NOT_RUN:
        pytest.skip(f"a tiny {kind} does not run")
    model = frozen(causal_model(kind))
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    assert_same_step(model, READ.get(kind, ""), **({"use_cache": False} if takes_cache else {}))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fastpeft")]
    assert len(said) == (kind in READ)
    assert all(f"reads its logits by {READ[kind]}, so they are computed" in message for message in said)


@pytest.mark.parametrize("kind", MASKED)
def test_masked_words(kind: str) -> None:
    assert_same_step(frozen(tiny(kind, MASKED[kind])))


def test_a_decoder_behind_an_encoder() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = tiny("T5", "ForConditionalGeneration", **sizes, decoder_start_token_id=0)
    assert_same_step(frozen(model))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_items_in_batch": torch.tensor(11)},
        {"num_items_in_batch": 11},
        {"shift_labels": LABELS.roll(1, 1)},
        {"logits_to_keep": 3, "labels": LABELS[:, -3:]},
        {"labels": torch.full_like(LABELS, -100), "num_items_in_batch": 5},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_what_a_causal_loss_can_be_told(arguments: dict[str, Any]) -> None:
    assert_same_step(frozen(causal_model("llama")), **arguments)


@pytest.mark.parametrize("kind", ["llama", "granite", "gpt2"])
def test_autocast(kind: str) -> None:
    model = frozen(causal_model(kind))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, logits = step(model)
        other, _, unmade = step(fuse_head(model))
    assert is_unmade(unmade)
    assert (other.dtype, unmade.dtype) == (torch.float32, logits.dtype)
    torch.testing.assert_close(other, loss, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(unmade + 0, logits, rtol=2e-2, atol=2e-2)


def test_half_precision() -> None:
    model = frozen(causal_model("llama")).bfloat16()
    loss, _, logits = step(model)
    other, _, unmade = step(fuse_head(model))
    torch.testing.assert_close(other, loss, rtol=1e-2, atol=1e-2)
    assert torch.equal(unmade + 0, logits)


def test_a_decoder_that_trains_computes_as_before_but_where_no_gradient_is_asked_for() -> None:
    model = fuse_head(causal_model("llama").eval())
    loss, gradients, logits = step(model)
    assert type(logits) is Tensor
    assert len(gradients) == len(list(model.parameters()))
    with torch.no_grad():
        output = model(input_ids=IDS, labels=LABELS)
    assert is_unmade(output.logits)
    torch.testing.assert_close(output.loss, loss)


def test_hooks_of_the_decoder_see_logits() -> None:
    model = fuse_head(frozen(causal_model("llama")))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    assert type(step(model)[2]) is Tensor
    handle.remove()
    assert is_unmade(step(model)[2])
    assert seen == [Tensor]


def test_without_labels_nothing_changes() -> None:
    model = frozen(causal_model("llama"))
    expected, generated = model(input_ids=IDS).logits, model.generate(IDS, max_new_tokens=3, do_sample=False)
    fuse_head(model)
    assert type(model(input_ids=IDS).logits) is Tensor
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, do_sample=False), generated)
    with pytest.raises(ValueError, match="specify exactly one"):
        model(labels=LABELS)
    assert type(model(input_ids=IDS).logits) is Tensor  # an error leaves nothing behind


def test_a_compiled_model_makes_its_logits_in_one_graph() -> None:
    model = fuse_head(frozen(causal_model("llama")))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=IDS, labels=LABELS, use_cache=False)
    torch.testing.assert_close(found.loss, model(input_ids=IDS, labels=LABELS).loss)
    assert type(found.logits) is Tensor


# -- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [LoraConfig(init_lora_weights=False), fastpeft.SivaConfig(r=2, target_modules=["q_proj", "v_proj"])]
)
def test_adapters(config: Any) -> None:
    model = get_peft_model(causal_model("llama"), config).eval()
    assert_same_step(model)
    loss = step(model)[0]
    unfuse_head(model)
    torch.testing.assert_close(step(model)[0], loss)


@pytest.mark.parametrize("kind", ["llama", "bloom", "granite"])
def test_beside_a_side_network_the_head_is_fused(kind: str) -> None:
    model = ladder(causal_model(kind))
    loss, gradients, logits = step(model)
    assert is_unmade(logits)
    other, others, made = step(unfuse_head(model))
    assert type(made) is Tensor
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, made)


def test_a_side_network_beside_a_masked_model_or_in_half_precision() -> None:
    for model in (ladder(tiny("Roberta", "ForMaskedLM")), ladder(causal_model("bloom"), backbone_dtype="bfloat16")):
        loss, _, logits = step(model)
        assert is_unmade(logits)
        torch.testing.assert_close(step(unfuse_head(model))[0], loss, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("trained", ["all", "all but the decoder"])
@pytest.mark.parametrize("restore", ["in_place", "exact"])
def test_mezo_trains_with_the_same_losses(tmp_path: Path, trained: str, restore: str) -> None:
    losses = []
    for fused in (False, True):
        base = tiny("Roberta", "ForMaskedLM", initializer_range=0.2)
        if trained != "all":
            frozen(base)
        args = mezo_config(tmp_path, restore=restore)
        trainer = fastpeft.MeZOTrainer(base, args, train_dataset=rows())
        assert type(base.get_output_embeddings()) is FusedLinear
        unmade: list[bool] = []
        base.register_forward_hook(lambda module, args, output, seen=unmade: seen.append(is_unmade(output.logits)))
        if not fused:
            unfuse_head(base)
        trainer.train()
        assert set(unmade) == {fused and (trained, restore) != ("all", "exact")}
        losses.append(logged(trainer, "loss") + logged(trainer, "projected_grad"))
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-4)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, 50, (7,), generator=generator) for _ in range(8)]
    return [{"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < k % 4, -100)} for k, ids in enumerate(drawn)]


def trained(tmp_path: Path, fused: bool, **options: Any) -> Trainer:
    model = get_peft_model(causal_model("llama"), LoraConfig(r=2))
    metrics = options.pop("compute_metrics", None)
    batch = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}
    args = quiet(tmp_path, **batch, max_steps=3, learning_rate=1e-2, save_strategy="no", logging_steps=1, **options)
    if fused:
        fuse_head(model)
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(), compute_metrics=metrics)
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_the_trainer_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    """With accumulated gradients, whose sum is divided by the number of their tokens."""
    found = []
    for fused in (False, True):
        trainer = trained(tmp_path, fused, gradient_accumulation_steps=2, **options)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append([*losses, trainer.evaluate()["eval_loss"]])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_metrics_of_an_evaluation_get_their_logits(tmp_path: Path) -> None:
    def compute_metrics(prediction: Any) -> dict[str, float]:
        return {"sum": float(prediction.predictions.sum())}

    sums = [trained(tmp_path, fused, compute_metrics=compute_metrics).evaluate()["eval_sum"] for fused in (False, True)]
    torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-3)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chunks_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.ops.frozen_head_cross_entropy.CHUNK", 0)
    monkeypatch.setattr("fastpeft.ops.frozen_head_cross_entropy.FEWEST_TOKENS", {"cpu": 8})


@pytest.mark.usefixtures("chunks_of_8")
def test_a_step_has_no_logits() -> None:
    model = frozen(causal_model("llama", vocab_size=5000))
    ids = torch.randint(3, 5000, (4, 64))
    logits = 4 * 64 * 5000 * 4
    peaks = []
    for change in (lambda model: model, fuse_head):
        change(model)
        with MemoryTracker() as tracker:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks.append(tracker.peak)
    assert peaks[0] - peaks[1] > 2.9 * logits
    simulated = [
        simulate_training_step(change(model), {"input_ids": ids, "labels": ids}).peak
        for change in (unfuse_head, fuse_head)
    ]
    assert simulated[0] - simulated[1] > 2.9 * logits


@pytest.mark.usefixtures("chunks_of_8")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("problem", [NEXT_WORDS, MASKED_WORDS], ids=lambda problem: problem.short)
def test_what_is_measured_is_that_of_all_logits(problem: Any, autocast: bool, fused: bool) -> None:
    model = frozen(causal_model("gpt2") if problem is NEXT_WORDS else tiny("Bert", "ForMaskedLM"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        all_logits = model(input_ids=IDS).logits.float()
        with making_no_logits(model) if fused else nullcontext():
            logits = model(input_ids=IDS).logits
        assert is_unmade(logits) is fused
        found = problem.digest(logits, LABELS)
        assert is_unmade(logits) is fused
    shift = int(problem is NEXT_WORDS)
    asked, labels = all_logits[:, : 7 - shift], LABELS[:, shift:]
    losses = F.cross_entropy(asked.mT, labels, reduction="none")
    expected = F.pad(torch.stack([losses, (asked.argmax(-1) == labels).float()], -1), (0, 0, shift, 0))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not is_unmade(model(input_ids=IDS).logits)
    nothing = problem.digest(logits, torch.full_like(LABELS, -100))
    assert nothing.count_nonzero() == 0


@pytest.mark.usefixtures("chunks_of_8")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_to_measure_takes_the_memory_of_a_few_tokens(fused: bool) -> None:
    model = frozen(causal_model("llama", vocab_size=5000))
    ids = torch.randint(3, 5000, (4, 64))
    with torch.no_grad(), making_no_logits(model) if fused else nullcontext():
        logits = model(input_ids=ids).logits
        with MemoryTracker() as tracker:
            NEXT_WORDS.digest(logits, ids)
    held = 4 * (5000 * model.config.hidden_size if fused else 4 * 64 * 5000)  # views of it let the tracker see it
    assert tracker.peak - held < 3 * (4 * 8 * 5000)


# -- logits that are not made ----------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[LazyLogits, Tensor]:
    """Unmade and made, `(2, 5, 9)`."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*size, generator=generator) for size in ((2, 5, 4), (9, 4), (9,)))
    hidden.requires_grad_()
    return LazyLogits(hidden, weight, bias, torch.float32, []), F.linear(hidden, weight, bias)


UNMADE: dict[str, Callable[[Any], Any]] = {
    "view": lambda t: t.view(-1, 9),
    "reshape": lambda t: torch.reshape(t, (10, 9)),
    "by keyword": lambda t: torch.reshape(input=t, shape=(10, 9)),
    "flatten": lambda t: t.flatten(0, 1),
    "to a dtype": lambda t: t.to(torch.float64),
    "float": lambda t: t.float(),
    "contiguous": lambda t: t.contiguous(),
    "shifted": lambda t: t[..., :-1, :].contiguous().view(-1, t.size(-1)),
    "some rows": lambda t: t[:, 2:4],
    "scaled": lambda t: t * 0.5,
    "scaled from the left": lambda t: 3 * t,
    "divided": lambda t: t / 8,
    "to itself": lambda t: t.to(t.device, torch.float32),
}
MADE: dict[str, Callable[[Any], Any]] = {
    "one number": lambda t: t[0, 1, 2],
    "a mask": lambda t: t[torch.tensor([True, False])],
    "some words": lambda t: t[..., :3],
    "the words that are as many as hidden": lambda t: t[..., :4],
    "another width": lambda t: t.view(-1, 3),
    "turned": lambda t: t.transpose(0, 1),
    "bits": lambda t: t.detach().view(torch.int32),
    "a list": lambda t: torch.stack([t, t]),
    "second": lambda t: torch.ones(9) + t,
    "keyword": lambda t: torch.softmax(input=t, dim=-1),
    "second keyword": lambda t: torch.where(condition=torch.arange(9) < 4, input=t, other=torch.zeros(9)),
    "detached": lambda t: t.detach().argmax(-1),
    "numbers": lambda t: torch.tensor(t.tolist()),
    "array": lambda t: torch.from_numpy(t.detach().numpy()),
    "copied": lambda t: copy.deepcopy(t.detach()),
    "copied to a dtype": lambda t: t.to(torch.float64, copy=True),
    "copied to itself": lambda t: t.to(t.device, torch.float32, False, True),
    "pickled": lambda t: pickle.loads(pickle.dumps(t.detach())),
    "data": lambda t: t.data,
    "iterated": lambda t: next(iter(t)),
    "tensor factor": lambda t: t * torch.arange(9.0),
    "smoothed": lambda t: F.cross_entropy(t.view(-1, 9), torch.arange(10) % 9, label_smoothing=0.1),
    "weighted": lambda t: F.cross_entropy(t.view(-1, 9), torch.arange(10) % 9, weight=torch.arange(9.0)),
    "probabilities": lambda t: F.cross_entropy(t.view(-1, 9), torch.ones(10, 9) / 9),
    "classes in the middle": lambda t: F.cross_entropy(t.transpose(1, 2), torch.ones(2, 5).long()),
    "whole dimensions": lambda t: F.cross_entropy(t[..., :5, :], torch.ones(2, 9).long()),
}


@pytest.mark.parametrize("name", UNMADE)
def test_views_stay_unmade(pair: tuple[LazyLogits, Tensor], name: str) -> None:
    found, expected = (UNMADE[name](logits) for logits in pair)
    assert is_unmade(found)
    assert is_unmade(pair[0])
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert (found.ndim, found.size(-1), len(found), found.numel()) == (
        expected.ndim,
        9,
        len(expected),
        expected.numel(),
    )
    labels = torch.arange(expected.numel() // 9) % 9
    losses = [F.cross_entropy(logits.reshape(-1, 9), labels) for logits in (found, expected)]
    torch.testing.assert_close(*losses, check_dtype=False)  # in the dtype of the states
    assert is_unmade(found)
    torch.testing.assert_close(found + 0, expected)


@pytest.mark.parametrize("name", MADE)
def test_what_reads_them_makes_them_with_their_gradient(pair: tuple[LazyLogits, Tensor], name: str) -> None:
    found, expected = (MADE[name](logits) for logits in pair)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        hidden = pair[0].hidden
        torch.testing.assert_close(*(torch.autograd.grad(each.sum(), hidden)[0] for each in (found, expected)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_their_cross_entropy_makes_none(pair: tuple[LazyLogits, Tensor], reduction: str) -> None:
    labels = torch.arange(10) % 9
    labels[3] = -1
    criterion = nn.CrossEntropyLoss(ignore_index=-1, reduction=reduction)
    found, expected = (criterion(logits.view(-1, 9), labels) for logits in pair)
    assert is_unmade(pair[0])
    torch.testing.assert_close(found, expected)
    hidden = pair[0].hidden
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), hidden)[0] for each in (found, expected)))


def test_a_change_in_place_is_kept(pair: tuple[LazyLogits, Tensor]) -> None:
    for logits in pair:
        logits[..., 0] = 7.0
        logits.mul_(2)
        logits += 1
    torch.testing.assert_close(pair[0] + 0, pair[1])
    labels = torch.arange(10) % 9
    torch.testing.assert_close(*(F.cross_entropy(logits.view(-1, 9), labels) for logits in pair))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["view", "shifted", "divided", "to itself"])
def test_a_metric_does_not_take_their_gradient(pair: tuple[LazyLogits, Tensor], mode: Any, name: str) -> None:
    """As where a loss reads the logits after an accuracy did."""
    view = UNMADE[name](pair[0])
    with mode():
        view.argmax(-1)
        pair[0].argmax(-1)
    for found, expected in ((pair[0], pair[1]), (view, UNMADE[name](pair[1]))):
        gradients = [
            torch.autograd.grad(each.exp().sum(), pair[0].hidden, retain_graph=True)[0] for each in (found, expected)
        ]
        torch.testing.assert_close(*gradients)
    with torch.no_grad():
        assert not LazyLogits(pair[0].hidden, pair[0].weight, None, torch.float32, []).exp().requires_grad


def test_a_change_in_place_is_one_of_all_views(pair: tuple[LazyLogits, Tensor]) -> None:
    labels = torch.arange(8) % 9
    losses = []
    for logits in pair:
        shifted = logits[:, :-1]
        same = logits.float()
        logits[:, :2].mul_(2)
        logits[..., 7:] = -9.0
        losses.append(F.cross_entropy(shifted.reshape(-1, 9), labels))
        same[:, 3].zero_()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(pair[0] + 0, pair[1])


def test_labels_that_do_not_fit_are_an_error_as_ever(pair: tuple[LazyLogits, Tensor]) -> None:
    for logits in pair:
        with pytest.raises(ValueError, match="Expected input batch_size"):
            F.cross_entropy(logits.view(-1, 9), torch.ones(4).long())
        with pytest.raises(RuntimeError, match=r"shape .* is invalid"):
            logits.view(-1, 7)


def test_what_goes_past_pytorch_is_refused(pair: tuple[LazyLogits, Tensor]) -> None:
    with (
        torch._C.DisableTorchFunctionSubclass(),
        pytest.raises(fastpeft.FastpeftError, match=r"fuse_head has not computed.*unfuse_head"),
    ):
        pair[0] + 1


def test_a_weight_that_changed_is_noticed(pair: tuple[LazyLogits, Tensor]) -> None:
    pair[0].weight.mul_(2)
    for read in (Tensor.sum, lambda logits: F.cross_entropy(logits.view(-1, 9), torch.ones(10).long())):
        with pytest.raises(fastpeft.FastpeftError, match="weight of the LM head had changed"):
            read(pair[0])


# -- the change of class ---------------------------------------------------------------------------------------------


def test_unfuse_leaves_what_was_there() -> None:
    model = frozen(causal_model("llama"))
    attributes = [(type(m), set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    unfuse_head(fuse_head(fuse_head(model)))
    found = [(type(m), set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert found == attributes


def test_copies_and_files(tmp_path: Path) -> None:
    model = fuse_head(frozen(causal_model("llama")))
    loss = step(model)[0]
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.lm_head) is FusedLinear
        assert other.lm_head.weight is other.get_input_embeddings().weight or not other.config.tie_word_embeddings
        found, _, logits = step(other)
        assert is_unmade(logits)
        assert torch.equal(found, loss)
        unfuse_head(other)
        assert not other._forward_hooks
        assert type(step(other)[2]) is Tensor
    assert is_unmade(step(model)[2])
    model.save_pretrained(tmp_path)
    assert type(type(model).from_pretrained(tmp_path).lm_head) is nn.Linear


def test_a_packed_decoder_is_unpacked() -> None:
    model = causal_model("llama").requires_grad_(False).eval()
    loss = model(input_ids=IDS, labels=LABELS).loss
    fuse_head(fastpeft.pack_frozen(model))
    assert type(model.lm_head) is FusedLinear
    torch.testing.assert_close(model(input_ids=IDS, labels=LABELS).loss, loss)
    fastpeft.pack_frozen(model)
    assert type(model.lm_head) is FusedLinear


def test_what_has_no_plain_decoder_is_refused() -> None:
    classifier = tiny("Bert")
    fuse_any_head(classifier)
    assert type(classifier.classifier) is nn.Linear
    with pytest.raises(fastpeft.FastpeftError, match=r"BertForSequenceClassification is not there.*nn\.Linear"):
        fuse_head(classifier)
    adapted = get_peft_model(causal_model("llama"), LoraConfig(target_modules=["lm_head"]))
    fuse_any_head(adapted)
    with pytest.raises(fastpeft.FastpeftError, match=r"fuse_head: the LM head .* is a Linear"):
        fuse_head(adapted)
    assert trainable(adapted)
