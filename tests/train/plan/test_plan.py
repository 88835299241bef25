import json
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from tests.models.hf import llama_config
from tests.models.test_parameter_counts import KEYS, T5GEMMA_SIDES
from twofold.config.recipe import Recipe
from twofold.models.flops import training_flops
from twofold.train.plan import DEVICES, find_device, plan_run
from twofold.train.plan.plan import USABLE_SHARE, read_model_config


@pytest.fixture
def two_billion(tmp_path):
    """A folder that holds the config.json of a 2B-2B pair and nothing else."""
    side = dict(zip(KEYS, T5GEMMA_SIDES["2B"], strict=True)) | {"vocab_size": 256_000}
    folder = tmp_path / "2b-2b"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5gemma", "encoder": side, "decoder": side})
    )
    return folder


def recipe(folder, data=(), **changes):
    rows = {"source_length": 4096, "target_length": 4096, "rows_per_batch": 4}
    values = {
        "stage": "pretrain",
        "model": {"path": str(folder)},
        "data": {"sources": [{"path": "unused"}], **rows, **dict(data)},
        "output": "unused",
        "steps": 100,
        "accumulate_batches": 8,
        "optimizer": {"learning_rate": 1e-4},
        "precision": "bfloat16",
    }
    return Recipe(**(values | changes))


def test_the_pair_of_a_folder_with_a_config_alone(two_billion):
    plan = plan_run(recipe(two_billion), find_device("h200"), 8)
    assert plan.parameters == {
        "embeddings": 1_179_648_000,
        "encoder": 2_024_517_888,
        "decoder": 2_024_637_696,
        "cross_attention": 368_050_176,
        "head": 0,
        "total": 5_596_853_760,
    }
    assert plan.tokens_per_step == 4 * 8 * 8192


def test_donors_are_planned_as_adapt_plans_them(tmp_path):
    llama_config(tie_word_embeddings=False).save_pretrained(tmp_path)
    made = {"adapt": {"encoder": str(tmp_path), "start": "lossless", "decoder_layers": [0, 1]}}
    config = read_model_config(recipe(tmp_path, model=made).model)
    assert (config.layout, config.reads, config.decoder.num_hidden_layers) == ("merged", "aligned", 2)
    short = {"source_length": 16, "target_length": 16}
    plan = plan_run(recipe(tmp_path, short, model=made), find_device("l4"))
    assert plan.parameters["cross_attention"] == 0
    assert plan.parameters["head"] == config.decoder.vocab_size * config.decoder.hidden_size


def test_times_follow_from_rates(two_billion):
    device = replace(DEVICES["h100"], link_bytes_per_s=1e15)
    run = recipe(two_billion)
    plan = plan_run(run, device, 8, efficiency=0.4, price_per_hour=2.0)
    one = training_flops(plan.config, plan.row)
    compute = 4 * one.total / (989.5e12 * 0.4)  # one batch of four rows on each device
    update = 28 * 5_596_853_760 / 8 / 3.35e12
    (phase,) = plan.phases
    assert math.isclose(phase.step_s, compute + update, rel_tol=1e-9)
    assert math.isclose(plan.total_s, 100 * (compute + update), rel_tol=1e-9)
    assert math.isclose(plan.cost, plan.total_s / 3600 * 16, rel_tol=1e-9)
    # Weights gathered twice in bfloat16, gradients scattered in float32, an eighth stays; a slow link is waited for.
    slow = plan_run(run, replace(device, link_bytes_per_s=1e9), 8)
    moved = 7 / 8 * (2 * 2 + 4) * 5_596_853_760
    assert math.isclose(slow.phases[0].communication_s, moved / 1e9, rel_tol=1e-9)
    assert math.isclose(slow.phases[0].step_s, moved / 1e9 + update, rel_tol=1e-9)


@pytest.mark.parametrize("tied", [True, False])
def test_a_teacher_in_the_loop_costs_its_weights_and_a_forward_pass(two_billion, tmp_path, tied):
    config = llama_config(tie_word_embeddings=tied)
    config.save_pretrained(tmp_path / "teacher")
    device, rows = DEVICES["h100"], {"source_length": 512, "target_length": 256}
    alone = plan_run(recipe(two_billion, rows), device)
    taught = plan_run(
        recipe(two_billion, rows, distillation={"teacher": str(tmp_path / "teacher")}), device, efficiency=0.5
    )
    teacher = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    size = sum(p.numel() for p in teacher.parameters())
    assert taught.teacher.parameters == size
    assert taught.peak.teacher == 2 * size  # bfloat16
    assert alone.peak.teacher == 0
    matching = {"teacher": str(tmp_path / "teacher"), "hidden_states": {"layers": [[1, 1], [2, 2]]}}
    matched = plan_run(recipe(two_billion, rows, distillation=matching), device)
    # Both sides' states of two layers at every scored position, and the teacher's normed, in float32.
    assert matched.peak.loss - taught.peak.loss == 2 * 3 * 4 * 4 * 256 * matched.config.decoder.hidden_size
    with FlopCounterMode(display=False) as counter:
        teacher(torch.zeros(1, 768, dtype=torch.int64), logits_to_keep=256)
    extra = taught.phases[0].compute_s - alone.phases[0].compute_s
    of_kind = counter.get_flop_counts()["Global"]
    # Eager attention multiplies all 768 x 768 pairs in each layer; the lower triangle of them is needed.
    scores = of_kind[torch.ops.aten.bmm] * 769 / (2 * 768)
    assert extra * 0.5 * 989.5e12 == pytest.approx(4 * 8 * (of_kind[torch.ops.aten.mm] + scores), rel=1e-6)
    stored = recipe(two_billion, rows, distillation={"targets": "somewhere"})
    assert plan_run(stored, device).teacher is None


def test_an_encoder_decoder_teacher(two_billion, tmp_path):
    rows = {"source_length": 512, "target_length": 256}
    plan = plan_run(recipe(two_billion, rows, distillation={"teacher": str(two_billion)}), DEVICES["h100"])
    assert plan.teacher.parameters == 5_596_853_760
    assert plan.teacher.flops_per_row == training_flops(plan.config, plan.row).forward


def test_warm_up_is_a_phase_of_its_own_and_cheaper(two_billion):
    plan = plan_run(recipe(two_billion, cross_attention_warmup_steps=30), find_device("h100"), 8)
    first, second = plan.phases
    assert (first.steps, second.steps) == (30, 70)
    assert first.num_trainable == 368_050_176 + 26 * 2 * 2304  # projections and two norms a layer
    assert second.num_trainable == 5_596_853_760
    assert first.memory.total < second.memory.total
    assert first.flops_per_step.total < second.flops_per_step.total
    assert first.flops_per_step.forward == second.flops_per_step.forward


@pytest.mark.parametrize("target_length", [512, 256, 128])
def test_the_largest_batch_fits_and_one_more_row_does_not(two_billion, target_length):
    short = {"source_length": 512, "target_length": target_length}
    largest = plan_run(recipe(two_billion, short), find_device("h200"), 8).largest_rows_per_batch
    assert largest > 8
    for rows, fits in ((largest, True), (largest + 1, False)):
        one = recipe(two_billion, short | {"rows_per_batch": rows})
        assert plan_run(one, find_device("h200"), 8).fits is fits


def test_what_to_change_saves_what_it_says(two_billion):
    run = recipe(two_billion, {"rows_per_batch": 8})
    plan = plan_run(run, find_device("h200"), 8)
    assert not plan.fits
    assert plan.peak.total > USABLE_SHARE * 141e9
    by_text = {change.what: change for change in plan.changes}
    first = plan.changes[0]
    assert first.what.startswith(f"data.rows_per_batch={plan.largest_rows_per_batch} accumulate_batches=")
    words = dict(word.split("=") for word in first.what.split()[:2])
    rows, batches = int(words["data.rows_per_batch"]), int(words["accumulate_batches"])
    assert rows * batches == 64
    smaller = recipe(two_billion, {"rows_per_batch": rows}, accumulate_batches=batches)
    assert plan.peak.total - plan_run(smaller, find_device("h200"), 8).peak.total == first.saves_bytes
    assert first.fits
    full, selective = (by_text[f"activation_checkpointing={kind}"] for kind in ("full", "selective"))
    assert full.saves_bytes > selective.saves_bytes > 0
    assert plan_run(recipe(two_billion, {"rows_per_batch": 1}), find_device("h200"), 8).changes == ()


def test_packed_rows_cost_less_attention_and_no_more_than_their_examples(two_billion):
    full = plan_run(recipe(two_billion), find_device("h100"), 8)
    packed = plan_run(recipe(two_billion), find_device("h100"), 8, example_lengths=(400, 100))
    assert packed.row.examples == 10  # 4096 // 400: the source is full first
    assert packed.tokens_per_step == 4 * 8 * 10 * 500
    assert packed.row.scored == 1000
    part = packed.phases[0].flops_per_step.parts()
    whole = full.phases[0].flops_per_step.parts()
    assert part["attention"].total < whole["attention"].total / 8
    assert part["encoder"] == whole["encoder"]
    assert part["lm_head"].total * 4096 == whole["lm_head"].total * 1000


def test_what_looks_wrong_is_said(two_billion):
    def problems(**changes):
        return " ".join(plan_run(recipe(two_billion, **changes), find_device("h100"), 8).problems)

    assert problems() == ""
    assert "accumulate_batches=12 cannot be dealt evenly to 8" in problems(accumulate_batches=12)
    assert "float32" in problems(precision="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_devices": 0}, "at least 1, got 0"),
        ({"efficiency": 1.5}, "got 1.5"),
        ({"price_per_hour": -1.0}, "got -1.0"),
        ({"example_lengths": (5000, 10)}, "got 5000 and 10"),
    ],
)
def test_bad_values_are_refused(two_billion, options, message):
    with pytest.raises(ValueError, match=message):
        plan_run(recipe(two_billion), find_device("h100"), **options)


def test_runs_that_train_would_refuse_are_refused(two_billion, tmp_path):
    with pytest.raises(ValueError, match="max_position_embeddings"):
        plan_run(recipe(two_billion, {"source_length": 10_000}), find_device("h100"))
    donor = tmp_path / "donor"
    llama_config().save_pretrained(donor)
    made = {"adapt": {"encoder": str(donor), "start": "lossless"}}
    short = {"source_length": 16, "target_length": 16}
    with pytest.raises(ValueError, match="cross_attention_warmup_steps=0"):
        plan_run(recipe(donor, short, model=made, cross_attention_warmup_steps=10), find_device("h100"))


def test_devices():
    with pytest.raises(ValueError, match="unknown device 'h999'; use one of a100"):
        find_device("h999")
    plain = find_device("cpu")
    assert plain.bfloat16_flops_per_s is None
    fast = find_device("cpu", measure=True)
    assert fast.memory_bytes == plain.memory_bytes > 1e9
    assert 1e8 < fast.float32_flops_per_s < 1e14
    assert 1e8 < fast.memory_bytes_per_s < 1e13


def test_without_rates_there_is_no_time(two_billion):
    plan = plan_run(recipe(two_billion), find_device("cpu"), price_per_hour=1.0)
    assert (plan.total_s, plan.cost) == (None, None)
    assert json.loads(json.dumps(plan.as_json()))["seconds"] is None
