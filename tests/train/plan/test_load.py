"""Stages of pairs: predicted memory and FLOPs against real steps of their objectives."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.config.test_preferences import BASE
from tests.models.tiny import MEETINGS, build, meeting_id, pair_config, stack
from tests.train.plan.account import LiveBytes, small
from twofold.config.preferences import PreferenceConfig, PreferenceRecipe, RewardRecipe
from twofold.config.recipe import Run
from twofold.data.convention import Convention, Example
from twofold.models import EncoderDecoder
from twofold.models.flops import Pairs, answers_row, encoder_flops, example_row, training_flops
from twofold.posttrain.pairs import Pair
from twofold.posttrain.preferences import PreferenceObjective, collate_pairs
from twofold.posttrain.reference import ReferenceModel
from twofold.posttrain.reward import RewardModel, RewardObjective, collate_texts
from twofold.train.plan import DEVICES, plan_run
from twofold.train.plan.memory import Setup, peak_memory
from twofold.train.step import scored_positions

PAIRS, SOURCE, TARGET = 2, 96, 48
TOLERANCE = 0.08
"""Of a peak: attention with a mask for padded rows keeps a copy of its output, which fused kernels of a GPU do not."""
CONVENTION = Convention(
    decoder_start="bos", bos_token_id=1, source_bos=False, stop_token_ids=(2,), pad_token_id=0
)


def pairs(count=PAIRS, source=SOURCE, target=TARGET, vocab=1000):
    def ids(n):
        return torch.randint(3, vocab, (n,)).numpy()

    def pair():
        read = ids(source)
        replies = [Example(read, torch.tensor([1]).numpy(), ids(target), ends=True) for _ in range(2)]
        return Pair(*replies, 0.0, "here")

    return [pair() for _ in range(count)]


def step_peak(objective, batch, precision):
    """Peak of live bytes over a step that is not the first."""
    model = objective.model
    # What the plan counts is fused attention; that of the CPU, segment by segment, keeps float32 copies.
    for each in (
        model,
        *([] if getattr(objective, "reference", None) is None else [objective.reference._model]),
    ):
        each.set_attention_backend("sdpa")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    frozen = getattr(objective, "reference", None)
    with LiveBytes() as live:
        held = [model] if frozen is None else [model, frozen._model]
        for parameter in (p for module in held for p in module.parameters()):
            live.add(parameter)
        for _ in range(2):
            live.peak = live.now
            loss = objective(batch, scored_positions(batch) if batch.labels.numel() else torch.empty(0))
            loss.backward()
            objective.take_metrics()
            del loss
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return live.peak


def setup(**changes):
    settings = {
        "rows": PAIRS, "source_length": SOURCE, "target_length": 2 * TARGET, "scored": PAIRS * 2 * TARGET, "answers": 2,
        "precision": "float32", "checkpointing": "none", "shards": 1, "accumulates": False, "is_cpu": True,
    }  # fmt: skip
    return Setup(**(settings | changes))


@pytest.mark.parametrize(
    ("precision", "meeting", "has_reference"),
    [
        ("float32", {}, False),
        ("float32", {"layout": "merged", "reads": "aligned"}, True),
        ("bfloat16", {"layout": "merged", "reads": "aligned"}, False),
    ],
)
def test_the_peak_of_a_step_on_preferences(precision, meeting, has_reference):
    config = small(vocab=1024, width=128, **meeting)
    models = [EncoderDecoder(config).train() for _ in range(2)]
    for model in models:
        model.initialise_randomly(0)
    reference = ReferenceModel(models[1], precision, torch.device("cpu")) if has_reference else None
    objective = PreferenceObjective(
        models[0],
        precision,
        config=PreferenceConfig(kind="dpo" if has_reference else "orpo"),
        reference=reference,
    )
    batch = collate_pairs(0)(pairs(), range(PAIRS))
    peak = step_peak(objective, batch, precision)
    held = sum(p.numel() for p in models[1].parameters()) if has_reference else 0
    predicted = peak_memory(config, setup(precision=precision, reference_parameters=held))
    assert abs(predicted.total - peak) <= TOLERANCE * peak, (peak, predicted.parts())


@pytest.mark.parametrize(("precision", "layout"), [("float32", "separate"), ("bfloat16", "merged")])
def test_the_peak_of_a_step_of_a_reward_model(precision, layout):
    config = small(vocab=1024, width=128, layout=layout)
    pair = EncoderDecoder(config).train()
    pair.initialise_randomly(0)
    model = RewardModel.of_pair(pair, 0).train()
    del pair
    batch = collate_texts(CONVENTION)(pairs(4), range(4))
    peak = step_peak(RewardObjective(model, precision), batch, precision)
    texts = batch.input_ids.shape
    predicted = peak_memory(
        config,
        setup(
            rows=texts[0], source_length=texts[1], target_length=0, scored=0, answers=1, precision=precision,
            is_encoder_only=True,
        ),
    )  # fmt: skip
    assert abs(predicted.total - peak) <= TOLERANCE * peak, (peak, predicted.parts())


@pytest.mark.parametrize("meeting", MEETINGS[::3], ids=meeting_id)
def test_operations_of_preferences_agree_with_the_dispatcher(meeting):
    aligned = {"aligned_layers": (0, 1)} if meeting["reads"] == "aligned" else {}
    config = pair_config(
        stack(num_hidden_layers=2, layer_types=("full_attention",) * 2), **meeting, **aligned
    )
    model = build(config)
    model.set_attention_backend("eager")
    objective = PreferenceObjective(model, config=PreferenceConfig(kind="orpo"))
    n, m, vocab = 7, 5, config.decoder.vocab_size
    batch = collate_pairs(0)(pairs(1, n, m, vocab), [0])
    with FlopCounterMode(display=False) as forward:
        loss = objective(batch, scored_positions(batch))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    row = answers_row(config, n, m, answers=2)
    assert row.scored == row.target_positions == 2 * m
    # The eager reference computes hidden pairs as well.
    dense = replace(row, pairs=Pairs((n * n,) * 2, (2 * m * m,) * 2, (2 * n * m,) * 2))
    found = training_flops(config, dense)
    assert found.forward == forward.get_total_flops()
    # The gradient of the head's weight is added up in place, which the counter does not see.
    unseen = found.lm_head.forward
    assert found.backward + found.recompute == backward.get_total_flops() + unseen
    assert found.lm_head.recompute == found.lm_head.forward


def test_operations_of_a_reward_model_agree_with_the_dispatcher():
    config = pair_config(stack(num_hidden_layers=2, layer_types=("full_attention",) * 2))
    model = RewardModel(build(config))
    model.set_attention_backend("eager")
    ids = torch.randint(3, config.encoder.vocab_size, (1, 12))
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids)).sum().backward()
    row = replace(example_row(config, 12, 0), pairs=Pairs((144, 144), (0, 0), (0, 0)))
    head = 3 * 2 * config.encoder.hidden_size
    assert encoder_flops(config, row).total == counter.get_total_flops() - head


def recipe(kind, folder, **changes):
    data = {"sources": [{"path": "unused"}], "source_length": 512, "target_length": 256, "pairs_per_batch": 4}
    made = {"stage": {PreferenceRecipe: "dpo", RewardRecipe: "reward"}[kind], "model": {"path": str(folder)}}
    return kind(**(BASE | made | {"data": data | changes.pop("data", {})} | changes))


@pytest.fixture
def folder(tmp_path):
    config = small(vocab=1024)
    (tmp_path / "config.json").write_text(
        json.dumps(config.model_dump(mode="json") | {"architectures": ["EncoderDecoder"]})
    )
    return tmp_path


def test_a_recipe_of_preferences_is_planned(folder):
    device = DEVICES["h100"]
    plan = plan_run(recipe(PreferenceRecipe, folder), device)
    assert plan.tokens_per_step == 2 * 4 * (512 + 2 * 256)
    assert plan.rows_key == "data.pairs_per_batch"
    assert "one forward pass over all pairs" in plan.notes[0]
    one = training_flops(plan.config, answers_row(plan.config, 512, 256, answers=2))
    assert plan.phases[0].flops_per_step == one.times(8)
    looped = plan_run(
        recipe(PreferenceRecipe, folder, preference={"reference": "model"}), device, efficiency=0.5
    )
    assert looped.peak.total - plan.peak.total == 4 * plan.parameters["total"]
    extra = looped.phases[0].compute_s - plan.phases[0].compute_s
    assert extra * 0.5 * device.float32_flops_per_s == pytest.approx(8 * one.forward)
    orpo = plan_run(recipe(PreferenceRecipe, folder, preference={"kind": "orpo"}), device)
    assert (orpo.notes, orpo.peak.reference) == ((), 0)
    shorter = plan_run(recipe(PreferenceRecipe, folder), device, example_lengths=(100, 50))
    assert shorter.tokens_per_step == 2 * 4 * 200


def test_the_largest_batch_of_pairs_fits_and_one_more_does_not(folder):
    tight = replace(DEVICES["l4"], memory_bytes=1_500_000_000)
    large = {"data": {"pairs_per_batch": 64}, "preference": {"reference": "model"}}
    plan = plan_run(recipe(PreferenceRecipe, folder, **large), tight)
    assert not plan.fits
    for size, fits in ((plan.largest_rows_per_batch, True), (plan.largest_rows_per_batch + 1, False)):
        one = recipe(PreferenceRecipe, folder, **(large | {"data": {"pairs_per_batch": size}}))
        assert plan_run(one, tight).fits is fits
    changes = {change.what.split("=")[0]: change for change in plan.changes}
    assert {"data.pairs_per_batch", "preference.reference", "activation_checkpointing"} <= changes.keys()
    assert changes["preference.reference"].saves_bytes == 4 * plan.parameters["total"]


def test_a_recipe_of_a_reward_model_is_planned(folder):
    plan = plan_run(recipe(RewardRecipe, folder), DEVICES["h100"])
    model = RewardModel(EncoderDecoder(plan.config))
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert (plan.parameters["total"], plan.parameters["decoder"]) == (encoder, 0)
    assert plan.phases[0].num_trainable == encoder
    assert plan.tokens_per_step == 2 * 4 * 2 * (512 + 256)
    assert plan.phases[0].flops_per_step.lm_head.total == 0
    with pytest.raises(ValueError, match=r"data\.source_length is 4864"):
        plan_run(recipe(RewardRecipe, folder, data={"source_length": 4608}), DEVICES["h100"])


def test_other_stages_are_refused():
    values = BASE | {"stage": "other"}
    values.pop("data")
    with pytest.raises(ValueError, match=r"stage 'other' cannot be planned.* pretrain, sft, dpo and reward"):
        plan_run(Run(**values), DEVICES["h100"])
