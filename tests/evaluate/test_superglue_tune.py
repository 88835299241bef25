"""A classifier on a model is transformers' own; a step's gradient is the naive one; batches and texts are as stated."""

from math import log

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, T5GemmaConfig, T5GemmaForConditionalGeneration

from tests.models import hf
from tests.models.test_heads import SIDE
from tests.models.tiny import (
    VOCAB,
    assert_same,
    build,
    differ,
    padded,
    pair_config,
    random_ids,
    randomise,
    stack,
)
from twofold.evaluate import open_contender
from twofold.evaluate.superglue import TASKS, Tuning
from twofold.evaluate.superglue.reader import Encoded, Reader
from twofold.evaluate.superglue.tasks import Example, Text
from twofold.evaluate.superglue.tune import (
    accumulate,
    answer,
    label_logits,
    shuffled_batches,
    tune,
)
from twofold.models import EncoderClassifier
from twofold.train.step import NonFiniteError

LENGTHS = [9, 1, 5, 8]


def encoded(n_texts=1, lengths=LENGTHS, seed=0, labels=(1, 0, 2, 1)):
    rows = [random_ids(len(lengths), max(lengths), seed + i) for i in range(n_texts)]
    return [
        Encoded(
            tuple(tuple(row[i, : max(1, n - j)].tolist()) for j, row in enumerate(rows)), labels[i], False
        )
        for i, n in enumerate(lengths)
    ]


def save_donor(folder, config):
    hf.donor(config).save_pretrained(folder)


def save_t5gemma(folder):
    config = T5GemmaConfig(
        encoder=dict(SIDE), decoder=dict(SIDE), vocab_size=VOCAB, attn_implementation="eager"
    )
    model = T5GemmaForConditionalGeneration(config)
    randomise(model, qk_factor=3.0)
    model.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
@pytest.mark.parametrize("family", ["llama", "gemma2", "t5gemma"])
@torch.no_grad()
def test_logits_are_those_of_transformers(family, tmp_path):
    """`LlamaForSequenceClassification`, `Gemma2ForSequenceClassification`, and T5Gemma's with the encoder alone."""
    if family == "t5gemma":
        save_t5gemma(tmp_path)
    else:
        save_donor(tmp_path, hf.DONOR_CONFIGS[family])
    alone = {"is_encoder_decoder": False} if family == "t5gemma" else {}
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, attn_implementation="eager", dtype=torch.float32, **alone
    ).eval()
    assert type(theirs).__name__.removesuffix("ForSequenceClassification").lower() == family
    contender = open_contender(tmp_path)
    assert contender.kind == ("encoder-decoder" if family == "t5gemma" else "decoder-only")
    ours = EncoderClassifier(contender.model, 3).eval()
    randomise(ours.score, seed=7)
    head = theirs.score.out_proj if family == "t5gemma" else theirs.score
    head.weight.copy_(ours.score.out_proj.weight)
    if family == "t5gemma":
        head.bias.copy_(ours.score.out_proj.bias)
    else:
        ours.score.out_proj.bias.zero_()
    batch = encoded()
    ids, mask = padded(random_ids(4, 9), LENGTHS, "right")
    wanted = theirs(input_ids=ids, attention_mask=mask.long()).logits
    assert wanted.std() > 0.1
    assert_same(label_logits(ours, batch, "float32"), wanted)
    assert answer(ours, batch, Tuning(pass_tokens=9)) == wanted.argmax(dim=1).tolist()


@pytest.mark.filterwarnings("ignore:.*no tokenizer files")
@torch.no_grad()
def test_a_donor_does_not_read_the_future_and_a_pair_does(tmp_path):
    """Of three texts with the same beginning, a donor's states there are the same, whatever follows."""
    save_donor(tmp_path, hf.DONOR_CONFIGS["llama"])
    donor = open_contender(tmp_path).model
    ids = random_ids(3, 9)
    ids[:, :5] = ids[0, :5]
    for model, is_causal in (
        (donor, True),
        (build(pair_config(stack(layer_types=("full_attention",) * 3))), False),
    ):
        before = model.encode(ids).last_hidden_state[:, :5]
        assert differ(before[0], before[1]) is not is_causal
        if is_causal:
            assert_same(before[1], before[0])


@pytest.mark.parametrize("pass_tokens", [1, 20, 1000])
@pytest.mark.parametrize("name", ["cb", "copa"])
def test_loss_and_gradient_of_a_step(name, pass_tokens):
    """Against one example at a time, without padding, its probability taken by hand."""
    task = TASKS[name]
    labels = (1, 0, 1, 1) if task.is_choice else (1, 0, 2, 1)
    batch = encoded(2 if task.is_choice else 1, labels=labels)
    model = build(pair_config(stack()))
    classifier = EncoderClassifier(model, task.num_logits)
    loss = accumulate(classifier, batch, Tuning(pass_tokens=pass_tokens))
    found = {key: p.grad.clone() for key, p in classifier.named_parameters()}
    classifier.zero_grad()
    naive = torch.zeros(())
    for one in batch:
        logits = torch.cat([classifier(torch.tensor([ids]))[0] for ids in one.texts])
        assert len(logits) == len(task.labels)
        naive = naive - (logits[one.label].exp() / logits.exp().sum()).log() / len(batch)
    naive.backward()
    assert loss == pytest.approx(naive.item(), rel=1e-5)
    for key, parameter in classifier.named_parameters():
        assert parameter.grad.abs().max() > 0 or key == "score.out_proj.bias"
        assert_same(found[key], parameter.grad)


def test_a_cell_starts_at_equal_odds_and_updates_everything(text_model):
    """The head is drawn small; one step of AdamW moves every parameter that got a gradient by about the rate."""
    model = text_model()
    before = {name: p.detach().clone() for name, p in model.encoder.named_parameters()}
    batch = encoded(labels=(1, 0, 2, 1))
    state = torch.get_rng_state()
    tuned = tune(
        model, TASKS["cb"], batch, batch, learning_rate=1e-3, batch_size=4, dropout_rate=0.0, seed=3,
        tuning=Tuning(steps=1, warmup_share=1.0),
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert tuned.first_loss == tuned.last_loss == pytest.approx(log(3), abs=0.3)
    assert tuned.steps == 1
    for name, parameter in model.encoder.named_parameters():
        moved = (parameter - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3, rel=0.2), name


def test_a_cell_is_the_naive_loop(text_model):
    """Three steps on the same two examples, beside a plain loop with torch's AdamW and clipping."""
    tuning = Tuning(epochs=3, max_grad_norm=0.5, weight_decay=0.1, warmup_share=0.5)
    batch = encoded(labels=(1, 0, 1, 0))[:2]
    model = text_model()
    tuned = tune(
        model,
        TASKS["rte"],
        batch,
        batch,
        learning_rate=1e-2,
        batch_size=2,
        dropout_rate=0.0,
        seed=3,
        tuning=tuning,
    )
    torch.manual_seed(3)
    classifier = EncoderClassifier(text_model(), 2)
    torch.nn.init.normal_(classifier.score.out_proj.weight, std=0.02)
    torch.nn.init.zeros_(classifier.score.out_proj.bias)
    matrices = [p for n, p in classifier.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in classifier.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1.0
    )
    losses = []
    for rate in (0.5, 1.0, 0.1):  # up over round(0.5 * 3) = 2 steps, then down to a tenth
        optimizer.zero_grad()
        logits = torch.stack([classifier(torch.tensor(one.texts))[0] for one in batch])
        loss = F.cross_entropy(logits, torch.tensor([one.label for one in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        optimizer.step()
        losses.append(loss.item())
    assert (tuned.first_loss, tuned.last_loss) == (
        pytest.approx(losses[0], rel=1e-5),
        pytest.approx(losses[-1], rel=1e-3),
    )
    for ours, theirs in zip(model.encoder.parameters(), classifier.encoder.parameters(), strict=True):
        assert_same(ours, theirs, 1e-4)


def test_dropout_is_the_heads(text_model):
    def loss(rate, seed):
        batch = encoded(labels=(1, 0, 1, 0))
        settings = {"learning_rate": 1e-3, "batch_size": 4, "tuning": Tuning(steps=2)}
        return tune(
            text_model(), TASKS["rte"], batch, batch, dropout_rate=rate, seed=seed, **settings
        ).last_loss

    assert loss(0.5, 1) == loss(0.5, 1)
    assert loss(0.5, 1) != loss(0.0, 1)


def test_answers_are_given_without_dropout(text_model):
    """One example 40 times gets one answer; with nine tenths of its features dropped it would get several."""
    batch = encoded(labels=(1, 0, 1, 0))
    tuned = tune(
        text_model(), TASKS["rte"], batch, batch[:1] * 40, learning_rate=1e-3, batch_size=4, dropout_rate=0.9, seed=0,
        tuning=Tuning(steps=1),
    )  # fmt: skip
    assert len(set(tuned.answers)) == 1


def test_what_is_not_finite_stops_before_the_update(text_model):
    model = text_model()
    with torch.no_grad():
        model.encoder.norm.weight[0] = torch.inf
    before = [p.detach().clone() for p in model.encoder.parameters()]
    batch = encoded(labels=(1, 0, 1, 0))
    with pytest.raises(NonFiniteError, match="step 1 has loss nan"):
        tune(
            model, TASKS["rte"], batch, batch, learning_rate=1e-3, batch_size=4, dropout_rate=0.0, seed=0,
            tuning=Tuning(),
        )  # fmt: skip
    assert all(map(torch.equal, before, model.encoder.parameters()))


def test_bfloat16_computes_near_float32_and_keeps_weights(text_model):
    model = text_model()
    classifier = EncoderClassifier(model, 3)
    batch = encoded()
    logits = label_logits(classifier, batch, "bfloat16")
    assert logits.dtype == torch.float32
    difference = (logits - label_logits(classifier, batch, "float32")).abs().max().item()
    assert 0 < difference < 0.1
    accumulate(classifier, batch, Tuning(precision="bfloat16"))
    assert {p.grad.dtype for p in classifier.parameters()} == {torch.float32}


def test_an_epoch_has_every_example_once_in_batches_of_like_lengths():
    lengths = [(7 * i) % 50 for i in range(50)]
    batches = shuffled_batches(lengths, 4, seed=5)
    epochs = [[next(batches) for _ in range(13)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(i for batch in epoch for i in batch) == list(range(50))
        assert sorted(map(len, epoch)) == [2] + [4] * 12
        spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch]
        assert sum(spread) / len(spread) < 12  # 30 for batches drawn at random
    assert epochs[0] != epochs[1]
    again = shuffled_batches(lengths, 4, seed=5)
    assert [[next(again) for _ in range(13)] for _ in range(2)] == epochs
    assert next(shuffled_batches(lengths, 4, seed=6)) != epochs[0][0]


def test_texts_are_cut_where_their_body_ends(text_model):
    """One token per byte; BOS counts where the model reads one."""
    example = Example((Text("ab: ", "0123456789", " q"),), 1)
    decode = text_model().tokenizer.decode
    whole = Reader(text_model()).encode(example)
    assert decode(whole.texts[0]) == "ab: 0123456789 q"
    assert not whole.is_truncated
    assert not Reader(text_model(), 16).encode(example).is_truncated
    cut = Reader(text_model(source_bos=True), 12).encode(example)
    assert cut.texts[0][0] == 256
    assert decode(cut.texts[0][1:]) == "ab: 01234 q"
    assert (cut.is_truncated, cut.label, cut.length) == (True, 1, 12)
    with pytest.raises(ValueError, match=r"max_tokens=6 leaves no room .* 'ab: 0123456789 q'...; raise it"):
        Reader(text_model(), 6).encode(example)


def test_readers_that_cannot_read(text_model):
    with pytest.raises(ValueError, match="max_tokens is 257, and the encoder takes 256; lower it"):
        Reader(text_model(), 257)
    model = text_model()
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        Reader(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"steps": 0},
        {"max_tokens": 0},
        {"pass_tokens": 0},
        {"warmup_share": 1.1},
        {"max_grad_norm": 0.0},
        {"precision": "float16"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_tuning_that_is_none(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        Tuning(**settings)
